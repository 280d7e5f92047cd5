"""Asks the kernel for the state of a connection whose bytes have not been read yet.

It reads no byte and changes nothing. Invariant: a connection that may still send is never called ended.
"""

from __future__ import annotations

import socket
from typing import Final

_ESTABLISHED: Final = 1


def has_ended(sock: socket.socket) -> bool:
    """Return whether the peer can send nothing more, though bytes from before may still be unread.

    From `tcpi_state`, the first byte of `struct tcp_info`. Where the system cannot tell, the answer is no: everything
    that asks has a deadline besides.
    """
    if not hasattr(socket, "TCP_INFO"):
        return False
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED
