"""Typed records: round trip, later versions, broken input, no secrets."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import RemoteProtocolError
from arcbridge.wire import records
from arcbridge.wire.records import Auth, AuthOk, Dial, Goaway, Hello, JoinRequest, Open, Record, Restrictions, Status
from tests.support import pages

ALL: list[type[Record]] = [
    kind
    for kind in vars(records).values()
    if isinstance(kind, type) and issubclass(kind, Record) and kind is not Record
]
PROTOCOL = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"


def test_the_page_has_the_same_records() -> None:
    """docs/protocol.md names every record with all of its tags, in the order of the module."""
    section = pages.read(PROTOCOL).partition("\n## 4. ")[2].partition("\n## ")[0]
    page = dict(re.findall(r"^\| ([A-Z]\w+) \| (.+) \|$", section, re.MULTILINE))
    assert list(page) == [record.__name__ for record in ALL]
    for record in ALL:
        tags = re.findall(r"(?:^|, )(\d+) (\w+)", re.sub(r"\([^)]*\)", "", page[record.__name__]))
        names = [field.name for field in fields(record)]
        assert [int(tag) for tag, _ in tags] == list(range(1, len(names) + 1))
        # An older peer reads a field by its number: none changes its place.
        assert [name for _, name in tags] == names, record.__name__


def field(tag: int, value: bytes) -> bytes:
    return bytes((tag,)) + len(value).to_bytes(3, "big") + value


@st.composite
def any_record(draw: st.DrawFn) -> Record:
    cls = draw(st.sampled_from(ALL))
    values: dict[str, object] = {}
    for spec in fields(cls):
        if isinstance(spec.default, bool):
            values[spec.name] = draw(st.booleans())
        elif isinstance(spec.default, int):
            values[spec.name] = draw(st.integers(0, 2**64 - 1))
        elif isinstance(spec.default, bytes):
            values[spec.name] = draw(st.binary(max_size=80))
        else:
            values[spec.name] = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
    return cls(**values)


@given(any_record())
def test_round_trip(record: Record) -> None:
    assert type(record).decode(record.encode()) == record
    assert type(record).decode(memoryview(record.encode())) == record


@pytest.mark.parametrize("cls", ALL)
def test_unknown_tags_are_skipped(cls: type[Record]) -> None:
    if not cls.strict:
        assert cls.decode(field(200, b"from a later version")) == cls()
        return
    assert cls is Restrictions, "what takes rights away; all others have to be readable by older peers"
    with pytest.raises(RemoteProtocolError, match="field 200 of a Restrictions record is not known"):
        cls.decode(field(200, b"from a later version"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\x01", "field's header"),
        (b"\x01\0\0", "field's header"),
        (b"\x01\0\0\x05abc", "inside field 1"),
        (b"\x01\xff\xff\xffabc", "inside field 1"),
        (field(1, b"a") * 2, "twice"),
        (field(99, b"a") * 2, "twice"),
        (field(1, b"\xff\xfe"), "UTF-8"),
    ],
)
def test_broken_records(body: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        Open.decode(body)


def test_an_integer_has_at_most_eight_bytes() -> None:
    assert Goaway.decode(field(1, b"\xff" * 8)).last_stream == 2**64 - 1
    with pytest.raises(RemoteProtocolError, match="8 bytes"):
        Goaway.decode(field(1, b"\0" * 9))


def test_errors_quote_nothing_of_the_input() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        Auth.decode(field(2, b"canary-token\xff"))
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        Hello(session_id=b"id", resume_secret=b"canary", cluster_ca="canary"),
        Auth("oidc", "canary"),
        Auth("oidc", "t", "canary"),
        AuthOk(b"id", b"canary", "jane", 1),
        Dial(token="canary"),
        Status(token="canary"),
        JoinRequest(token="canary"),
        JoinRequest(proof="canary"),
    ],
)
def test_secrets_do_not_show(record: Record) -> None:
    assert "canary" not in repr(record)
    assert "canary" not in f"{record}"
    assert b"canary".hex() not in repr(record)
