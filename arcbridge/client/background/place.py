"""Where the background process of a user is reached, and where it keeps its log and what is connected.

The socket is in the user's runtime directory, which a reboot empties; the log and the list of connections are in the
state directory. This module is imported by each `arcbridge credential`, so it imports nothing that takes time.
"""

from __future__ import annotations

import os
import stat

from arcbridge.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET_LIMIT = 100
"""Bytes of a Unix socket's path: the kernel takes 107, macOS 103."""


class Place:
    """The paths of one user. `runtime` is made by `make`, 0700."""

    __slots__ = ("runtime", "state")

    def __init__(self, runtime: str, state: str) -> None:
        self.runtime = runtime
        self.state = state

    @classmethod
    def find(cls, environment: Mapping[str, str]) -> Place:
        """By XDG_RUNTIME_DIR and XDG_STATE_HOME; raises nothing."""
        home = environment.get("HOME") or os.path.expanduser("~")
        base = environment.get("XDG_STATE_HOME", "")
        state = os.path.join(base if base.startswith("/") else os.path.join(home, ".local/state"), "arcbridge")
        given = environment.get("XDG_RUNTIME_DIR", "")
        # Relative paths are to be ignored, and after `su` the variable may name another user's directory.
        usable = given.startswith("/") and os.path.isdir(given) and os.stat(given).st_uid == _user_id()
        runtime = os.path.join(given, "arcbridge") if usable else os.path.join(state, "run")
        if len(os.fsencode(runtime)) + len("/control") > SOCKET_LIMIT:
            from binascii import crc32

            runtime = f"/tmp/arcbridge-{_user_id()}-{crc32(os.fsencode(runtime)):08x}"
        return cls(runtime, state)

    @property
    def socket(self) -> str:
        return os.path.join(self.runtime, "control")

    @property
    def start_lock(self) -> str:
        """Held by who starts the process."""
        return os.path.join(self.runtime, "start.lock")

    @property
    def process_lock(self) -> str:
        """Held by the process itself; its copy is handed to the one that takes its place."""
        return os.path.join(self.runtime, "process.lock")

    @property
    def log(self) -> str:
        return os.path.join(self.state, "background.log")

    @property
    def connections(self) -> str:
        return os.path.join(self.state, "connections.json")

    def make(self) -> None:
        """Make the runtime directory; raises StateError where it is not this user's own and private."""
        try:
            os.makedirs(os.path.dirname(self.runtime), 0o700, exist_ok=True)
            try:
                os.mkdir(self.runtime, 0o700)
            except FileExistsError:
                pass
            status = os.lstat(self.runtime)
        except OSError as error:
            raise StateError(f"cannot make the directory {self.runtime}: {error.strerror}") from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != _user_id() or status.st_mode & 0o077:
            raise StateError(
                f"{self.runtime} is not a directory of this user alone: remove it, or set XDG_RUNTIME_DIR to such a one"
            )


def _user_id() -> int:
    """This user; 0 on systems without such numbers, which have no background process."""
    return os.geteuid() if hasattr(os, "geteuid") else 0
