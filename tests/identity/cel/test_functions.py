"""Functions, where the table of expressions does not reach: `tests/identity/cel/test_evaluation.py`."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.functions import FUNCTIONS, TYPES
from arcbridge.identity.cel.values import INT_MIN, EvaluationError, LimitExceeded, Map, UInt, Value
from tests.identity.cel.calls import called


@pytest.mark.parametrize("name", sorted({name for name, count in FUNCTIONS if count == 1}))
def test_no_function_fails_otherwise_than_by_its_errors(name: str) -> None:
    """A claim may be anything; whatever it is, a function answers or refuses."""
    odd: list[Value] = [None, True, -1, 0, UInt(3), 2.5, float("nan"), float("inf"), "", "a", "é\ufffd", b"\xff"]
    odd += [[], [None, 1], ["a", "b"], Map.of({}), Map.of({"a": [1]}), *TYPES.values()]
    for value in odd:
        assert FUNCTIONS[name, 1].cost(value) >= 0
        try:
            FUNCTIONS[name, 1].call(value)
        except (EvaluationError, LimitExceeded):
            continue


def test_integers_are_of_64_bits() -> None:
    for left, right in ((2**63 - 1, 1), (INT_MIN, -1)):
        with pytest.raises(EvaluationError, match="overflow"):
            called("_+_", left, right)
    with pytest.raises(EvaluationError, match="overflow"):
        called("_/_", INT_MIN, -1)
    with pytest.raises(EvaluationError, match="overflow"):
        called("_%_", INT_MIN, -1)
    assert (called("_/_", -5, 2), called("_%_", -5, 2), called("_%_", UInt(5), UInt(3))) == (-2, -1, 2)


def test_a_division_of_doubles_has_no_error() -> None:
    assert called("_/_", 1.0, 0.0) == float("inf")
    assert called("_/_", 1.0, -0.0) == float("-inf")
    assert called("_/_", 0.0, 0.0) != called("_/_", 0.0, 0.0)


def test_numbers_of_different_types_are_not_added() -> None:
    for left, right in ((1, 1.0), (1, UInt(1)), (True, 1), ("a", 1), ([], "a")):
        with pytest.raises(EvaluationError, match="no such overload"):
            called("_+_", left, right)


def test_what_a_bool_is_read_from() -> None:
    assert called("bool", "TRUE") is True
    with pytest.raises(EvaluationError):
        called("bool", "tRue")
