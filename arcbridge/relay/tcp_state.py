"""What the kernel knows of a connection that nobody reads at the moment: the first byte of `struct tcp_info`.

Where the system cannot tell, the answer is no: everything that asks has a deadline besides.
"""

from __future__ import annotations

import socket
from typing import Final

_ESTABLISHED: Final = 1
_CLOSE: Final = 7


def has_ended(sock: socket.socket) -> bool:
    """Whether the peer can send nothing more, though bytes from before may still be unread."""
    return _state(sock) not in (None, _ESTABLISHED)


def is_dead(sock: socket.socket) -> bool:
    """Whether the connection is over in both directions: reset by the peer, or given up by the kernel."""
    return _state(sock) == _CLOSE


def _state(sock: socket.socket) -> int | None:
    if not hasattr(socket, "TCP_INFO"):
        return None
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
