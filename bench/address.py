"""Where something listens, on loopback only."""

from __future__ import annotations

import socket
from typing import NamedTuple


class Address(NamedTuple):
    """A loopback address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def free_ports(count: int) -> list[Address]:
    """Return free ports. They differ, because each is held until all are found."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [Address("127.0.0.1", s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def listens(address: Address) -> bool:
    """Tell whether the address accepts a connection now."""
    try:
        with socket.create_connection(address, timeout=1):
            return True
    except OSError:
        return False
