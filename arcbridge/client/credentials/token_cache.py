"""Tokens kept between runs: one file (0600) per login, replaced at once, refreshed by one process at a time.

A file's name is the hash of relay, issuer, client id, audience and the scopes of the login and of the relay, so that no
relay is shown what was issued for another one (docs/threats.md#B42). Beside it is the key to which the login's tokens
are bound (`client.credentials.proof_keys`). A file of tokens that cannot be read is the same as none: a new login,
never a crash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, TypeVar

from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.errors import StateError, Unreachable
from arcbridge.pki.private_files import ensure_private_directory, read_file, try_lock, write_private

if TYPE_CHECKING:
    import asyncio

LOCK_WAIT = 60.0
"""Seconds to wait for another process that refreshes or logs in with the same cache."""
LOCK_RETRY = 0.05
MAX_TIME = 1e12
"""Seconds or unix seconds; what is later is no time that an issuer means, and is the same as none."""


@dataclass(frozen=True, slots=True)
class AudienceToken:
    """An access token for one audience, which a login's tokens were traded for. Times are unix seconds."""

    text: str = field(repr=False)
    obtained_at: float = 0.0
    expires_at: float = 0.0
    """0: not said."""

    def fresh(self, now: float) -> bool:
        """Return whether to use it as it is (`TokenSet.fresh`)."""
        return _fresh(self.obtained_at, self.expires_at, now)

    def usable(self, now: float) -> bool:
        """Return whether it has not ended yet."""
        return not self.expires_at or now < self.expires_at


@dataclass(frozen=True, slots=True)
class TokenSet:
    """What one login gave. Times are unix seconds."""

    access_token: str = ""
    id_token: str = ""
    refresh_token: str = ""
    obtained_at: float = 0.0
    expires_at: float = 0.0
    """When the first of access and id token ends; 0: not said."""
    by_audience: dict[str, AudienceToken] = field(default_factory=dict)
    """Tokens for one cluster each, by their audiences (`login.cluster_audience`)."""

    def __repr__(self) -> str:
        return f"TokenSet(expires_at={self.expires_at:.0f}, refreshable={bool(self.refresh_token)})"

    def fresh(self, now: float) -> bool:
        """Return whether to use them as they are: before 80 % of their life, and before the last five minutes.

        A life so short that five minutes are most of it is used for its first half.
        """
        if not self.access_token and not self.id_token:
            return False
        return _fresh(self.obtained_at, self.expires_at, now)

    def usable(self, now: float) -> bool:
        """Return whether they have not ended yet."""
        return bool(self.access_token or self.id_token) and (not self.expires_at or now < self.expires_at)

    def same_login(self, other: TokenSet) -> bool:
        """Return whether access and id token are those of `other`: neither has been refreshed since."""
        return (self.access_token, self.id_token) == (other.access_token, other.id_token)

    def with_audience(self, audience: str, token: AudienceToken, now: float) -> TokenSet:
        """Return the same with one more token; those that have ended are left out."""
        kept = {name: one for name, one in self.by_audience.items() if one.usable(now)}
        return replace(self, by_audience={**kept, audience: token})


_Token = TypeVar("_Token", AudienceToken, TokenSet)


class TokenMemory(Generic[_Token]):
    """Tokens by their audiences, kept in this process alone until they grow old. `clock`: unix seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[str, _Token] = {}
        self._asking: asyncio.Lock | None = None

    async def get(self, audience: str, ask: Callable[[], Awaitable[_Token]], *, force: bool) -> _Token:
        """Return the kept token, or one by `ask`, of which one runs at a time. `force`: not the kept one.

        Raises as `ask` does, but Unreachable only where the kept token has ended.
        """
        import asyncio

        self._asking = self._asking or asyncio.Lock()
        async with self._asking:
            kept = self._kept.get(audience)
            if force or kept is None or not kept.fresh(self._clock()):
                try:
                    kept = self._kept[audience] = await ask()
                except Unreachable:
                    if force or kept is None or not kept.usable(self._clock()):
                        raise
            return kept


def _fresh(obtained_at: float, expires_at: float, now: float) -> bool:
    if not expires_at:
        return True
    life = expires_at - obtained_at
    return now < obtained_at + max(min(0.8 * life, life - 300), 0.5 * life)


def token_set(answer: dict[str, object], now: float, former_refresh_token: str = "") -> TokenSet:
    """Read a token endpoint's answer (RFC 6749 §5.1). An absent refresh token means: the former one stays (§6)."""

    def text(key: str) -> str:
        value = answer.get(key)
        return value if isinstance(value, str) else ""

    ends = []
    expires_in = answer.get("expires_in")
    if isinstance(expires_in, int | float) and not isinstance(expires_in, bool) and 0 < expires_in < MAX_TIME:
        ends.append(now + float(expires_in))
    ends += [end for token in (text("access_token"), text("id_token")) if (end := read_unverified(token).expires_at)]
    return TokenSet(
        access_token=text("access_token"),
        id_token=text("id_token"),
        refresh_token=text("refresh_token") or former_refresh_token,
        obtained_at=now,
        expires_at=min(ends, default=0.0),
    )


class TokenCache:
    """The file of one login."""

    def __init__(
        self,
        directory: Path,
        *,
        relay: str,
        issuer: str,
        client_id: str,
        scopes: tuple[str, ...],
        audience: str,
        relay_scopes: tuple[str, ...] = (),
    ) -> None:
        self._issuer = issuer
        # Apart, because a scope that moves from one list to the other makes another relay's token.
        more = [sorted(relay_scopes)] if relay_scopes else []
        login = [issuer, client_id, sorted(scopes), audience, *more]
        self.path = _file(directory, [relay, *login])
        self.key_path = self.path.with_suffix(".key")
        """The key that this login's tokens are bound to."""
        self._former = _file(directory, login)
        """The file of versions that kept one login for all relays. Its tokens may be another relay's: none is used."""

    @property
    def no_login(self) -> str:
        """That the user is not logged in, for an error that goes on with what to do."""
        why = " (each relay has a login of its own now; the one of an earlier version is not used)"
        return f"you are not logged in at {self._issuer}{why if self._former.exists() else ''}"

    def load(self) -> TokenSet:
        """Return the kept tokens; an empty set when there are none or the file is unreadable."""
        try:
            data = read_file(self.path)
            document = json.loads(data) if data else {}
            texts = [document.get(name, "") for name in ("access_token", "id_token", "refresh_token")]
            times = [document.get(name, 0.0) for name in ("obtained_at", "expires_at")]
            if all(isinstance(text, str) for text in texts) and all(map(_is_time, times)):
                by_audience = _by_audience(document.get("by_audience"))
                return TokenSet(texts[0], texts[1], texts[2], times[0], times[1], by_audience)
            return TokenSet()
        except (StateError, ValueError, AttributeError, RecursionError):
            return TokenSet()

    def save(self, tokens: TokenSet) -> None:
        """Raises StateError."""
        ensure_private_directory(self.path.parent)
        write_private(self.path, json.dumps(asdict(tokens)).encode())
        _remove(self._former)

    def clear(self) -> bool:
        """Forget the tokens and their key; False when there were no tokens."""
        kept, former = _remove(self.path), _remove(self._former)
        return kept or former

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the login's lock: parallel processes refresh once, and a rotated refresh token is used once.

        Raises StateError when another process keeps it too long. Cancelling while waiting holds nothing.
        """
        import asyncio  # `whoami` reads the file and waits for nothing

        ensure_private_directory(self.path.parent)
        lock = self.path.with_suffix(".lock")
        deadline = asyncio.get_running_loop().time() + LOCK_WAIT
        while (descriptor := try_lock(lock)) is None:
            if asyncio.get_running_loop().time() > deadline:
                raise StateError(f"another process has held {lock} for {LOCK_WAIT:.0f} s; is a login waiting there?")
            await asyncio.sleep(LOCK_RETRY)
        try:
            yield
        finally:
            os.close(descriptor)


def _file(directory: Path, names: list[Any]) -> Path:
    return directory / f"{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]}.json"


def _remove(tokens: Path) -> bool:
    """Remove a file of tokens and its key; False when there were no tokens. Raises StateError."""
    from arcbridge.client.credentials import proof_keys

    proof_keys.remove(tokens.with_suffix(".key"))
    return proof_keys.remove(tokens)


def _by_audience(document: Any) -> dict[str, AudienceToken]:
    """Return the tokens for single audiences that are whole; the others are asked for again."""
    found = {}
    for audience, one in document.items() if isinstance(document, dict) else ():
        if isinstance(one, dict):
            text, obtained, expires = (one.get(name) for name in ("text", "obtained_at", "expires_at"))
            if isinstance(text, str) and text and _is_time(obtained) and _is_time(expires):
                found[audience] = AudienceToken(text, obtained, expires)
    return found


def _is_time(value: Any) -> TypeGuard[float]:
    # A number beyond any date, or none (NaN), would fail when it is computed with.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15
