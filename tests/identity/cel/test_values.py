"""Equality, order, keys, escaped names and memory of values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.identity.cel.addresses import query_of, read_url
from arcbridge.identity.cel.quantities import read_quantity
from arcbridge.identity.cel.values import (
    NONE,
    ClaimList,
    Claims,
    Duration,
    EvaluationError,
    LimitExceeded,
    Map,
    Memory,
    Optional,
    StringList,
    Timestamp,
    UInt,
    Value,
    compare,
    equal,
    from_json,
    is_zero,
    measure,
    size,
    type_name,
    unescaped,
)
from arcbridge.identity.cel.versions import read_version

ESCAPED = [
    ("a__dot__b", "a.b"), ("my__dash__claim", "my-claim"), ("a__slash__b", "a/b"), ("a__underscores__b", "a__b"),
    ("__in__", "in"), ("plain_name", "plain_name"), ("__nothing__", None), ("x__in__", None), ("a__b", "a__b"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "plain"), ESCAPED, ids=[row[0] for row in ESCAPED])
def test_escaped_names(name: str, plain: str | None) -> None:
    assert unescaped(name) == plain


def test_numbers_are_equal_across_types_and_nothing_else_is() -> None:
    assert equal(1, 1.0)
    assert equal(UInt(1), 1)
    for left, right in ((1, True), (0, False), ("1", 1), (b"a", "a"), ([], Map.of({})), (None, 0), (NONE, None)):
        assert not equal(left, right)
        assert not equal(right, left)
    assert not equal(float("nan"), float("nan"))
    assert equal(Timestamp(5, 3600), Timestamp(5))
    assert not equal(Duration(5), Timestamp(5))
    assert equal(Optional([1]), Optional([1.0]))


BIG = 1234567890123456789
"""A number that no double holds: the nearest one is 21 less."""


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: Map.of({"a": x}), Optional])
@pytest.mark.parametrize("kind", [int, UInt])
def test_t62_an_integer_is_compared_with_a_double_as_a_double(kind: type[int], wrap: Any) -> None:
    claim = from_json(BIG)
    assert equal(wrap(claim), wrap(kind(BIG)))
    assert equal(wrap(kind(BIG)), wrap(claim))
    assert compare(claim, kind(BIG)) == compare(kind(BIG), claim) == 0
    assert compare(claim, kind(BIG + 1000)) == -1
    assert not equal(wrap(kind(BIG)), wrap(kind(BIG + 1))), "two integers are compared exactly"
    assert compare(UInt(BIG), BIG + 1) == -1
    assert claim not in Map({BIG: (BIG, 1)}), "keys are looked up exactly, as in kube-apiserver"


def test_keys_of_different_types() -> None:
    table = Map({1: (1, "int"), ("bool", True): (True, "bool"), "1": ("1", "string")})
    assert [table.find(key)[1] for key in (1, 1.0, UInt(1), True, "1")] == ["int", "int", "int", "bool", "string"]
    assert table.find(1.5) == (False, None)
    # What cannot be a key is not there, and cannot be put there.
    assert table.find(None) == (False, None)
    assert [1] not in table
    with pytest.raises(EvaluationError, match="unsupported key"):
        table.with_entry(None, 1)


@pytest.mark.parametrize(("left", "right"), [(1, "a"), (None, None), ([1], [1]), (True, 1), (Duration(1), 1)])
def test_what_has_no_order(left: Any, right: Any) -> None:
    with pytest.raises(EvaluationError):
        compare(left, right)


def test_order() -> None:
    assert compare("é", "z") == 1
    assert compare("\ue000", "\U00010000") == -1, "by code points, which is by bytes of UTF-8"
    assert compare(1, 1.5) == -1
    assert compare(True, False) == 1
    assert compare(b"a", b"a") == 0
    with pytest.raises(EvaluationError, match="NaN"):
        compare(1, float("nan"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_whatever_a_claim_is_it_is_a_value_that_equals_itself(document: Any) -> None:
    try:
        value = from_json(document)
    except EvaluationError:
        return
    assert equal(value, from_json(document))
    assert size(value) >= 0
    assert type_name(value)


def test_half_a_character_of_a_claim() -> None:
    assert from_json("a\ud800") == "a\ufffd"
    with pytest.raises(EvaluationError, match="too large"):
        from_json(10**400)


def test_what_counts_for_nothing() -> None:
    assert all(map(is_zero, [None, False, 0, 0.0, "", b"", [], Map.of({}), Duration(0)]))
    assert not any(map(is_zero, [True, 1, "a", [0], Timestamp(0), ClaimList(), from_json({})]))


def test_claims_can_do_less_than_a_map() -> None:
    claims = Claims.from_json({"a.b": 1})
    assert claims.find("a__dot__b") == claims.find("a.b") == (True, 1.0)
    assert claims.find("__nope__") == (False, None)
    assert list(claims.walk()) == [1.0]
    assert equal(claims, claims)
    for wrong in (lambda: claims.find(1), lambda: equal(claims, Map.of({}))):
        with pytest.raises(EvaluationError):
            wrong()


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
