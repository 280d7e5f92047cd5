"""A prefix before each line, however the bytes come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arcbridge.client.commands.line_prefix import LONGEST, LinePrefix


@given(st.lists(st.binary(max_size=20)))
def test_pieces_do_not_matter(pieces: list[bytes]) -> None:
    lines = LinePrefix("a | ")
    out = b"".join(lines.feed(piece) for piece in pieces) + lines.end()
    whole = b"".join(pieces)
    expected = whole.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert out == b"".join(b"a | " + line + b"\n" for line in expected)


def test_a_line_that_does_not_end_is_given_out_in_pieces() -> None:
    lines = LinePrefix("a | ")
    out = lines.feed(b"x" * (2 * LONGEST + 1))
    assert out == (b"a | " + b"x" * LONGEST + b"\n") * 2
    assert lines.end() == b"a | x\n"
    assert lines.end() == b""
