"""A sentence for kubectl stands behind a whole message of the API server, or is not said."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.agent.kube.channel_splice import STATUS, FrameEnds, message
from arcbridge.agent.recording.channels import STDERR, ChannelReader

from .bench import Wire

MESSAGES = (b"", b"x", b"y" * 124, b"z" * 125, b"a" * 65534)
PING, LONG = b"\x89\x01p", b"\x82\x7f" + (65536).to_bytes(8) + b"\x01" * 65536


@given(st.lists(st.sampled_from([*(message(1, one) for one in MESSAGES), PING, LONG]), max_size=6), st.data())
def test_it_knows_where_a_message_ends(frames: list[bytes], data: st.DataObject) -> None:
    passed, ends = b"".join(frames), [0]
    for frame in frames:
        ends.append(ends[-1] + len(frame))
    cuts = sorted(data.draw(st.sets(st.one_of(st.sampled_from(ends), st.integers(0, len(passed))), max_size=8)))
    known, before = FrameEnds(), 0
    for cut in [*(one for one in cuts if one <= len(passed)), len(passed)]:
        known.feed(memoryview(passed)[before:cut])
        before = cut
        assert known.whole == (cut in ends)


@pytest.mark.parametrize(
    ("passed", "whole"),
    [
        (b"\x02\x01x", False),
        (b"\x02\x01x" + PING, False),
        (b"\x02\x01x" + PING + b"\x80\x01y", True),
        (b"\xc2\x01x", False),
        (b"\xc2\x01x" + PING, False),
        (b"\x82\x81mask\x01", False),
        (b"\x82\x01x\x88\x02\x03\xe8", False),
    ],
    ids=["within a message", "a ping within one", "its last frame", "an extension", "behind one", "masked", "closed"],
)
def test_it_says_nothing_where_it_is_not_understood(passed: bytes, whole: bool) -> None:
    known = FrameEnds()
    known.feed(memoryview(passed))
    assert known.whole is whole


@pytest.mark.parametrize("size", [1, 124, 125, 4000])
def test_a_message_is_one_of_its_channel(size: int) -> None:
    found: list[tuple[int, bytes]] = []
    ChannelReader(lambda channel, data: found.append((channel, data))).feed(memoryview(message(STDERR, b"x" * size)))
    assert found == [(STDERR, b"x" * size)]


async def sentence(wire: Wire) -> str:
    """Read the last message of an exec, and its close: what kubectl prints behind `error: `."""
    found: dict[int, bytes] = {}
    rest = await wire.rest()
    assert rest.endswith(b"\x88\x02\x03\xe8"), rest
    ChannelReader(lambda channel, data: found.update({channel: data})).feed(memoryview(rest))
    status = json.loads(found[STATUS])
    assert (status["kind"], status["status"]) == ("Status", "Failure")
    return str(status["message"])
