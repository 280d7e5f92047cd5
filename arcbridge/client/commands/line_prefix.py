"""Puts a prefix before each line of a program's output, as it comes in pieces.

Pure: bytes in, bytes out, and no line is changed besides. A line that does not end is given out in pieces of
`LONGEST` bytes, so that a program that writes no line's end takes no memory.
"""

from __future__ import annotations

LONGEST = 64 * 1024
"""Bytes of one line that are kept while its end has not come."""


class LinePrefix:
    """One stream of output: `feed` as bytes come, `end` once behind the last."""

    __slots__ = ("_kept", "_prefix")

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._kept = b""

    def feed(self, data: bytes) -> bytes:
        """Return the lines that are complete now, each with its prefix."""
        *lines, self._kept = (self._kept + data).split(b"\n")
        out = [self._prefix + line + b"\n" for line in lines]
        while len(self._kept) >= LONGEST:
            out.append(self._prefix + self._kept[:LONGEST] + b"\n")
            self._kept = self._kept[LONGEST:]
        return b"".join(out)

    def end(self) -> bytes:
        """Return what came without a line's end, as a line."""
        last, self._kept = self._kept, b""
        return self._prefix + last + b"\n" if last else b""
