"""The chain: each line names the hash of the one before, and is taken apart as it was sealed."""

from __future__ import annotations

import hashlib
import json

from hypothesis import given
from hypothesis import strategies as st

from arcbridge.audit.chain import NONE, Chain, Head, find_sealed, read_line


def test_each_line_names_the_one_before() -> None:
    chain = Chain()
    lines = [chain.begin("started", "agent-1", None), chain.seal('{"a":1}'), chain.seal('{"a":2}')]
    previous = NONE
    for number, line in enumerate(lines):
        fields = json.loads(line)
        assert (fields["chain"], fields["seq"], fields["prev"]) == (chain.id, number, previous)
        previous = hashlib.sha256(line).hexdigest()
        sealed = read_line(line)
        assert sealed is not None
        assert sealed.head == Head(chain.id, number, previous)
        assert sealed.fields == fields
    assert chain.head == Head(chain.id, 2, previous)
    assert json.loads(lines[0])["cause"] == "started"
    assert "after" not in json.loads(lines[0])
    assert Chain().id != chain.id


def test_a_chain_begins_behind_another() -> None:
    before = Head("0123456789abcdef", 7, "ab" * 32)
    fields = json.loads(Chain().begin("rotated", "", before, torn=3))
    assert (fields["prev"], fields["after"], fields["torn"]) == ("ab" * 32, "0123456789abcdef/7", 3)
    fields = json.loads(Chain().begin("started", "", Head("", -1, "cd" * 32)))
    assert fields["prev"] == "cd" * 32
    assert "after" not in fields


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=50))
def test_what_is_sealed_is_read(text: str) -> None:
    line = Chain().seal(json.dumps({"text": text}, ensure_ascii=False))
    sealed = read_line(line)
    assert sealed is not None
    assert sealed.fields["text"] == text
    assert read_line(line[:-1]) is None
    assert read_line(line + b"x") is None


def test_lines_that_are_none() -> None:
    for text in (
        b"",
        b"{}",
        b'{"chain":"x"}',
        b"[1]",
        b'{"chain":"0123456789abcdef","seq":1,"prev":"00",}',
        b"\xff\xfe",
    ):
        assert read_line(text) is None


def test_a_collector_may_write_before_a_record() -> None:
    line = Chain().seal('{"a":1}')
    assert find_sealed(b"2026-11-25T10:00:00Z stdout F " + line) == 30
    assert find_sealed(b"no record") == -1
