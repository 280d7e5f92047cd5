"""The load generator's own honesty: it counts right, it notices wrong bytes, and it loads no other machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from bench.address import Address
from bench.load.build import NoCompiler
from bench.load.generator import Generator, LoadFailed, Target
from tests.support.processes import require_or_skip


@pytest.fixture
def load() -> Generator:
    try:
        return Generator()
    except NoCompiler as error:
        require_or_skip("compiler", str(error))


@pytest.fixture
def target(load: Generator) -> Iterator[Target]:
    with load.target() as target:
        yield target


@pytest.mark.parametrize("command", ["up", "down"])
@pytest.mark.parametrize("size", [1, 16, 262_144, 1_048_573, 5_000_000])
def test_each_byte_of_a_stream_arrives(load: Generator, target: Target, command: str, size: int) -> None:
    result = load.run(command, target.address, seconds=10, warmup=0, bytes=size)
    assert result["total_bytes"] == size
    assert result["right"] is True


def test_keys_are_typed_alone_and_beside_bulk(load: Generator, target: Target) -> None:
    result = load.run(
        "keys", target.address, seconds=0.3, warmup=0.05, idle=0.2, every_us=2000, up=1, down=2, bytes=3_000_000
    )
    assert (result["idle"]["count"], result["busy"]["count"]) == (80, 150), "each key counts, however late its echo"
    assert [one["total_bytes"] for one in (*result["up"], *result["down"])] == [3_000_000] * 3
    assert all(one["right"] for one in (*result["up"], *result["down"]))


def test_a_key_that_comes_back_changed_is_a_failure(load: Generator, target: Target) -> None:
    meddler = Meddler(target.address, "change")
    try:
        with pytest.raises(LoadFailed, match="an echo came back changed"):
            load.run("keys", meddler.address, seconds=10, warmup=0, every_us=1000, size=1000)
    finally:
        meddler.close()


class Meddler:
    """A proxy that changes, drops or cuts what the target says."""

    def __init__(self, to: Address, meddle: str) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._run, args=(to, meddle))
        self._thread.start()

    def _run(self, to: Address, meddle: str) -> None:
        near, _ = self._server.accept()
        with near, socket.create_connection(to) as far:
            up = threading.Thread(target=self._up, args=(near, far))
            up.start()
            passed = 0
            while data := far.recv(65536):
                if passed <= 20_000 < passed + len(data):
                    at = 20_000 - passed
                    if meddle == "change":
                        data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                    elif meddle == "drop":
                        data = data[:at] + data[at + 1 :]
                    else:
                        near.sendall(data[:at])
                        break
                passed += len(data)
                try:
                    near.sendall(data)
                except OSError:
                    break
            for sock in (near, far):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # its peer has gone already
            up.join()

    @staticmethod
    def _up(near: socket.socket, far: socket.socket) -> None:
        try:
            while data := near.recv(65536):
                far.sendall(data)
            far.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # ended by the other direction

    def close(self) -> None:
        self._thread.join()
        self._server.close()


@pytest.mark.parametrize(
    ("meddle", "says"),
    [("change", "the first wrong one at 20000"), ("drop", "the first wrong one at 2"), ("cut", "without its trailer")],
)
def test_what_was_changed_lost_or_cut_is_a_failure(load: Generator, target: Target, meddle: str, says: str) -> None:
    meddler = Meddler(target.address, meddle)
    try:
        with pytest.raises(LoadFailed, match=says):
            load.run("down", meddler.address, seconds=10, warmup=0, bytes=400_000)
    finally:
        meddler.close()
