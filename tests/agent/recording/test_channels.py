"""WebSocket frames are read along in any portions, and what could be read in two ways is not read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.agent.recording.channels import STDERR, STDOUT, ChannelReader, Unreadable

from .keys import frame

MASK = b"\x01\xfe\x80\x07"


class Taken:
    """What a reader gave, joined by channel in order."""

    def __init__(self, *, from_caller: bool = False) -> None:
        self.reader = ChannelReader(self._take, from_caller=from_caller)
        self.found: list[tuple[int, bytes]] = []

    def _take(self, channel: int, data: bytes) -> None:
        if self.found and self.found[-1][0] == channel:
            data = self.found.pop()[1] + data
        self.found.append((channel, data))

    def feed(self, data: bytes, sizes: Sequence[int] = ()) -> None:
        position = 0
        for size in sizes:
            self.reader.feed(memoryview(data)[position : position + size])
            position += size
        self.reader.feed(memoryview(data)[position:])


def joined(messages: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    wanted = Taken()
    for channel, data in messages:
        if data:
            wanted._take(channel, data)
    return wanted.found


MESSAGES = st.lists(st.tuples(st.integers(0, 4), st.binary(max_size=300)), max_size=6)
SIZES = st.lists(st.integers(0, 70), max_size=30)


@given(MESSAGES, SIZES)
def test_messages_of_the_api_server_in_any_portions(messages: list[tuple[int, bytes]], sizes: list[int]) -> None:
    taken = Taken()
    taken.feed(b"".join(frame(bytes([channel]) + data) for channel, data in messages), sizes)
    assert taken.found == joined(messages)


@given(MESSAGES, SIZES, st.binary(min_size=4, max_size=4))
def test_messages_of_a_caller_in_any_portions(messages: list[tuple[int, bytes]], sizes: list[int], mask: bytes) -> None:
    taken = Taken(from_caller=True)
    taken.feed(b"".join(frame(bytes([channel]) + data, mask=mask) for channel, data in messages), sizes)
    assert taken.found == joined(messages)


def test_a_message_in_several_frames_with_a_ping_between_them() -> None:
    taken = Taken()
    taken.feed(
        frame(b"\x01ab", final=False)
        + frame(b"ping", opcode=9)
        + frame(b"", opcode=0, final=False)
        + frame(b"\x02cd", opcode=0)
        + frame(b"\x02e")
    )
    assert taken.found == [(STDOUT, b"ab\x02cd"), (STDERR, b"e")]


def test_the_channel_may_come_in_a_later_frame_and_an_empty_message_has_none() -> None:
    taken = Taken()
    taken.feed(frame(b"", final=False) + frame(b"\x01a", opcode=0) + frame(b"") + frame(b"\x02b"))
    assert taken.found == [(STDOUT, b"a"), (STDERR, b"b")]


def test_large_frames_pass_and_only_a_head_is_kept() -> None:
    """The memory does not grow with what passes: two frames, the second a thousand times the first."""
    kept = []
    for size in (70_000, 70_000_000):
        count = 0

        def took(channel: int, data: bytes) -> None:
            nonlocal count
            count += len(data)

        reader = ChannelReader(took)
        reader.feed(memoryview(frame(b"\x01" + bytes(10))))
        reader.feed(memoryview(b"\x82\x7f" + size.to_bytes(8, "big") + b"\x01"))
        portion = memoryview(bytes(1_000_000 if size > 1_000_000 else 7000))
        for _ in range(size // len(portion) - 1):
            reader.feed(portion)
        assert count == 10 + size - len(portion)
        kept.append(len(reader._head))
    assert kept == [0, 0]


UNREADABLE = {
    "an extension": (b"\xc2\x01\x01", False),
    "a masked frame of the API server": (frame(b"\x01a", mask=MASK), False),
    "a frame of a caller that is not masked": (frame(b"\x00a"), True),
    "a message of a caller in several frames": (frame(b"\x00a", mask=MASK, final=False), True),
    "a frame of a caller that continues": (frame(b"\x00a", mask=MASK, opcode=0), True),
    "a frame that continues nothing": (frame(b"a", opcode=0), False),
    "a message within a message": (frame(b"\x01a", final=False) + frame(b"\x01b"), False),
    "an opcode of the future": (frame(b"\x01a", opcode=3), False),
    **{
        f"a caller's frame of the reserved opcode {code:#x}": (frame(b"\x00ls\r", mask=MASK, opcode=code), True)
        for code in (3, 7, *range(0xB, 0x10))
    },
    "a control frame of the future": (frame(b"\x01a", opcode=0xB), False),
    "a control frame in parts": (frame(b"\x00a", mask=MASK, opcode=9, final=False), True),
    "a control frame that is too long": (frame(bytes(126), mask=MASK, opcode=9), True),
    "a length with the top bit": (b"\x82\xff\x80\0\0\0\0\0\0\x01" + MASK + b"\x06", True),
    "a length of the API server with the top bit": (b"\x82\x7f\x80\0\0\0\0\0\0\x01\x07", False),
    "more than the API server takes": (b"\x82\xff\0\0\0\0\x02\0\0\x01" + MASK, True),
    "2 bytes for a short length": (b"\x82\xfe\0\x01" + MASK, True),
    "8 bytes for a short length": (b"\x82\xff\0\0\0\0\0\0\xff\xff" + MASK, True),
}


@pytest.mark.parametrize(("data", "from_caller"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_is_not_read(data: bytes, from_caller: bool) -> None:
    with pytest.raises(Unreadable):
        Taken(from_caller=from_caller).feed(data)
