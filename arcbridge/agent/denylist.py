"""The denylist: a file in which the cluster's operator revokes users, for whom the relays are not enough.

It reads the file, again every two seconds, and hands each good list over; it ends no session. The file may be
replaced in any way, also as a ConfigMap replaces it: by another directory behind a symbolic link. Invariant: a file
that is missing or cannot be understood changes nothing, and is a reason not to start.
"""

from __future__ import annotations

import asyncio
import math
import tomllib
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from arcbridge.agent.revocations import CLUSTER, Revocation
from arcbridge.errors import ConfigError
from arcbridge.identity.names import is_plain

CHECK_INTERVAL = 2.0
"""Seconds between two readings."""
MAX_FILE = 1024 * 1024
"""Bytes of a file that is read: as many as a ConfigMap holds."""

log = structlog.get_logger("arcbridge.agent")


def parse_denylist(data: bytes, source: str) -> dict[str, Revocation]:
    """Read the revocations of a file, by user. Raises ConfigError that names `source` and the entry."""
    if len(data) > MAX_FILE:
        raise ConfigError(f"{source}: the denylist has more than {MAX_FILE} bytes")
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # also a number too long for Python, or nesting
        raise ConfigError(f"{source}: the denylist is not valid TOML: {error}") from error
    for key in document:
        if key != "deny":
            raise ConfigError(f"{source}: unknown setting {key!r}; a denylist has entries [[deny]]")
    entries = document.get("deny", [])
    if not isinstance(entries, list):
        raise ConfigError(f"{source}: deny: each user is an entry [[deny]]")
    found = {}
    for number, entry in enumerate(entries):
        revocation = _entry(entry, f"{source}: deny[{number}]")
        if revocation.user in found:
            raise ConfigError(f"{source}: deny[{number}].user: the user is listed twice")
        found[revocation.user] = revocation
    return found


def _entry(entry: Any, path: str) -> Revocation:
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: must be a table")
    for key in entry:
        if key not in ("user", "before", "reason"):
            raise ConfigError(f"{path}.{key}: unknown; known here: user, before, reason")
    user, reason, before = entry.get("user"), entry.get("reason", ""), entry.get("before")
    if not isinstance(user, str) or not is_plain(user):
        raise ConfigError(f"{path}.user: must be a username as it is after claim mapping, or ISSUER#SUBJECT")
    if not isinstance(reason, str):
        raise ConfigError(f"{path}.reason: must be a string")
    if before is None:
        return Revocation(user, math.inf, reason, CLUSTER)
    if not isinstance(before, datetime) or before.tzinfo is None:
        raise ConfigError(f"{path}.before: must be a time with its zone, such as 2026-11-25T12:00:00Z")
    return Revocation(user, before.timestamp(), reason, CLUSTER)


class Denylist:
    """The file of one agent. `take` is called with each list that is good, the first at once."""

    def __init__(self, path: Path, take: Callable[[Mapping[str, Revocation]], None]) -> None:
        """Read the file. Raises ConfigError: an agent without the list would let in whom it names."""
        self._path = path
        self._take = take
        self.error = ""
        """Why the file that is there now has no effect; empty while it has."""
        self._data = self._read()
        listed = parse_denylist(self._data, str(path))
        self.users = len(listed)
        take(listed)

    def take(self, path: Path, listed: Mapping[str, Revocation]) -> None:
        """Put a list in force that was just read from `path`; from now on that file is read."""
        # It is read once more: it may have changed since.
        self._path, self._data, self.error, self.users = path, b"", "", len(listed)
        self._take(listed)

    async def run(self) -> None:
        """Read the file again and again until cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL)
            await self.reload()

    async def reload(self) -> None:
        """Read the file; take it where it has changed and is good. Logs an error once."""
        try:
            found = await asyncio.to_thread(self._read_changed)
        except ConfigError as error:
            if error.message != self.error:
                self.error = error.message
                log.error("denylist not taken", reason=error.message, users=self.users)
            return
        if found is None:
            return
        self._data, listed = found
        self.error, self.users = "", len(listed)
        log.info("denylist taken", users=self.users)
        self._take(listed)

    def _read_changed(self) -> tuple[bytes, dict[str, Revocation]] | None:
        """Return the file and its list; None where the file that has effect is there unchanged."""
        data = self._read()
        if data == self._data and not self.error:
            return None
        return data, parse_denylist(data, str(self._path))

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                return file.read(MAX_FILE + 1)
        except OSError as error:
            raise ConfigError(f"{self._path}: the denylist cannot be read: {error.strerror}") from error
