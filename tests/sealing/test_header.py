"""A header is read however its bytes arrive, only as age spells it, and within its bounds."""

from __future__ import annotations

import io
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import SealingError, Truncated
from arcbridge.sealing import header
from arcbridge.sealing.header import (
    MAX_HEADER,
    MAX_STANZAS,
    ByteSource,
    SealedHeader,
    Stanza,
    encoded,
    read_header,
    unpadded,
    written,
)

MAC = b"a" * 32
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20).map(str.encode)
STANZAS = st.lists(
    st.builds(Stanza, TEXT.filter(lambda kind: kind != b"scrypt"), st.lists(TEXT, max_size=3).map(tuple),
              st.binary(max_size=200)),
    min_size=1, max_size=6,
)  # fmt: skip


def ended(signed: bytes) -> bytes:
    return signed + b" " + encoded(MAC) + b"\n"


def read(data: bytes, size: int | None = None) -> tuple[SealedHeader, bytes]:
    """Read a header of bytes that come in pieces of `size`, and what is behind it."""
    file = io.BytesIO(data)
    source = ByteSource(file.read if size is None else lambda _: file.read(size))
    return read_header(source), source.take(1 << 20)


@given(STANZAS, st.binary(max_size=100), st.sampled_from([None, 1, 7, 5000]))
def test_what_is_written_is_read_and_nothing_behind_it_is_lost(
    stanzas: list[Stanza], rest: bytes, size: int | None
) -> None:
    signed = written(stanzas)
    found, behind = read(ended(signed) + rest, size)
    assert found == SealedHeader(tuple(stanzas), signed, MAC)
    assert behind == rest


@pytest.mark.parametrize("size", [0, 1, 47, 48, 49, 96])
def test_a_body_ends_with_a_short_line(size: int) -> None:
    lines = written([Stanza(b"x", (), bytes(size))]).split(b"\n")[2:-1]
    assert all(len(line) == 64 for line in lines[:-1])
    assert len(lines[-1]) < 64
    assert b"".join(lines) == encoded(bytes(size))


STANZA = b"-> x y\nYQ\n"
END = b"--- " + encoded(MAC) + b"\n"
V1 = b"age-encryption.org/v1\n"


@pytest.mark.parametrize(
    "data",
    [
        b"x", b"-----BEGIN AGE ENCRYPTED FILE-----\n", b"age-encryption.org/v2\n" + STANZA + END,
        V1[:-1] + b"\r\n" + STANZA + END, V1 + END, V1 + b"\n" + STANZA + END,
        V1 + b"->\nYQ\n" + END, V1 + b"-> \nYQ\n" + END, V1 + b"->x\nYQ\n" + END, V1 + b"-> x  y\nYQ\n" + END,
        V1 + b"-> x \nYQ\n" + END, V1 + "-> ä\nYQ\n".encode() + END, V1 + b"-> x\ty\nYQ\n" + END,
        V1 + b"-> x\nYQ==\n" + END, V1 + b"-> x\nYR\n" + END, V1 + b"-> x\nY\n" + END, V1 + b"-> x\n Y Q\n" + END,
        V1 + b"-> x\nY!Q\n" + END, V1 + b"-> x\n" + b"A" * 65 + b"\n" + END, V1 + b"-> x\n" + b"A" * 64 + b"\n" + END,
        V1 + STANZA + b"--- " + encoded(MAC) + b"=\n", V1 + STANZA + b"---" + encoded(MAC) + b"\n",
        V1 + STANZA + b"---  " + encoded(MAC) + b"\n", V1 + STANZA + b"--- " + encoded(MAC[1:]) + b"\n",
        V1 + STANZA + b"--- " + encoded(MAC) + b"\r\n", V1 + STANZA + b"--- " + encoded(MAC) + b" \n",
        V1 + b"-> scrypt a 18\nYQ\n" + STANZA + END,
    ],
)  # fmt: skip
def test_what_age_does_not_write_is_refused(data: bytes) -> None:
    with pytest.raises(SealingError) as raised:
        read(data)
    assert not isinstance(raised.value, Truncated)


def test_a_header_that_breaks_off_is_truncated_wherever_that_is() -> None:
    whole = ended(written([Stanza(b"X25519", (b"a",), bytes(100))]))
    for end in range(len(whole)):
        with pytest.raises(Truncated):
            read(whole[:end])


def test_base64_has_one_spelling() -> None:
    assert unpadded(b"") == b""
    assert unpadded(b"YQ") == b"a"
    for other in (b"YR", b"YQ=", b"Y Q", b"Y", b"-_"):
        with pytest.raises(SealingError):
            unpadded(other)


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (V1, b"a"),
        (V1 + b"-> x", b" y"),
        (V1, STANZA),
        (V1 + b"-> x\n", b"A" * 64 + b"\n"),
        (V1 + STANZA + b"--- ", b"A"),
        (b"", b"a"),
    ],
)
def test_a_header_without_end_is_bounded(begin: bytes, piece: bytes) -> None:
    for times in (4, 8):
        file = io.BytesIO(begin + piece * (times * MAX_HEADER // len(piece)))
        tracemalloc.start()
        try:
            with pytest.raises(SealingError):
                read_header(ByteSource(file.read))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert file.tell() <= MAX_HEADER + 2 * header._BLOCK
        assert peak < 20 * MAX_HEADER


def test_as_many_recipients_as_may_be_written_are_read() -> None:
    widest = Stanza(b"mlkem768x25519", (encoded(bytes(1120)),), bytes(32))
    signed = written([widest] * MAX_STANZAS)
    assert len(ended(signed)) <= MAX_HEADER
    assert len(read(ended(signed))[0].stanzas) == MAX_STANZAS
    with pytest.raises(SealingError, match=f"more than {MAX_STANZAS} recipients"):
        read(ended(written([widest] * (MAX_STANZAS + 1))))


def lines_taken(count: int) -> int:
    """Return the calls of `read` for a header of one line whose bytes come alone."""
    calls = 0
    data = io.BytesIO(V1 + b"-> x" + b"y" * count + b"\nYQ\n" + END)

    def one(_: int) -> bytes:
        nonlocal calls
        calls += 1
        return data.read(1)

    read_header(ByteSource(one))
    return calls


def test_bytes_that_come_alone_are_each_asked_for_once() -> None:
    few, many = lines_taken(1000), lines_taken(2000)
    assert many - few == 1000
