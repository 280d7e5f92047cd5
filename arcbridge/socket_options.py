"""Options of raw TCP sockets that more than one layer sets. They set and never wait."""

from __future__ import annotations

import socket
import struct
from typing import Final

_LINGER_ZERO: Final = struct.pack("ii", 1, 0)


def reset_on_close(sock: socket.socket) -> None:
    """Let the coming `close` send RST instead of FIN (SO_LINGER of 0 seconds): the peer then sees a cut, not an end."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    except OSError:
        # A socket that is dead already takes no options, and has nothing left to reset.
        pass


def set_keepalive(sock: socket.socket, *, idle: int, interval: int, probes: int) -> None:
    """Probe a silent peer after `idle` seconds, then `probes` times, `interval` seconds apart."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", probes)):
        set_tcp_option(sock, name, value)


def set_tcp_option(sock: socket.socket, name: str, value: int) -> None:
    """Set an option that macOS or Windows may lack; nothing here needs one for correctness."""
    option = getattr(socket, name, None)
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
