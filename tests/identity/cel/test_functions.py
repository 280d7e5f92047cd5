"""Functions and their costs, where the table of expressions does not reach: `tests/identity/cel/test_evaluation.py`."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.functions import FUNCTIONS, TYPES, add, divide, remainder, to_bool
from arcbridge.identity.cel.values import INT_MIN, EvaluationError, LimitExceeded, Map, UInt, Value


def cost(name: str, *values: Value) -> int:
    return FUNCTIONS[name, len(values)].cost(*values)


# What a call costs must grow with what it does: name, arguments, and at least so much.
GROWING = [
    ("lists.range", (10**9,), 10**9),
    ("matches", ("a" * 1000, "b" * 100), 2500),
    ("contains", ("a" * 1000, "b" * 100), 1000),
    ("_==_", ([["a"] * 100] * 100, [["a"] * 100] * 100), 5000),
    ("@in", (["a"], [["a"] * 100] * 100), 5000),
    ("distinct", ([[1] * 100] * 100,), 500_000),
    ("sets.contains", ([[1] * 100] * 100, [[1]] * 100), 500_000),
    ("format", ("%s", [["a" * 1000] * 100]), 10_000),
    ("join", (["a" * 1000] * 100, ","), 20_000),
    ("_+_", ([1] * 5000, [1] * 5000), 200),
    ("_+_", ("a" * 1000, "b" * 1000), 200),
    ("indexOf", (["a" * 1000] * 10, "b"), 1000),
    ("sort", ([1] * 1000,), 20_000),
    ("_==_", (Map.of({"a": ["b"] * 100}), Map.of({})), 50),
]


@pytest.mark.parametrize(("name", "values", "least"), GROWING, ids=range(len(GROWING)))
def test_costs_grow(name: str, values: tuple[Value, ...], least: int) -> None:
    assert cost(name, *values) >= least


def test_sorting_a_thousand_groups_is_no_reason_to_refuse() -> None:
    assert cost("sort", [f"g{n}" for n in range(1000)]) < 100_000


@pytest.mark.parametrize("name", sorted({name for name, count in FUNCTIONS if count == 1}))
def test_no_function_fails_otherwise_than_by_its_errors(name: str) -> None:
    """A claim may be anything; whatever it is, a function answers or refuses."""
    odd: list[Value] = [None, True, -1, 0, UInt(3), 2.5, float("nan"), float("inf"), "", "a", "é\ufffd", b"\xff"]
    odd += [[], [None, 1], ["a", "b"], Map.of({}), Map.of({"a": [1]}), *TYPES.values()]
    for value in odd:
        assert cost(name, value) >= 0
        try:
            FUNCTIONS[name, 1].call(value)
        except (EvaluationError, LimitExceeded):
            continue


def test_integers_are_of_64_bits() -> None:
    for left, right in ((2**63 - 1, 1), (INT_MIN, -1)):
        with pytest.raises(EvaluationError, match="overflow"):
            add(left, right)
    with pytest.raises(EvaluationError, match="overflow"):
        divide(INT_MIN, -1)
    with pytest.raises(EvaluationError, match="overflow"):
        remainder(INT_MIN, -1)
    assert (divide(-5, 2), remainder(-5, 2), remainder(UInt(5), UInt(3))) == (-2, -1, 2)


def test_a_division_of_doubles_has_no_error() -> None:
    assert divide(1.0, 0.0) == float("inf")
    assert divide(1.0, -0.0) == float("-inf")
    assert divide(0.0, 0.0) != divide(0.0, 0.0)


def test_numbers_of_different_types_are_not_added() -> None:
    for left, right in ((1, 1.0), (1, UInt(1)), (True, 1), ("a", 1), ([], "a")):
        with pytest.raises(EvaluationError, match="no such overload"):
            add(left, right)


def test_what_a_bool_is_read_from() -> None:
    assert to_bool("TRUE") is True
    with pytest.raises(EvaluationError):
        to_bool("tRue")
