"""Orders relays by the length of the way through them, and decides when a nearer one takes the place of one in use.

It has no socket, no clock and no memory: lengths are given in seconds, infinity for one that is not known. One way is
*shorter* than another where it is by a fifth and by 10 ms; ways of which neither is shorter are equal, and a draw
decides between them. Invariant: a relay that is in use gives way to a shorter one alone, so that with the same lengths
no two of them replace each other in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final, Generic, TypeVar

SHARE: Final = 0.2
"""The part of the longer way by which the other one has to be shorter."""
LEAST: Final = 0.010
"""Seconds by which it has to be shorter besides: below that no keystroke shows a difference."""

T = TypeVar("T")


def shorter(one: float, other: float) -> bool:
    """Return whether a way of `one` seconds is shorter than one of `other` seconds; infinity: not known."""
    return other - one >= max(SHARE * other, LEAST)  # infinity less infinity is no number, which is not greater


class Nearest(Generic[T]):
    """The order of relays by `length`, seconds. Those of `preferred`, by their region, come before all others."""

    def __init__(self, length: Callable[[T], float], preferred: Collection[T] = ()) -> None:
        self.length = length
        self._preferred = preferred

    def before(self, one: T, other: T) -> bool:
        """Return whether `one` is to be used rather than `other`."""
        far_one, far_other = one not in self._preferred, other not in self._preferred
        return far_one < far_other or (far_one == far_other and shorter(self.length(one), self.length(other)))

    def ranked(self, relays: Sequence[T], draw: Callable[[], float]) -> list[T]:
        """Return the relays, the nearest first, equals in random order. `draw` returns floats in [0, 1)."""
        ways = [(one not in self._preferred, self.length(one), one) for one in relays]
        ways.sort(key=lambda way: way[:2])  # before what the nearest is not, no other one is
        found: list[T] = []
        while (begin := len(found)) < len(ways):
            far, least, _ = ways[begin]
            equals = [one for is_far, length, one in ways[begin:] if is_far == far and not shorter(least, length)]
            while equals:
                found.append(equals.pop(int(draw() * len(equals))))
        return found

    def chosen(self, in_use: Sequence[T], relays: Sequence[T], wanted: int, draw: Callable[[], float]) -> list[T]:
        """Return `wanted` of the relays: those in use, but for the ones to which another is to be preferred."""
        found = list(in_use)[:wanted]
        rest = [one for one in relays if one not in found]
        found += self.ranked(rest, draw)[: wanted - len(found)]
        while found:
            worst = max(found, key=lambda one: (one not in self._preferred, self.length(one)))
            better = [one for one in rest if one not in found and self.before(one, worst)]
            if not better:
                break
            found[found.index(worst)] = self.ranked(better, draw)[0]
        return found
