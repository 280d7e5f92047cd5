"""Names the paths of a user's background process: its control socket, its locks, its log and the list of connections.

All of it is in the state directory, and not in XDG_RUNTIME_DIR. systemd removes that one at the user's last logout
while the process lives on, and cron, `su` and some terminals do not name it: a command that looked there would find
nothing, and start a second process beside the first (docs/decisions/0021-one-background-process.md). What a reboot
leaves behind does no harm, because the kernel frees a lock with its process. Homes may be shared by machines, so the
names carry the machine's.

The locks are outside the directory of the socket: where that one is removed under a living process, the lock still
says that there is one, and it makes the socket anew. This module is imported by each `arcbridge credential`, so it
imports nothing that takes time.
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
MACHINE_ID = "/etc/machine-id"
"""The same from boot to boot, and another one on each machine (machine-id(5)). A host's name changes while it runs."""


class BackgroundPaths:
    """The paths of one user on one machine. `make` makes the two directories, 0700."""

    __slots__ = ("connections", "log", "process_lock", "runtime", "silent", "socket", "start_lock", "state", "told")

    def __init__(self, runtime: str, state: str, machine: str = "") -> None:
        """`runtime`: the directory of the socket. `machine`: tells machines with one home apart; empty: there is one"""
        of_machine = f"-{machine}" if machine else ""
        self.runtime = runtime
        self.state = state
        self.socket = os.path.join(runtime, "control")
        self.silent = os.path.join(runtime, "silent")
        """Made by the first caller that gets no answer, and removed by the process when it goes on."""
        self.told = os.path.join(runtime, "told")
        """Names the kubectl that was told last why it got no credential."""
        self.start_lock = os.path.join(state, f".background-start{of_machine}.lock")
        """Held by who starts the process."""
        self.process_lock = os.path.join(state, f".background{of_machine}.lock")
        """Held by the process itself; its copy is handed to the one that takes its place."""
        self.log = os.path.join(state, "background.log")
        self.connections = os.path.join(state, "connections.json")

    @classmethod
    def find(cls, environment: Mapping[str, str], machine_id: str = MACHINE_ID) -> BackgroundPaths:
        """Find the place by XDG_STATE_HOME, else the home directory; raises nothing."""
        home = environment.get("HOME") or os.path.expanduser("~")
        base = environment.get("XDG_STATE_HOME", "")
        state = os.path.join(base if base.startswith("/") else os.path.join(home, ".local/state"), "arcbridge")
        machine = _machine(machine_id)
        runtime = os.path.join(state, f"run-{machine}" if machine else "run")
        if len(os.fsencode(runtime)) + len("/control") > SOCKET_LIMIT:
            from binascii import crc32

            runtime = f"/tmp/arcbridge-{_user_id()}-{crc32(os.fsencode(runtime)):08x}"
        return cls(runtime, state, machine)

    def make(self) -> None:
        """Make the two directories; raises StateError where one is not this user's own, or the socket's not private."""
        from pathlib import Path

        from arcbridge.pki.private_files import ensure_private_directory, refuse_foreign_directory

        refuse_foreign_directory(Path(self.state))
        ensure_private_directory(Path(self.state), named_by="XDG_STATE_HOME")
        try:
            ensure_private_directory(Path(self.runtime).parent, named_by="XDG_STATE_HOME")
            try:
                os.mkdir(self.runtime, 0o700)
            except FileExistsError:
                pass
        except OSError as error:
            raise StateError(f"cannot make the directory {self.runtime}: {error.strerror}") from error
        self.refuse_foreign_runtime()

    def refuse_foreign_runtime(self) -> None:
        """Raise StateError where the socket's directory is not of this user alone: another one may serve in it.

        One that is absent is made by `make`. Not each system says whose process answers (docs/threats.md#B45).
        """
        try:
            status = os.lstat(self.runtime)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StateError(f"cannot look at the directory {self.runtime}: {error.strerror}") from error
        if status.st_uid != _user_id() == 0:
            raise StateError(f"{self.runtime} belongs to user id {status.st_uid}: run this as that user, without sudo")
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != _user_id() or status.st_mode & 0o077:
            raise StateError(f"{self.runtime} is not a directory of this user alone: remove it, and run this again")


def _machine(machine_id: str) -> str:
    """Return a short name of this machine; empty where it has none."""
    try:
        with open(machine_id, "rb") as file:
            text = file.read(64).strip()
    except OSError:
        return ""
    if not text.isalnum():
        return ""
    from binascii import crc32

    # The id itself is not to be shown to others (machine-id(5)).
    return f"{crc32(text):08x}"


def _user_id() -> int:
    """Return this user's id; 0 on systems without such numbers, which have no background process."""
    return os.geteuid() if hasattr(os, "geteuid") else 0
