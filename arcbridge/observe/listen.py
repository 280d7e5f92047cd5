"""Reads `observe.listen`, and says why a role cannot listen there.

It needs no aiohttp, whose import takes a quarter of a second of each command that reads settings.
"""

from __future__ import annotations

import errno
import socket

from arcbridge.errors import ConfigError
from arcbridge.settings.surroundings import listeners, named

from .untrusted_text import clean


def parse_observe_listen(listen: str) -> None:
    """Raise ConfigError unless `listen` is an address that can be listened on, or empty."""
    if listen:
        split_listen(listen)


def check_observe_port(listen: str) -> None:
    """Raise ConfigError where a start could not listen there: bound for an instant, and nothing is accepted."""
    host, port = split_listen(listen)
    try:
        for family, kind, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                sock = socket.socket(family, kind)
            except OSError:
                continue  # a family that this machine has not; asyncio passes over it, too
            with sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
    except OSError as error:
        raise ConfigError(bind_message(listen, error)) from error


def port_of(listen: str) -> int:
    """Return the port of `observe.listen`. Raises ConfigError."""
    return split_listen(listen)[1]


def split_listen(listen: str) -> tuple[str | None, int]:
    """Return the host, None for all addresses, and the port. Raises ConfigError."""
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"observe.listen {clean(listen, 100)!r}: write an IPv6 address as [address]:port")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"observe.listen {clean(listen, 100)!r} is not host:port; for example 127.0.0.1:9464")
    return host or None, int(port)


def bind_message(listen: str, error: Exception) -> str:
    where = f"observe.listen {clean(listen, 100)!r}"
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EADDRINUSE:
        by = named(listeners(port_of(listen)))
        return f"{where}: the port is in use{by}; choose another port, or 0 to have one picked"
    if code == errno.EACCES:
        return f"{where}: this user may not bind that port; choose one above 1023"
    # From Python 3.13 on, asyncio passes over addresses that this machine does not have; where none is left, its error
    # has no number.
    if code == errno.EADDRNOTAVAIL or (code is None and isinstance(error, OSError)):
        return f"{where}: this machine has no such address"
    return f"{where} cannot be bound ({type(error).__name__}); is it an address of this machine?"
