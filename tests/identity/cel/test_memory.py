"""The memory of the values that expressions make: each kind is counted, and the sum is bounded."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.addresses import query_of, read_url
from arcbridge.identity.cel.memory import Memory, measure
from arcbridge.identity.cel.quantities import read_quantity
from arcbridge.identity.cel.values import LimitExceeded, Map, Optional, StringList, Value
from arcbridge.identity.cel.versions import read_version

LARGE = [
    ("a string", "x" * 10_000, 10_000), ("a string of wide characters", "😀" * 2_500, 10_000),
    ("bytes", b"x" * 10_000, 10_000), ("a list", list(range(1000)), 36_000),
    ("strings", StringList(["x" * 100] * 100), 10_000), ("a map", Map.of({str(n): n for n in range(100)}), 10_000),
    ("a query", query_of(read_url("/?" + "&".join(f"a{n}=b" for n in range(100)))), 15_000),
    ("a URL", read_url("/" + "x" * 5_000), 10_000),
    ("a version", read_version("1.0.0-" + ".".join(["a"] * 1000)), 40_000),
    ("a quantity", read_quantity("1e1000"), 400),
]  # fmt: skip


@pytest.mark.parametrize(("value", "least"), [row[1:] for row in LARGE], ids=[row[0] for row in LARGE])
def test_the_size_of_a_value(value: Value, least: int) -> None:
    assert least <= measure(value) <= 4 * least


@pytest.mark.parametrize("value", [None, True, 1, 1.0])
def test_small_values_are_not_counted(value: Value) -> None:
    Memory(0).take(value)


def test_the_sum_is_bounded() -> None:
    memory = Memory(3_000)
    memory.take("x" * 1_000)
    memory.take(Optional("y"))
    memory.spend(1_000)
    with pytest.raises(LimitExceeded) as caught:
        memory.take("x" * 1_000)
    assert caught.value.permanent
