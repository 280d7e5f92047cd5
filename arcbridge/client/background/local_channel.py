"""Connects two processes of one user on one machine, and starts one without a terminal: all that depends on the system.

Here a Unix socket, whose peer the kernel names, carries bytes and descriptors; posix_spawn(3) starts a program. On
Windows there is no background process yet: each function raises ConfigError there, and a named pipe of this user's own
name, with a security descriptor for this user alone, would stand in the socket's place. Each `arcbridge credential`
imports it, so it imports nothing that takes time. Invariant: no other module of this folder knows by what the two ends
are connected.
"""

from __future__ import annotations

import os
import sys

from arcbridge.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence
    from typing import Any

_DESCRIPTORS = 1024
"""Those that are looked at: a shell's are below, and systems without /proc have no list of the open ones."""
NOT_HERE = "there is no background process on Windows; use `arcbridge --role client proxy`"


def quick_socket() -> Any:
    """Return a socket for `connect` to the other process, without the module `socket`, which takes 4 ms to import."""
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    import _socket

    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)


def new_socket() -> socket.socket:
    """Return a socket to listen at, or to hand descriptors over by."""
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    import socket

    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def foreign_user(sock: Any) -> int | None:
    """Return the user id of the process at the other end where that is another user; None for this one's, and where
    the system does not tell."""
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    import _socket

    if hasattr(_socket, "SO_PEERCRED"):
        credentials = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)  # struct ucred: pid, uid, gid
        user = int.from_bytes(credentials[4:8], sys.byteorder)
        return user if user != os.geteuid() else None
    return None


def send_descriptors(sock: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    """Send copies of open descriptors along with `data`; raises OSError."""
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    import socket

    socket.send_fds(sock, [data], descriptors)


def receive_descriptors(sock: socket.socket, most: int) -> list[int]:
    """Receive one byte, and the descriptors that the kernel gives with it; raises OSError."""
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    import socket

    return list(socket.recv_fds(sock, 1, most)[1])


def spawn(command: list[str], environment: Mapping[str, str], keep: int = -1) -> int:
    """Start a program without input and output, if possible in a session of its own; return its process id.

    Of this process's descriptors it gets `keep` alone: the lock of a script that runs this would else be held for as
    long as the program lives. Raises OSError.
    """
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    # Not `os.fork`: this process may have threads by now.
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, one, os.devnull, os.O_RDWR, 0) for one in (0, 1, 2)]
    actions += [(os.POSIX_SPAWN_CLOSE, one) for one in _inheritable() if one != keep]
    try:
        return os.posix_spawn(command[0], command, environment, file_actions=actions, setsid=True)
    except NotImplementedError:  # then `leave_terminal` does it a moment later
        return os.posix_spawn(command[0], command, environment, file_actions=actions)


def _inheritable() -> list[int]:
    """Return the descriptors above the usual three that a program which is started here would get."""
    found = []
    for one in range(3, _DESCRIPTORS):
        try:
            if os.get_inheritable(one):
                found.append(one)
        except OSError:
            pass  # it is not open
    return found


def reap(child: int) -> None:
    """Take notice of a started program's end, if it has ended."""
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    try:
        os.waitpid(child, os.WNOHANG)
    except ChildProcessError:
        pass


def leave_terminal() -> None:
    """Give the process that was started a session of its own, and a directory that is never unmounted."""
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    try:
        os.setsid()
    except PermissionError:
        pass  # the process leads a session already
    os.chdir("/")
