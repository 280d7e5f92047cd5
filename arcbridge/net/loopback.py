"""Opens the client's listening sockets, and says which user holds a port that is taken.

It accepts no connection, and does not choose a port beyond what the kernel gives. Invariant: a port is never shared
with another process, and `listen_local` has both loopback addresses wherever the machine has both.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from arcbridge.errors import ConfigError

BACKLOG = 1024
"""Connections that the kernel queues (net.core.somaxconn may be less): a local flood fills a short queue at once, and
the SYN of a caller that finds it full waits a second for its repetition."""


class PortInUse(ConfigError):
    """The sentence that tools know from Azure Arc, then who holds the port as far as that can be told."""

    def __init__(self, port: int, option: str = "--port") -> None:
        holder = port_holder(port)
        second = f"\nthe port is held by a process of {holder}" if holder else ""
        super().__init__(f"Port {port} is already in use. Please select a different port with {option} option.{second}")


def listen_local(port: int, *, option: str = "--port") -> list[socket.socket]:
    """Open non-blocking listening sockets on 127.0.0.1 and, where there is IPv6, on ::1 with the same port (0: any).

    Both or an error: on `::1` another program could answer to `localhost`. Raises PortInUse, ConfigError.
    """
    first = _listen(socket.AF_INET, "127.0.0.1", port, option)
    bound = int(first.getsockname()[1])
    try:
        second = _listen(socket.AF_INET6, "::1", bound, option)
    except _NoAddress:
        return [first]
    except ConfigError as error:
        first.close()
        if port or not isinstance(error, PortInUse):
            raise
        return listen_local(0, option=option)
    return [first, second]


def listen_at(host: str, port: int, *, option: str = "--listen") -> socket.socket:
    """Open one listening socket at a literal address; raises PortInUse, ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return _listen(family, host, port, option)
    except _NoAddress as error:
        raise ConfigError(f"cannot listen on {host}: this machine has no such address") from error


class _NoAddress(Exception):
    """The address does not exist on this machine."""


def _listen(family: int, host: str, port: int, option: str) -> socket.socket:
    try:
        # Takes over a port in TIME_WAIT, never one that is listened on. SO_REUSEPORT stays off: with it a second
        # process could share, that is steal, connections.
        sock = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(port, option) from error
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise _NoAddress from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"cannot listen on port {port}: permission denied; choose one above 1023") from error
        raise ConfigError(f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}") from error
    sock.setblocking(False)
    return sock


def port_holder(port: int) -> str:
    """Return the user whose process listens on a port; empty where that cannot be told (no /proc)."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            # local address:port in hexadecimal; state 0A is LISTEN; field 7 is the uid (proc_net_tcp of the kernel).
            if len(fields) > 7 and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                return _user(int(fields[7]))
    return ""


def _user(uid: int) -> str:
    try:
        import pwd  # not on Windows

        return f"user {pwd.getpwuid(uid).pw_name}"
    except (ImportError, KeyError):
        return f"user id {uid}"
