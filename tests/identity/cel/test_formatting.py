"""`format`, clause by clause."""

from __future__ import annotations

import pytest

from arcbridge.identity.cel.formatting import MAX_PRECISION, clauses, format_values
from arcbridge.identity.cel.timestamps import read_timestamp
from arcbridge.identity.cel.values import Duration, EvaluationError, LimitExceeded, Map, TypeValue, UInt, Value

GOOD: list[tuple[str, list[Value], str]] = [
    ("%s", ["a"], "a"), ("%s %d%%", [True, 5], "true 5%"), ("%s", [None], "null"), ("%s", [1.5], "1.5"),
    ("%s", [[1.5, "a", None, True, b"b"]], '[1.500000, "a", null, true, b"b"]'),
    ("%s", [Map.of({"b": 1, "a": ["x"]})], '{"a":["x"], "b":1}'),
    ("%s", [[Duration(1_500_000_000)]], '[duration("1.5s")]'),
    ("%s", [[read_timestamp("2024-01-01T00:00:00Z")]], '[timestamp("2024-01-01T00:00:00Z")]'),
    ("%s", [TypeValue("int")], "int"), ("%s", [[float("inf")]], '["+Inf"]'), ("%.2f", [1234567.891], "1,234,567.89"),
    ("%f", ["NaN"], "NaN"), ("%f", ["-Infinity"], "-∞"), ("%.1e", [0.00012], "1.200000×10⁻⁰⁴"),
    ("%.15e|%.3e|%.1e", [-1.5, float("inf"), float("-inf")], " -1.500000×10⁰⁰|  ∞|-∞"),
    ("%f %.0f %e %.0f", [-0.0, -0.0, -0.0, -0.4], "0.000000 0 0.000000×10⁰⁰ -0"),
    ("%b %b %o %x %X", [True, -5, 8, 255, UInt(171)], "1 -101 10 ff AB"), ("%x %X", ["é", b"\xab"], "c3a9 AB"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "values", "written"), GOOD, ids=range(len(GOOD)))
def test_what_is_written(text: str, values: list[Value], written: str) -> None:
    assert format_values(text, values) == written


BAD: list[tuple[str, list[Value]]] = [
    ("%d", [1.0]), ("%f", [1]), ("%e", ["a"]), ("%b", ["a"]), ("%o", [True]), ("%x", [1.5]), ("%s", [b"\xff"]),
    ("%s", []), ("%", ["a"]), ("%.", ["a"]), ("%.f", [1.0]), ("%q", ["a"]), ("%s", [Map({1.5: (1.5, 1)})]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "values"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_written(text: str, values: list[Value]) -> None:
    with pytest.raises(EvaluationError):
        format_values(text, values)


def test_the_length_is_bounded() -> None:
    with pytest.raises(EvaluationError, match="precision"):
        list(clauses(f"%.{MAX_PRECISION + 1}f"))
    with pytest.raises(LimitExceeded):
        format_values("%s" * 30, ["x" * 50_000] * 30)
