"""Scalars go through as they were spelled."""

from __future__ import annotations

import pytest
import yaml

from arcbridge.client.kubeconfig.block_yaml import Plain, dump, is_empty, parse
from arcbridge.errors import StateError


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-01",
        "0123",
        "1:30",
        "yes",
        "off",
        "1_000",
        "~",
        "1e3",
        "0x1f",
        ".inf",
        "true",
        "3.10",
        "2024-05-06T07:08:09Z",
    ],
)
def test_plain_scalars_keep_their_spelling(text: str) -> None:
    assert dump(parse(f"a: {text}\n".encode(), "f")) == f"a: {text}\n"


@pytest.mark.parametrize(
    "text", ["yes", "0123", "2024-01-01", "null", "", "1:30", "- x", "a: b", "#", "x" * 500, "é\n"]
)
def test_strings_stay_strings(text: str) -> None:
    written = dump({"a": text})
    assert yaml.safe_load(written) == {"a": text}
    again = parse(written.encode(), "f")
    assert dump(again) == written


def test_order_and_structure() -> None:
    source = b"z: 1\na:\n- {x: 1, b: [2, 3]}\n- null\nm: &id {k: v}\nn: *id\n"
    assert yaml.safe_load(dump(parse(source, "f"))) == yaml.safe_load(source)
    assert list(parse(source, "f")) == ["z", "a", "m", "n"]


def test_json_is_yaml() -> None:
    assert parse(b'{"a": ["b", 3]}', "f") == {"a": ["b", "3"]}


def test_an_error_names_the_line_and_quotes_nothing() -> None:
    with pytest.raises(StateError) as caught:
        parse(b"a: SECRET\nb: [SECRET\n", "the/file")
    assert "SECRET" not in str(caught.value)
    assert "the/file, line " in caught.value.message
    assert caught.value.__cause__ is None


def test_nothing() -> None:
    assert is_empty(parse(b"", "f"))
    for text in (b"a:", b"a: ~", b"a: NULL"):
        assert is_empty(parse(text, "f")["a"])
    assert not is_empty(parse(b'a: "null"', "f")["a"])
    assert not is_empty(Plain("x"))
