"""A recording is asciicast v3 for players, and has every byte for those who need them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.agent.recording.cast import (
    ERRORS,
    INPUT,
    MAX_LINE,
    OUTPUT,
    RESIZE,
    CastReader,
    CastWriter,
    Event,
    broken_off,
)


def lines(text: bytes) -> list[object]:
    return [json.loads(line) for line in text.splitlines() if not line.startswith(b"#")]


def test_what_a_recording_looks_like() -> None:
    text = CastWriter(10.0)
    made = text.header(1_800_000_000.7, "alice in shop/web", "sh -c 'ls'")
    made += text.lines(
        [
            Event(10.5, RESIZE, b"100x30"),
            Event(10.5, OUTPUT, b"$ "),
            Event(11.25, INPUT, b"ls\r"),
            Event(12, ERRORS, b"x"),
        ]
    )
    made += text.end(12.5, 7, "")
    assert lines(made) == [
        {
            "version": 3,
            "term": {"cols": 80, "rows": 24},
            "timestamp": 1_800_000_000,
            "title": "alice in shop/web",
            "command": "sh -c 'ls'",
        },
        [0.5, "r", "100x30"],
        [0.0, "o", "$ "],
        [0.75, "i", "ls\r"],
        [0.75, "o", "x"],
        [0.5, "x", "7"],
    ]
    assert made.endswith(b"\n# end\n")


def test_intervals_add_up_although_each_is_rounded() -> None:
    text = CastWriter(0.0)
    made = lines(text.lines([Event(n * 0.0004, OUTPUT, b"x") for n in range(1, 10_001)]))
    assert sum(float(event[0]) for event in made if isinstance(event, list)) == pytest.approx(4.0, abs=0.002)


def test_a_session_without_a_status_ends_with_a_mark() -> None:
    text = CastWriter(0.0)
    assert lines(text.end(1.0, None, "the session was cut")) == [[1.0, "m", "the session was cut"]]


CHUNKS = st.lists(st.tuples(st.sampled_from([OUTPUT, ERRORS]), st.binary(min_size=1, max_size=40)), max_size=12)


@given(CHUNKS, st.lists(st.integers(1, 50), max_size=20))
def test_the_bytes_of_the_output_come_back(chunks: list[tuple[str, bytes]], sizes: list[int]) -> None:
    """Of each channel in order; a character that is cut stands where its end came."""
    text = CastWriter(0.0)
    made = text.header(0, "", "") + text.lines([Event(0, code, data) for code, data in chunks]) + text.end(1, 0, "")
    portions, position = [], 0
    for size in sizes:
        portions.append(made[position : position + size])
        position += size
    reader = CastReader()
    found = b"".join(data for _, code, data in reader.events([*portions, made[position:]]) if code == "o")
    assert reader.ended
    assert sorted(found) == sorted(b"".join(data for _, data in chunks))
    if len({code for code, _ in chunks}) == 1:
        assert found == b"".join(data for _, data in chunks)


def test_a_character_that_was_cut_is_whole_again() -> None:
    text = CastWriter(0.0)
    made = text.lines([Event(0, OUTPUT, "grün".encode()[:3]), Event(1, OUTPUT, "grün".encode()[3:])])
    assert lines(made) == [[0.0, "o", "gr"], [1.0, "o", "ün"]]


def test_what_is_no_text_stands_there_twice() -> None:
    made = CastWriter(0.0).lines([Event(0.25, OUTPUT, b"\xff\x00a")])
    assert lines(made) == [[0.25, "B", "/wBh"], [0.0, "o", "\ufffd\x00a"]]


def test_a_recording_that_broke_off_says_so() -> None:
    text = CastWriter(0.0)
    reader = CastReader()
    made = text.header(0, "", "") + text.lines([Event(0, OUTPUT, b"a")]) + broken_off()
    assert [code for _, code, _ in reader.events([made])] == ["o", "m"]
    assert not reader.ended


@pytest.mark.parametrize(
    "line",
    [b"{}", b'["1","o","x"]', b'[-1,"o","x"]', b'[1,"o"]', b"[1", b'[1,2,"x"]', b"\xff", b'[1,"B","*"]', b"[" * 9999],
)
def test_lines_that_are_no_events(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(CastReader().events([b"{}\n" + line + b"\n"]))


def test_a_line_without_an_end_is_bounded() -> None:
    portion = b"x" * 65536
    with pytest.raises(ValueError, match="too long"):
        list(CastReader().lines(portion for _ in range(2 * MAX_LINE // 65536)))
