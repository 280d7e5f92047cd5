"""The frame table is consistent with itself and with docs/protocol.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arcbridge.errors import LocalProtocolError
from arcbridge.wire.frames import (
    FRAMES,
    HANDSHAKE,
    HEADER_SIZE,
    IGNORABLE_FROM,
    MAX_IGNORABLE,
    MAY_SEND,
    FrameType,
    From,
    frame,
    pack_header,
    record_frame,
    unpack_header,
)
from arcbridge.wire.records import Auth, Open

PROTOCOL = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"


def rows() -> list[list[str]]:
    """Cells of the page's table of frames."""
    lines = PROTOCOL.read_text(encoding="utf-8").splitlines()
    at = lines.index("| type | name | body | least | largest | stream id | who |") + 2
    table = []
    while lines[at].startswith("|"):
        table.append([cell.strip() for cell in lines[at].strip("|").split("|")])
        at += 1
    return table


def size(text: str) -> int:
    """Bytes of `4` or `68 KiB`."""
    number, _, unit = text.partition(" ")
    assert unit in ("", "KiB"), text
    return int(number) * (1024 if unit else 1)


def test_every_type_has_its_row() -> None:
    assert set(FRAMES) == set(FrameType)
    assert set(MAY_SEND) == set(From)
    assert {kind for kind in FrameType if kind >= IGNORABLE_FROM} == {
        FrameType.MOVE,
        FrameType.QUIET,
        FrameType.REVOKE,
        FrameType.LEDGER,
        FrameType.SUCCESSION,
    }
    assert {FrameType.HELLO, FrameType.AUTH, FrameType.AUTH_OK, FrameType.GOAWAY} == HANDSHAKE


@pytest.mark.parametrize("kind", list(FrameType))
def test_sizes_are_those_of_the_fields(kind: FrameType) -> None:
    layout = FRAMES[kind]
    assert 0 <= layout.smallest <= layout.largest < 2**24
    if kind >= IGNORABLE_FROM:
        assert layout.largest <= MAX_IGNORABLE, "an end that does not know the type must be able to skip it"
    bits = [int(found) for found in re.findall(r"\bu(\d+)\b", layout.body)]
    if bits:
        assert layout.smallest == layout.largest == sum(bits) // 8
    else:
        assert layout.smallest == 0
        assert (layout.largest == 0) is (layout.body == "empty")


def test_the_page_has_the_same_table() -> None:
    page = {int(number): cells for number, *cells in rows()}
    assert list(page) == [int(kind) for kind in FRAMES], "same types in the same order"
    for kind, layout in FRAMES.items():
        name, body, least, largest, stream_id, who = page[kind]
        assert name == FrameType(kind).name
        assert body == layout.body
        assert (size(least), size(largest)) == (layout.smallest, layout.largest), name
        assert stream_id == layout.stream_id.value, name
        assert who == layout.sender.value, name


@pytest.mark.parametrize("kind", list(FrameType))
def test_header_layout(kind: FrameType) -> None:
    raw = frame(kind, 0x01020304, b"abc")
    assert raw == bytes((0, 0, 3, kind, 1, 2, 3, 4)) + b"abc"
    assert len(raw) == HEADER_SIZE + 3
    assert unpack_header(raw) == (3 << 8 | kind, 0x01020304)


def test_largest_numbers_fit_the_header() -> None:
    assert unpack_header(pack_header((2**24 - 1) << 8 | 255, 2**32 - 1)) == (2**32 - 1, 2**32 - 1)


def test_a_record_that_the_peer_would_refuse_is_our_callers_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="OPEN of 2004 bytes, more than 1024"):
        record_frame(FrameType.OPEN, Open("t" * 2000), 1)
    with pytest.raises(LocalProtocolError) as caught:
        record_frame(FrameType.AUTH, Auth("oidc", "canary" * 20_000))
    assert "canary" not in str(caught.value)
    whole = record_frame(FrameType.OPEN, Open("t" * 1000), 1)
    assert len(whole) - HEADER_SIZE <= FRAMES[FrameType.OPEN].largest
