"""What two parsers could read differently is refused, at any depth."""

from __future__ import annotations

import pytest

from arcbridge.identity.strict_json import parse_object


def test_an_object() -> None:
    assert parse_object(b'{"a": {"b": [1, null, "\xc3\xa4"]}}') == {"a": {"b": [1, None, "ä"]}}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 1}', "occurs twice"),
        (b'{"o": [{"a": 1, "\\u0061": 2}]}', "occurs twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "Infinity is not JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[]", "not an object"),
        (b"", "Expecting value"),
        (b'{"a": 1} {}', "Extra data"),
        (b'{"a": "\xff"}', "invalid start byte"),
        ('\ufeff{"a": 1}'.encode(), "Expecting value"),
    ],
    ids=["twice", "twice-escaped", "nan", "infinity", "deep", "array", "empty", "more", "latin-1", "byte-order-mark"],
)
def test_anything_else_is_a_value_error(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_object(data)
