"""Counts the bytes of the values that expressions make.

It counts every value that a function or a literal makes, and never gives back what is dropped: the sum bounds what can
be alive at once. It measures nothing but sizes that Python tells at once or that the value's elements tell. Invariant:
what is counted is at least a fourth of what Python allocates.
"""

from __future__ import annotations

import math
import sys

from arcbridge.identity.cel.values import LimitExceeded, Map, Opaque, Optional, StringList, Value

ELEMENT = 40
"""Bytes of an element of a list: its pointer and a small number, though other elements are often there already."""
ENTRY = 120
"""Bytes of an entry of a map: its place in the dictionary and the pair that it keeps."""
_UNCOUNTED = frozenset({bool, int, float, type(None)})


class Memory:
    """The bytes that are `left` for values."""

    __slots__ = ("left",)

    def __init__(self, left: float = math.inf) -> None:
        self.left = left

    def take(self, value: Value) -> None:
        """Count a value that was made. Raises LimitExceeded."""
        if type(value) not in _UNCOUNTED:
            self.spend(measure(value))

    def spend(self, size: int) -> None:
        """Count `size` bytes. Raises LimitExceeded."""
        self.left -= size
        if self.left < 0:
            raise LimitExceeded("the expressions make values that are too large together", permanent=True)


def measure(value: Value) -> int:
    """Return the bytes of a value that a function has just made; elements that it did not make count as references."""
    if isinstance(value, str | bytes):
        return sys.getsizeof(value)
    if isinstance(value, StringList):
        return ELEMENT * (1 + len(value)) + sum(map(sys.getsizeof, value))
    if isinstance(value, list):
        return ELEMENT * (1 + len(value))
    if isinstance(value, Map):
        lists = sum(measure(item) for _, item in value.items() if type(item) is StringList)
        return ENTRY * (2 + len(value)) + lists
    if isinstance(value, Optional):
        return ELEMENT
    return value.memory if isinstance(value, Opaque) else ELEMENT
