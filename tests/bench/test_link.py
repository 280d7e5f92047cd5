"""The link between client and relay: nothing lost, never too early or too fast, ends in order. None need be fast."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as File

import pytest

from bench.address import Address
from bench.load.generator import Generator, Target
from bench.path.link import Link, Path

WAIT = 20.0
NEAR = Path("near", round_trip_ms=0)


pytestmark = pytest.mark.usefixtures("load")


class Far:
    """A server of one conversation, in a thread."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(WAIT)
        self.address = Address("127.0.0.1", self._server.getsockname()[1])
        self.dialled_at = self.accepted_at = 0.0
        self._serve = serve
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(TimeoutError):
            sock, _ = self._server.accept()
            self.accepted_at = time.monotonic()
            with sock:
                sock.settimeout(WAIT)
                self._serve(sock)

    def join(self) -> None:
        self._thread.join()
        self._server.close()


@contextlib.contextmanager
def through(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[tuple[socket.socket, Far]]:
    """A connection to `serve` over `path`."""
    far = Far(serve)
    with Link(path, far.address) as link:
        far.dialled_at = time.monotonic()
        with socket.create_connection(link.address, timeout=WAIT) as near:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield near, far
        far.join()


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def payload(size: int) -> bytes:
    return b"".join(hashlib.sha256(n.to_bytes(8)).digest() for n in range(size // 32 + 1))[:size]


@pytest.mark.parametrize(
    "path",
    [
        NEAR,
        Path("long", round_trip_ms=20),
        Path("narrow", round_trip_ms=10, mbit_per_s=100, queue_bytes=64 * 1024),
        Path("wide", round_trip_ms=10, mbit_per_s=2000),
    ],
    ids=lambda path: path.name,
)
def test_each_byte_arrives_in_order_both_ways_and_each_end_by_itself(path: Path) -> None:
    up, down = payload(2_000_003), payload(1_500_007)[::-1]
    seen: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        seen.append(read_all(sock))  # the near end has ended; this way is still open
        sock.sendall(down)

    with through(path, serve) as (near, _):
        near.sendall(up)
        near.shutdown(socket.SHUT_WR)
        assert read_all(near) == down
    assert seen == [up]


def test_nothing_arrives_before_its_time() -> None:
    def serve(sock: socket.socket) -> None:
        while data := sock.recv(4096):
            sock.sendall(data)

    with through(Path("long", round_trip_ms=60), serve) as (near, far):
        near.sendall(b"x")
        assert near.recv(1) == b"x"
        first = time.monotonic() - far.dialled_at
        for _ in range(3):
            begun = time.monotonic()
            near.sendall(b"x")
            assert near.recv(1) == b"x"
            assert time.monotonic() - begun >= 0.060
    assert first >= 0.120, "the handshake costs a round trip, too"
    assert far.accepted_at > 0


def test_all_connections_of_one_direction_share_the_rate(load: Generator, target: Target) -> None:
    path = Path("narrow", round_trip_ms=0, mbit_per_s=40, queue_bytes=32 * 1024)
    with Link(path, target.address) as link, ThreadPoolExecutor(3) as pool:
        begun = time.monotonic()
        running = [pool.submit(load.run, "up", link.address, seconds=30, warmup=0, bytes=600_000) for _ in range(3)]
        assert [one.result()["total_bytes"] for one in running] == [600_000] * 3
        assert time.monotonic() - begun >= 1_800_000 * 8 / 40e6


def test_a_full_queue_holds_its_sender_back(tmp_path: File) -> None:
    release = threading.Event()

    def serve(sock: socket.socket) -> None:
        release.wait(WAIT)
        read_all(sock)

    queue = 256 * 1024
    report = tmp_path / "report"
    far = Far(serve)
    path = Path("slow", round_trip_ms=0, mbit_per_s=1, queue_bytes=queue)
    with Link(path, far.address, report_ms=1, report=report) as link:
        with socket.create_connection(link.address, timeout=0.3) as near:
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 16 * queue:
                    sent += near.send(payload(65_536))
        release.set()
    far.join()
    queued = [json.loads(line)["up"]["queued"] for line in report.read_text().splitlines()]
    assert max(queued) <= queue
    assert max(queued) > queue - 4096, "it does fill"
    assert queue < sent < 16 * queue
