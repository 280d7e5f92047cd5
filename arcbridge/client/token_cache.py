"""Tokens kept between runs: one file (0600) per login, replaced at once, refreshed by one process at a time.

A file's name is the hash of issuer, client id, scopes and audience. A file that cannot be read is the same as none: a
new login, never a crash.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from arcbridge.client.jwt_unverified import read_unverified
from arcbridge.errors import StateError
from arcbridge.pki.private_files import ensure_private_directory, read_file, write_private

LOCK_WAIT = 60.0
"""Seconds to wait for another process that refreshes or logs in with the same cache."""
LOCK_RETRY = 0.05


@dataclass(frozen=True, slots=True)
class TokenSet:
    """What one login gave. Times are unix seconds."""

    access_token: str = ""
    id_token: str = ""
    refresh_token: str = ""
    obtained_at: float = 0.0
    expires_at: float = 0.0
    """When the first of access and id token ends; 0: not said."""

    def __repr__(self) -> str:
        return f"TokenSet(expires_at={self.expires_at:.0f}, refreshable={bool(self.refresh_token)})"

    def fresh(self, now: float) -> bool:
        """Whether to use them as they are: before 80 % of their life, and before the last five minutes.

        A life so short that five minutes are most of it is used for its first half.
        """
        if not self.access_token and not self.id_token:
            return False
        if not self.expires_at:
            return True
        life = self.expires_at - self.obtained_at
        return now < self.obtained_at + max(min(0.8 * life, life - 300), 0.5 * life)

    def usable(self, now: float) -> bool:
        """Whether they have not ended yet."""
        return bool(self.access_token or self.id_token) and (not self.expires_at or now < self.expires_at)


def token_set(answer: dict[str, object], now: float, former_refresh_token: str = "") -> TokenSet:
    """From a token endpoint's answer (RFC 6749 §5.1). An absent refresh token means: the former one stays (§6)."""

    def text(key: str) -> str:
        value = answer.get(key)
        return value if isinstance(value, str) else ""

    ends = []
    expires_in = answer.get("expires_in")
    if isinstance(expires_in, int | float) and not isinstance(expires_in, bool) and expires_in > 0:
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

    def __init__(self, directory: Path, *, issuer: str, client_id: str, scopes: tuple[str, ...], audience: str) -> None:
        key = json.dumps([issuer, client_id, sorted(scopes), audience]).encode()
        self.path = directory / f"{hashlib.sha256(key).hexdigest()[:32]}.json"

    def load(self) -> TokenSet:
        """The kept tokens; an empty set when there are none or the file is unreadable."""
        try:
            data = read_file(self.path)
            document = json.loads(data) if data else {}
            known = {one.name: document[one.name] for one in fields(TokenSet) if one.name in document}
            kept = TokenSet(**known)
        except (StateError, ValueError, TypeError):
            return TokenSet()
        texts = (kept.access_token, kept.id_token, kept.refresh_token)
        times = (kept.obtained_at, kept.expires_at)
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(time, int | float) for time in times):
            return TokenSet()
        return kept

    def save(self, tokens: TokenSet) -> None:
        """Raises StateError."""
        ensure_private_directory(self.path.parent)
        write_private(self.path, json.dumps(asdict(tokens)).encode())

    def clear(self) -> bool:
        """Forget the tokens; False when there were none."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StateError(f"cannot remove {self.path}: {error.strerror}") from error
        return True

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the login's lock: parallel processes refresh once, and a rotated refresh token is used once.

        Raises StateError when another process keeps it too long. Cancelling while waiting holds nothing.
        """
        ensure_private_directory(self.path.parent)
        lock = self.path.with_suffix(".lock")
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateError(f"cannot open the lock file {lock}: {error.strerror}") from error
        try:
            deadline = asyncio.get_running_loop().time() + LOCK_WAIT
            while not _try_lock(descriptor, lock):
                if asyncio.get_running_loop().time() > deadline:
                    raise StateError(
                        f"another process has held {lock} for {LOCK_WAIT:.0f} s; is a login waiting there?"
                    )
                await asyncio.sleep(LOCK_RETRY)
            yield
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    from filelock import lock_descriptor  # 15 ms: only what locks pays for it

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        raise StateError(f"cannot lock {path}: {error.strerror}") from error
