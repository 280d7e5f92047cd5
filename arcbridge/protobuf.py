"""Reads the fields of a message in protobuf, without a schema: numbers, and the bytes of texts and inner messages.

It takes the one form that every encoder writes. Invariant: what readers make different things of, longer forms of
numbers and numbers of fields above 32 bits, is a ValueError, and so is a message that is cut short.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

_ANY_NUMBER = repeat(0)


class TooManyFields(ValueError):
    """A message has more fields than its reader looks at."""


def fields(data: bytes, left: Iterator[int] = _ANY_NUMBER) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number of each field, and an int (varint) or bytes (all else).

    `left` yields once for each field that may still come, of a whole body with all its inner messages.
    """
    at = 0
    while at < len(data):
        if next(left, None) is None:
            raise TooManyFields
        tag, at = varint(data, at)
        if tag >= 1 << 32:  # Go drops the bits above, and reads another field's number
            raise ValueError("the number of a field has more than 32 bits")
        kind = tag & 7
        if kind == 0:
            number, at = varint(data, at)
            yield tag >> 3, number
            continue
        if kind == 2:
            size, at = varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("a kind of field that is not in use any more")
        if at + size > len(data):
            raise ValueError("the message is cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number; return it and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the message is cut short")
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            if not byte and shift:
                raise ValueError("a number that is longer than it must be")
            if number >= 1 << 64:
                break
            return number, at
    raise ValueError("a number of more than 64 bits")
