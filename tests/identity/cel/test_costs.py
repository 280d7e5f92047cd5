"""Costs of calls, where the table of expressions does not reach: `tests/identity/cel/test_evaluation.py`."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.functions import _ROWS, FUNCTIONS, _overloads
from arcbridge.identity.cel.values import Map, Value


def cost(name: str, *values: Value) -> int:
    return FUNCTIONS[name, len(values)].cost(*values)


# What a call costs must grow with what it does: name, arguments, and at least so much.
GROWING = [
    ("lists.range", (10**9,), 10**9), ("matches", ("a" * 1000, "b" * 100), 2500),
    ("contains", ("a" * 1000, "b" * 100), 1000), ("_==_", ([["a"] * 100] * 100, [["a"] * 100] * 100), 5000),
    ("@in", (["a"], [["a"] * 100] * 100), 5000), ("distinct", ([[1] * 100] * 100,), 500_000),
    ("sets.contains", ([[1] * 100] * 100, [[1]] * 100), 500_000), ("format", ("%s", [["a" * 1000] * 100]), 10_000),
    ("join", (["a" * 1000] * 100, ","), 20_000), ("_+_", ([1] * 5000, [1] * 5000), 200),
    ("_+_", ("a" * 1000, "b" * 1000), 200), ("indexOf", (["a" * 1000] * 10, "b"), 1000),
    ("sort", ([1] * 1000,), 20_000), ("_==_", (Map.of({"a": ["b"] * 100}), Map.of({})), 50),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "least"), GROWING, ids=range(len(GROWING)))
def test_costs_grow(name: str, values: tuple[Value, ...], least: int) -> None:
    assert cost(name, *values) >= least


def test_sorting_a_thousand_groups_is_no_reason_to_refuse() -> None:
    assert cost("sort", [f"g{n}" for n in range(1000)]) < 100_000


def test_one_name_with_as_many_operands_has_one_cost() -> None:
    for cost, _, *signatures in _ROWS:
        for overload in (one for signature in signatures for one in _overloads(signature)):
            assert FUNCTIONS[overload.name, len(overload.operands)].cost is cost, overload
