"""Who is connected to a port, by the kernel's word."""

from __future__ import annotations

import os
import socket

from bench.soak.through import connected


def test_who_has_a_connection_to_a_port() -> None:
    me = os.getpid()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert connected([me], port) == set(), "listening is not being connected to"
        with socket.create_connection(("127.0.0.1", port)) as near, server.accept()[0]:
            assert connected([me, 1, 2**30], port) == {me}
            assert connected([1, 2**30], port) == set()
            assert connected([me], near.getsockname()[1]) == {me}, "the accepted end"
        assert connected([me], port) == set(), "it was closed"
