"""TCP servers on loopback that stand behind the agent's TCP targets in tests."""

from __future__ import annotations

import socket
import socketserver
import threading

from tests.support.stopping import Stopping


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)
        self.request.shutdown(socket.SHUT_WR)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


class EchoServer(Stopping):
    """Sends back what it gets, and ends its direction when the other has ended."""

    def __init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Echo)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, name="echo server")
        self._thread.start()

    @property
    def address(self) -> str:
        """`host:port`."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def stop(self) -> None:
        """Stop listening; the port refuses connections afterwards."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
