"""A small TCP relay that records what passes: to see with one's own eyes that it cannot be read."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self

from bench.address import Address

CANARY = b"canary-" + bytes(range(0x41, 0x5B)) + b"-0123456789-this-text-must-not-be-readable-on-the-wire"
_LIMIT = 8 * 1024 * 1024


class Readable(Exception):
    """A system that says it encrypts does not."""


class Tap:
    """Accepts on `address`, passes everything on to `to`, and keeps up to 8 MiB of what it saw."""

    def __init__(self, to: Address) -> None:
        self._to = to
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._server.getsockname()[1])
        self._seen = bytearray()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def seen(self) -> bytes:
        """Every byte so far, both directions, in the order of arrival."""
        with self._lock:
            return bytes(self._seen)

    def require_unreadable(self) -> str:
        """How much was looked at. Raises Readable when CANARY or a part of it is in clear, or nothing passed."""
        seen = self.seen
        parts = [CANARY[i : i + 12] for i in range(0, len(CANARY) - 11, 4)]
        if any(part in seen for part in parts):
            raise Readable("a text sent through the system was found in clear on the wire")
        if len(seen) < len(CANARY):
            raise Readable("nothing passed the recording relay: what was looked at is not what is measured")
        return f"a known text went through and back; it was not in the {len(seen)} bytes recorded on the wire"

    def close(self) -> None:
        """End it, and every connection through it."""
        self._server.close()
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for one in sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(self._to, timeout=5)
            except OSError:
                return
            far.settimeout(None)
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                with self._lock:
                    self._seen += data[: max(0, _LIMIT - len(self._seen))]
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # either end is gone: the other notices by itself


def send_canary(through: Address, rounds: int = 3) -> None:
    """Send the known text through a system to the load generator's echo, and see it come back whole."""
    with socket.create_connection(through, timeout=10) as sock:
        sock.sendall(b"E")
        for _ in range(rounds):
            sock.sendall(CANARY)
            back = b""
            while len(back) < len(CANARY):
                piece = sock.recv(len(CANARY) - len(back))
                if not piece:
                    raise Readable("the known text did not come back")
                back += piece
            if back != CANARY:
                raise Readable("the known text came back changed")
