"""Peers that are written in Go: a module each that pins them, and what their adapters share.

`MODULE/go.mod` names the programs in `tool` lines, `MODULE/go.sum` has the checksum of all they are made of.
"""

from __future__ import annotations

import socket

from bench.address import Address

ENVIRONMENT = {"GOGC": "400"}
"""Of every process: garbage is collected when the heap has grown fivefold, not twofold. frp
has little of it."""

GOGC_TOLD = "GOGC=400 (garbage collected less often than by default)"


def carries(endpoint: Address, timeout: float = 3.0) -> bool:
    """Whether a byte goes through the whole system to the load generator's echo, and comes back within `timeout` s.

    A client listens long before its agent is there.
    """
    try:
        with socket.create_connection(endpoint, timeout=timeout) as sock:
            sock.sendall(b"E?")
            return sock.recv(1) == b"?"
    except OSError:
        return False
