"""Copies of each size each way, each on a stream of its own, and one rate for many streams at once."""

from __future__ import annotations

import pytest

from bench.address import Address
from bench.load.build import NoCompiler
from bench.load.generator import Generator
from bench.peers.base import Peer
from bench.scenarios import transfer
from bench.scenarios.base import Effort
from tests.support.processes import require_or_skip


class Straight(Peer):
    """A peer that is the target itself."""

    name = "straight"
    encrypts = "nothing"
    tuned = "nothing"

    def start(self, target: Address, directory: object) -> None:
        self.endpoint = target

    def stop(self) -> None:
        pass

    def roots(self) -> dict[str, int]:
        return {}


def test_each_size_each_way_and_many_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "COPIES", {1: 3, 2: 1})
    monkeypatch.setattr(transfer, "STREAMS", (2, 5))
    monkeypatch.setattr(transfer, "BULK", 4_000_000)
    monkeypatch.setattr(transfer, "PAUSE", 0.0)
    try:
        load = Generator()
    except NoCompiler as error:
        require_or_skip("compiler", str(error))
    peer = Straight()
    with load.target() as target:
        peer.start(target.address, None)
        metrics = transfer.Transfer().measure(load, peer, Effort(1.0, 0.0))
    copies = {f"{way}_{size}mb_mb_per_s" for way in ("up", "down") for size in (1, 2)}
    assert set(metrics) == copies | {"streams2_mb_per_s", "streams5_mb_per_s"}
    assert all(value > 0 for value in metrics.values())
