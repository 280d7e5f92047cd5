"""Scenarios with a real load and no proxy: what is measured, every byte compared, and what is not reached is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.address import Address
from bench.load.build import build
from bench.load.generator import Generator, LoadFailed, Target
from bench.peers.base import Peer
from bench.scenarios import transfer
from bench.scenarios.base import Effort
from bench.scenarios.streams import SOURCE, Many, Streams
from tests.support.fault_proxy import FaultProxy, Plan

EFFORT = Effort(seconds=0.5, warmup=0.1)


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


def test_each_level_is_measured(load: Generator, target: Target) -> None:
    scenario = Streams()
    scenario.levels = (1, 30)
    metrics = scenario.measure(load, Straight(target.address), EFFORT)
    for level in scenario.levels:
        for name in ("p50_us", "p99_us", "per_s", "mb_per_s", "open_per_s"):
            assert metrics[f"n{level}_{name}"] > 0
    assert not any(name.endswith("failed") for name in metrics)


def test_a_level_that_is_not_reached_is_told_and_those_above_it_too(load: Generator, target: Target) -> None:
    scenario = Streams()
    scenario.levels = (1, 8, 9)
    with FaultProxy(target.address, plan=lambda number: Plan() if number < 5 else Plan(cut_up=0)) as proxy:
        metrics = scenario.measure(load, Straight(Address(proxy.host, proxy.port)), EFFORT)
    assert metrics["n1_per_s"] > 0
    assert metrics["n8_failed"] == metrics["n9_failed"] == 1.0
    assert "n8_per_s" not in metrics


@pytest.mark.parametrize(
    # Not the first bytes, which say what the connection is for.
    ("plan", "phase"),
    [(Plan(flip_down=6000), "echo 0.5 0"), (Plan(flip_up=6000), "bulk 1000000")],
)
def test_a_changed_byte_is_found(target: Target, plan: Plan, phase: str) -> None:
    with (
        FaultProxy(target.address, plan=lambda number: plan) as proxy,
        Many(build(SOURCE), Address(proxy.host, proxy.port), 2) as many,
        pytest.raises(LoadFailed, match="changed"),
    ):
        many.ask(phase)


def test_copies_of_each_size_each_way_and_many_streams(
    load: Generator, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "COPIES", {1: 3, 2: 1})
    monkeypatch.setattr(transfer, "STREAMS", (2, 5))
    monkeypatch.setattr(transfer, "BULK", 4_000_000)
    monkeypatch.setattr(transfer, "PAUSE", 0.0)
    metrics = transfer.Transfer().measure(load, Straight(target.address), Effort(1.0, 0.0))
    copies = {f"{way}_{size}mb_mb_per_s" for way in ("up", "down") for size in (1, 2)}
    assert set(metrics) == copies | {"streams2_mb_per_s", "streams5_mb_per_s"}
    assert all(value > 0 for value in metrics.values())
