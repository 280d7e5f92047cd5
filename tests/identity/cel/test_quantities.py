"""Quantities of Kubernetes."""

from __future__ import annotations

from fractions import Fraction

import pytest

from arcbridge.identity.cel.quantities import add, as_double, as_integer, read_quantity
from arcbridge.identity.cel.values import INT_MAX, EvaluationError
from tests.identity.cel.calls import called
from tests.identity.cel.stopwatch import LENGTH, seconds

NUMBERS = [
    ("0", Fraction(0)), ("1k", Fraction(1000)), ("-1.5Gi", Fraction(-3 * 2**29)), ("100m", Fraction(1, 10)),
    ("1e3", Fraction(1000)), ("1E3", Fraction(1000)), ("1E", Fraction(10**18)), (".5", Fraction(1, 2)),
    ("1.", Fraction(1)), ("+3n", Fraction(3, 10**9)), ("0.1n", Fraction(1, 10**9)), ("16Ei", Fraction(INT_MAX)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), NUMBERS, ids=[row[0] for row in NUMBERS])
def test_quantities(text: str, number: Fraction) -> None:
    assert read_quantity(text).number == number


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "1ki", "1KB", "abc", "1e", "1e1000000000", "1" * 2000, "--1", "1.2.3"]
)
def test_no_quantity(text: str) -> None:
    with pytest.raises(EvaluationError):
        read_quantity(text)


def test_integers_are_those_of_64_bits_written_as_such() -> None:
    assert as_integer(read_quantity("1Mi")) == 1 << 20
    assert called("isInteger", read_quantity("50k"))
    for text in ("1.5", "1500m", "100E", "1.0"):
        assert not called("isInteger", read_quantity(text))
    assert as_double(read_quantity("1.5")) == 1.5


@pytest.mark.parametrize(("one", "other", "double"), [
    ("1Ki", "0.1", 1024.1000000000001), ("0.3", "0", 0.30000000000000004), ("0.0", "0.3", 0.30000000000000004),
    ("1e30", "0", 1e30), ("16Ei", "0", 9.223372036854775807e18), ("1234567890123456789012", "0", 1.234567890123457e21),
    ("0", "0", 0.0),
])  # fmt: skip
def test_a_double_is_as_approximate_as_in_kube_apiserver(one: str, other: str, double: float) -> None:
    assert as_double(add(1, read_quantity(one), read_quantity(other))) == double


def test_arithmetic() -> None:
    half = read_quantity("500m")
    assert called("compareTo", add(1, half, half), read_quantity("1")) == 0
    assert add(-1, read_quantity("1k"), 1).number == 999
    with pytest.raises(EvaluationError):
        called("add", half, 0.5)


@pytest.mark.parametrize("text", ["1" * LENGTH + "x", "1" * 999 + "x", "1" * 499 + "." + "1" * 499 + "x"])
def test_t41_a_long_quantity_is_refused_in_linear_time(text: str) -> None:
    assert seconds(lambda one: [called("isQuantity", one) for _ in range(20)], text) < 0.1
