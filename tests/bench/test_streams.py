"""Many connections at once: every level is measured, every byte compared, and a level that is not reached is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.address import Address
from bench.load.build import NoCompiler, build
from bench.load.generator import Generator, LoadFailed
from bench.peers.base import Peer
from bench.scenarios.base import Effort
from bench.scenarios.streams import SOURCE, Many, Streams
from tests.support.processes import require_or_skip

EFFORT = Effort(seconds=0.5, warmup=0.1)


@pytest.fixture(scope="module")
def load() -> Generator:
    try:
        build(SOURCE)
        return Generator()
    except NoCompiler as error:
        require_or_skip("compiler", str(error))


@pytest.fixture(scope="module")
def target(load: Generator) -> Iterator[Address]:
    with load.target() as target:
        yield target.address


class Straight(Peer):
    """A peer without a system in between: the load connects to the target."""

    name = "straight"

    def __init__(self, endpoint: Address) -> None:
        super().__init__()
        self.endpoint = endpoint

    def start(self, target: Address, directory: Path) -> None: ...

    def stop(self) -> None: ...

    def roots(self) -> dict[str, int]:
        return {}


def relay_to(target: Address, *, most: int = 1000, change: str = "") -> socket.socket:
    """Passes so many connections on, one thread per direction, and ends all others; `change` what goes up or down."""
    listening = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, sink: socket.socket, changes: bool) -> None:
        seen = 0
        while data := source.recv(65536):
            # Not the first bytes, which say what the connection is for; and one byte alone, because the last ones say
            # that it is over: where they begin a read and are changed, the other end waits for them.
            if changes and seen > 5_000:
                data, changes = bytes([data[0] ^ 1]) + data[1:], False
            seen += len(data)
            sink.sendall(data)

    def serve() -> None:
        for number in range(10**6):
            try:
                near, _ = listening.accept()
            except OSError:
                return
            if number >= most:
                near.close()
                continue
            far = socket.create_connection(target)
            for pair in ((near, far, change == "up"), (far, near, change == "down")):
                threading.Thread(target=_quietly(pass_on), args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listening


def _quietly(work: Callable[..., None]) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        try:
            work(*arguments)
        except OSError:
            pass

    return run


def test_each_level_is_measured(load: Generator, target: Address) -> None:
    scenario = Streams()
    scenario.levels = (1, 30)
    metrics = scenario.measure(load, Straight(target), EFFORT)
    for level in scenario.levels:
        for name in ("p50_us", "p99_us", "per_s", "mb_per_s", "open_per_s"):
            assert metrics[f"n{level}_{name}"] > 0
    assert not any(name.endswith("failed") for name in metrics)


def test_a_level_that_is_not_reached_is_told_and_those_above_it_too(load: Generator, target: Address) -> None:
    scenario = Streams()
    scenario.levels = (1, 8, 9)
    with relay_to(target, most=5) as listening:
        metrics = scenario.measure(load, Straight(Address(*listening.getsockname()[:2])), EFFORT)
    assert metrics["n1_per_s"] > 0
    assert metrics["n8_failed"] == metrics["n9_failed"] == 1.0
    assert "n8_per_s" not in metrics


@pytest.mark.parametrize(("change", "phase"), [("down", "echo 0.5 0"), ("up", "bulk 1000000")])
def test_a_changed_byte_is_found(target: Address, change: str, phase: str) -> None:
    with (
        relay_to(target, change=change) as listening,
        Many(build(SOURCE), Address(*listening.getsockname()[:2]), 2) as many,
        pytest.raises(LoadFailed, match="changed"),
    ):
        many.ask(phase)
