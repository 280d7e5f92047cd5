"""The load generator's own honesty: it counts right, and it notices wrong bytes."""

from __future__ import annotations

import pytest

from bench.address import Address
from bench.load.generator import Generator, LoadFailed, Target
from tests.support.fault_proxy import FaultProxy, Plan


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


@pytest.mark.parametrize(
    ("command", "plan", "says"),
    [
        ("keys", Plan(flip_down=20_000), "an echo came back changed"),
        ("down", Plan(flip_down=20_000), "the first wrong one at 20000"),
        ("down", Plan(cut_down=20_000, how="fin"), "without its trailer"),
    ],
)
def test_what_was_changed_or_cut_is_a_failure(
    load: Generator, target: Target, command: str, plan: Plan, says: str
) -> None:
    more = {"every_us": 1000, "size": 1000} if command == "keys" else {"bytes": 400_000}
    with FaultProxy(target.address, plan=lambda number: plan) as proxy, pytest.raises(LoadFailed, match=says):
        load.run(command, Address(proxy.host, proxy.port), seconds=10, warmup=0, **more)
