"""Options of raw sockets."""

from __future__ import annotations

import socket

import pytest

from arcbridge.socket_options import reset_on_close, set_keepalive, set_tcp_option
from tests.net.ends import tcp_pair


async def test_closing_resets() -> None:
    near, far = await tcp_pair()
    with far:
        reset_on_close(near)
        near.close()
        far.setblocking(True)
        with pytest.raises(ConnectionResetError):
            far.recv(1)
    reset_on_close(near)  # a dead socket is left as it is


def test_keepalive() -> None:
    with socket.socket() as sock:
        set_keepalive(sock, idle=7, interval=3, probes=2)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for name, value in (("TCP_KEEPIDLE", 7), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 2)):
            if hasattr(socket, name):
                assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
        set_tcp_option(sock, "TCP_NO_SUCH_OPTION", 1)
