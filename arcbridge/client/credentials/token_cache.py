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
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcbridge.client.credentials.jwt_unverified import positive, read_unverified
from arcbridge.errors import StateError, Unreachable
from arcbridge.pki.private_files import ensure_private_directory, read_file, try_lock, write_private
from arcbridge.untrusted_json import read_json_object

if TYPE_CHECKING:
    import asyncio

    from arcbridge.identity.proof import ProofKey
    from arcbridge.settings.config import LoginConfig

LOCK_WAIT = 60.0
"""Seconds to wait for another process that refreshes or logs in with the same cache."""
LOCK_RETRY = 0.05
FILE_LIMIT = 64 * 1024 * 1024
"""Bytes of a file of tokens that is read: a user with many groups has tokens of some KiB, one for each cluster."""


@dataclass(frozen=True, slots=True)
class TokenSet:
    """What one login gave, or what it was traded for (the access token of one audience). Times are unix seconds."""

    access_token: str = ""
    id_token: str = ""
    refresh_token: str = ""
    obtained_at: float = 0.0
    expires_at: float = 0.0
    """When the first of access and id token ends; 0: not said."""
    by_audience: dict[str, TokenSet] = field(default_factory=dict)
    """Tokens for one cluster each, by their audiences (`login.cluster_audience`)."""
    logged_in_at: float = 0.0
    """When the user logged in; refreshed tokens keep it. 0: not known."""
    failed_at: float = 0.0
    """When a login for which many commands wait failed, as where the user refused it; 0: none has since these came."""

    def __repr__(self) -> str:
        return f"TokenSet(expires_at={self.expires_at:.0f}, refreshable={bool(self.refresh_token)})"

    def fresh(self, now: float) -> bool:
        """Return whether to use them as they are: before 80 % of their life, and before the last five minutes.

        A life so short that five minutes are most of it is used for its first half.
        """
        life = self.expires_at - self.obtained_at
        end = self.obtained_at + max(min(0.8 * life, life - 300), 0.5 * life)
        return self.usable(now) and (not self.expires_at or now < end)

    def usable(self, now: float) -> bool:
        """Return whether they have not ended yet."""
        return bool(self.access_token or self.id_token) and (not self.expires_at or now < self.expires_at)

    def same_login(self, other: TokenSet) -> bool:
        """Return whether access and id token are those of `other`: neither has been refreshed since."""
        return (self.access_token, self.id_token) == (other.access_token, other.id_token)

    def __bool__(self) -> bool:
        """Return whether there is any token, which may have ended."""
        return bool(self.access_token or self.id_token or self.refresh_token)


class MemoryTokens:
    """Tokens that come without a person, by their audiences, kept in this process alone until they grow old.

    `key`: that to which they are bound, in memory alone unless it comes from a file; None: to none yet. `clock`: unix
    seconds.
    """

    def __init__(self, key: ProofKey | None, clock: Callable[[], float]) -> None:
        self.key = key
        self._clock = clock
        self._kept: dict[str, TokenSet] = {}
        self._asking: asyncio.Lock | None = None

    async def _ask(self, audience: str) -> TokenSet:
        """Get tokens for an audience; empty: the relay's. Raises ArcbridgeError, which says what to do."""
        raise NotImplementedError

    def _own_key(self) -> ProofKey:
        from arcbridge.identity.proof import ProofKey

        self.key = self.key or ProofKey.generate()
        return self.key

    async def tokens(self, *, interactive: bool, force: bool = False) -> TokenSet:
        """Return the relay's token, and the clusters' one id token where the source gives one beside it."""
        return await self.for_audience("", interactive=interactive, force=force)

    async def for_audience(self, audience: str, *, interactive: bool, force: bool = False) -> TokenSet:
        """Return the kept tokens, or new ones, which are asked for one after the other. `force`: not the kept ones.

        Raises as `_ask` does, but Unreachable only where the kept tokens have ended.
        """
        import asyncio

        self._asking = self._asking or asyncio.Lock()
        async with self._asking:
            kept = self._kept.get(audience, TokenSet())
            if force or not kept.fresh(self._clock()):
                try:
                    kept = self._kept[audience] = await self._ask(audience)
                except Unreachable:
                    if force or not kept.usable(self._clock()):
                        raise
            return kept


def token_set(answer: Mapping[str, object], now: float, former_refresh_token: str = "") -> TokenSet:
    """Read a token endpoint's answer (RFC 6749 §5.1). An absent refresh token means: the former one stays (§6)."""

    def text(key: str) -> str:
        value = answer.get(key)
        return value if isinstance(value, str) else ""

    expires_in = positive(answer.get("expires_in"))
    ends = [positive(now + expires_in) if expires_in else 0.0]
    ends += [read_unverified(text(name)).expires_at for name in ("access_token", "id_token")]
    refresh_token = text("refresh_token") or former_refresh_token
    return TokenSet(text("access_token"), text("id_token"), refresh_token, now, min(filter(None, ends), default=0.0))


class TokenCache:
    """The file of one login, for the relays of one organisation (`client.relay.relay_profile.organisation`)."""

    def __init__(self, directory: Path, relay: str, login: LoginConfig) -> None:
        # Apart, because a scope that moves from one list to the other makes another relay's token.
        apart = [sorted(login.relay_scopes)] if login.relay_scopes else []
        names = [login.issuer, login.client_id, sorted(login.scopes), login.audience, *apart]
        self.path = _file(directory, [relay, *names])
        self._former = _file(directory, names)
        """The file of versions that kept one login for all relays. Its tokens may be another relay's: none is used."""
        self.key_path = self.path.with_suffix(".key")
        """The key that this login's tokens are bound to."""
        self.no_login = f"you are not logged in at {login.issuer}"
        """For an error that goes on with what to do."""

    def load(self) -> TokenSet:
        """Return the kept tokens; an empty set when there are none or the file is unreadable."""
        try:
            return _read(read_json_object(read_file(self.path, limit=FILE_LIMIT) or b"", FILE_LIMIT))
        except StateError:
            return TokenSet()

    def save(self, tokens: TokenSet) -> None:
        """Raises StateError."""
        ensure_private_directory(self.path.parent)
        write_private(self.path, json.dumps(asdict(tokens)).encode())
        _remove(self._former)

    def clear(self) -> bool:
        """Forget the tokens and their key; False when there were no tokens. Raises StateError."""
        kept = bool(self.load())
        removed, former = _remove(self.path), _remove(self._former)
        return (removed and kept) or former

    @asynccontextmanager
    async def locked(self, wait: float = 0.0) -> AsyncIterator[None]:
        """Hold the login's lock: parallel processes refresh once, and a rotated refresh token is used once.

        `wait`: seconds for another process; 0: LOCK_WAIT. Raises StateError when one keeps the lock longer. Cancelling
        while waiting holds nothing.
        """
        import asyncio  # `whoami` reads the file and waits for nothing

        ensure_private_directory(self.path.parent)
        wait = wait or LOCK_WAIT
        lock = self.path.with_suffix(".lock")
        deadline = asyncio.get_running_loop().time() + wait
        while (descriptor := try_lock(lock)) is None:
            if asyncio.get_running_loop().time() > deadline:
                raise StateError(f"another process has held {lock} for {wait:.0f} s; is a login waiting there?")
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


def _read(document: Mapping[str, Any]) -> TokenSet:
    """Return what `save` has written; an empty set where it is damaged. A damaged one of an audience is asked for
    again."""
    texts = {name: document.get(name, "") for name in ("access_token", "id_token", "refresh_token")}
    times = {name: document.get(name, 0.0) for name in ("obtained_at", "expires_at", "logged_in_at", "failed_at")}
    if not all(isinstance(one, str) for one in texts.values()) or not all(
        one == 0 or positive(one) for one in times.values()
    ):
        return TokenSet()
    listed = document.get("by_audience")
    pairs = listed.items() if isinstance(listed, dict) else ()
    read = {name: _read(one) for name, one in pairs if isinstance(one, dict)}
    return TokenSet(**texts, **times, by_audience={name: one for name, one in read.items() if one.access_token})
