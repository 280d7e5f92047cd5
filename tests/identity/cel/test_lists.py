"""Functions on lists, where the table of `test_evaluation` does not reach."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.identity.cel import lists
from arcbridge.identity.cel.values import NONE, Duration, EvaluationError, LimitExceeded, Optional, StringList, UInt
from tests.identity.cel.calls import called


@given(st.lists(st.integers(-5, 5) | st.floats(-5, 5)))
def test_sorting(values: list[float]) -> None:
    same = [float(value) for value in values]
    assert called("sort", same) == sorted(same)
    assert called("isSorted", called("sort", same))
    assert lists.distinct(same) == list(dict.fromkeys(same))


def test_a_list_made_of_bare_strings_is_a_plain_one() -> None:
    bare = StringList(["b", "a"])
    for made in (
        called("sort", bare),
        called("reverse", bare),
        lists.part(bare, 0, 1),
        lists.distinct(bare),
        lists.flatten(bare),
    ):
        assert type(made) is list


@pytest.mark.parametrize("values", [[1, "a"], [[1]], [None, None]])
def test_what_cannot_be_sorted(values: list[object]) -> None:
    with pytest.raises(EvaluationError):
        called("sort", values)


def test_sums() -> None:
    assert lists.total([1, 2]) == 3
    assert lists.total([UInt(1), UInt(2)], "uint") == UInt(3)
    assert lists.total([0.5, 1.0], "double") == 1.5
    assert lists.total([Duration(1), Duration(2)], "duration") == Duration(3)
    assert lists.total([], "double") == 0.0
    for values, kind in (([1, 2.0], "int"), ([2**62, 2**62], "int"), (["a"], "int"), ([1], "duration")):
        with pytest.raises(EvaluationError):
            lists.total(values, kind)


def test_extremes() -> None:
    assert lists.extreme(1, ["a", "c", "b"]) == "c"
    assert lists.extreme(-1, [2, 1.5, UInt(3)]) == 1.5
    for wrong in ([], [1, "a"], [None]):
        with pytest.raises(EvaluationError):
            lists.extreme(1, wrong)


def test_a_list_that_is_flattened_stays_bounded() -> None:
    assert lists.flatten([[1, [2]], [3]], 2) == [1, 2, 3]
    with pytest.raises(EvaluationError):
        lists.flatten([], -1)
    wide = [0] * 2000
    with pytest.raises(LimitExceeded):
        lists.flatten([wide] * 1000)


def test_optional_values() -> None:
    assert lists.unwrap([Optional(1), NONE]) == [1]
    assert called("first", []) is NONE
    assert called("last", [1, 2]).value == 2
    with pytest.raises(EvaluationError):
        lists.unwrap([1])


def test_sets() -> None:
    assert lists.sets_contain([1, 2.0], [UInt(2)])
    assert not lists.sets_contain([], [1])
    assert lists.sets_contain([], [])
    assert lists.sets_equivalent([1, 1], [1])
    assert not lists.sets_intersect([1], [2])
