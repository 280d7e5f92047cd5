"""Asks the kernel for the state of a connection, also of one whose bytes have not been read yet.

It reads no byte and changes nothing. Invariant: a connection that may still send is never called ended.
"""

from __future__ import annotations

import socket
import sys
from typing import Final

_ESTABLISHED: Final = 1
_RTT: Final = 68
"""Where `tcpi_rtt` begins in `struct tcp_info`: behind eight bytes and fifteen numbers."""


def has_ended(sock: socket.socket) -> bool:
    """Return whether the peer can send nothing more, though bytes from before may still be unread.

    From `tcpi_state`, the first byte of `struct tcp_info`. Where the system cannot tell, the answer is no: everything
    that asks has a deadline besides.
    """
    if not hasattr(socket, "TCP_INFO"):
        return False
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED


def round_trip(sock: socket.socket) -> float:
    """Return the smoothed round trip to the peer, seconds; 0 where the system does not know it.

    From `tcpi_rtt`, microseconds. The peer is the next end of TCP: a load balancer that is one hides what is behind it.
    """
    if not hasattr(socket, "TCP_INFO"):
        return 0.0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT + 4)
    except OSError:
        return 0.0  # it is closed
    return int.from_bytes(info[_RTT:], sys.byteorder) / 1e6
