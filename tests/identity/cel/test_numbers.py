"""Numbers as Go reads and writes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.identity.cel.numbers import read_double, read_int, read_uint, write_double
from arcbridge.identity.cel.values import EvaluationError
from tests.identity.cel.stopwatch import LENGTH, seconds

WRITTEN = [
    (5.0, "5"), (2.5, "2.5"), (-0.0, "-0"), (123456.0, "123456"), (1234567.0, "1.234567e+06"),
    (9007199254740992.0, "9.007199254740992e+15"), (1e21, "1e+21"), (0.0001, "0.0001"), (0.00001, "1e-05"),
    (0.000123, "0.000123"), (1e300, "1e+300"), (float("inf"), "+Inf"), (float("-inf"), "-Inf"), (float("nan"), "NaN"),
    (100.0, "100"), (10.25, "10.25"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "text"), WRITTEN, ids=[row[1] for row in WRITTEN])
def test_doubles_are_written(number: float, text: str) -> None:
    assert write_double(number) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_written_is_read_again(number: float) -> None:
    assert read_double(write_double(number)) == number


NO_NUMBERS = {
    read_int: ["", " 1", "1 ", "0x10", "1.0", "1_000", "٣", "9223372036854775808", "--1", "1" * 5000],
    read_uint: ["", "-1", "+1", "18446744073709551616"],
    read_double: ["", " 1", "1e", "e1", "1e400", "0x1", "1__0", "infinit", "-nan", "1,5", "٣"],
}


@pytest.mark.parametrize(("read", "text"), [(read, text) for read, texts in NO_NUMBERS.items() for text in texts])
def test_no_number(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(EvaluationError):
        read(text)


def test_unusual_doubles() -> None:
    assert read_double("0x1p4") == 16.0
    assert read_double("1_000.5") == 1000.5
    assert read_double("-Infinity") == float("-inf")
    assert read_double(".5") == 0.5


@pytest.mark.parametrize("text", ["1" * LENGTH + "x", "0x" + "1" * LENGTH + "x", "1" * LENGTH, "1_" * (LENGTH // 2)])
def test_t41_a_long_double_is_read_in_linear_time(text: str) -> None:
    assert seconds(read_double, text) < 0.5
