"""When a system carries: its client listens long before its agent is there."""

from __future__ import annotations

import socket

from bench.address import Address


def carries(endpoint: Address, timeout: float = 3.0) -> bool:
    """Whether a byte goes through the whole system to the load generator's echo, and comes back within `timeout` s."""
    try:
        with socket.create_connection(endpoint, timeout=timeout) as sock:
            sock.sendall(b"E?")
            return sock.recv(1) == b"?"
    except OSError:
        return False
