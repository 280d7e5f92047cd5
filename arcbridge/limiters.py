"""Limiters: how often something may happen, and how often it is told.

They decide and never wait, and they read no clock: each call is given the time in monotonic seconds. No limiter grows
without bound, however many keys a peer makes up. Every rate of arcbridge is one of these; which key they
count (an address, a subject, a name of an event) is the caller's choice.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class TokenBucket:
    """`burst` tokens at most, refilled at `rate` tokens per second; full at first. A rate of 0 refills nothing."""

    __slots__ = ("_then", "burst", "left", "rate")

    def __init__(self, burst: float, rate: float) -> None:
        self.burst = burst
        self.rate = rate
        self.left = float(burst)
        """Tokens after the last change, to be read: by now there may be more. Below zero it is a debt."""
        self._then = 0.0
        """The time of the last change, monotonic seconds."""

    def take(self, now: float, count: float = 1.0) -> bool:
        """Take `count` tokens; false when there were not as many. The debt is kept, so a flood stays refused."""
        left = self.left
        if now > self._then:  # a time that lies back gives nothing, now or later
            left += (now - self._then) * self.rate
            self._then = now
            if left > self.burst:
                left = self.burst
        self.left = left = left - count
        return left >= 0.0

    def reserve(self, now: float, longest: float = 0.0, count: float = 1.0) -> float | None:
        """Take `count` tokens unless they are more than `longest` seconds away: then return None and take none.

        Return the seconds until they are there, 0.0 for now. A caller that waits so long has its turn, and turns come
        in the order of the calls. A caller that is refused owes nothing.
        """
        if now > self._then:
            left, self._then = self.left + (now - self._then) * self.rate, now
            self.left = left if left < self.burst else self.burst
        wait = 0.0 if self.left >= count else self.wait(now, count)
        if wait > longest:
            return None
        self.left -= count
        return wait

    def wait(self, now: float, count: float = 1.0) -> float:
        """Return the seconds until `count` tokens are there, 0.0 for now; take none."""
        left = self.left
        if now > self._then:
            left += (now - self._then) * self.rate
        missing = count - (left if left < self.burst else self.burst)
        if missing <= 0.0:
            return 0.0
        return missing / self.rate if self.rate else math.inf

    def change(self, now: float, burst: float, rate: float) -> None:
        """Hold `burst` tokens at most and refill at `rate` from now on; what was spent stays spent."""
        self.take(now, 0.0)
        spent = self.burst - self.left
        self.burst, self.rate = burst, rate
        self.left = burst - spent

    def give(self, count: float) -> None:
        """Return `count` tokens: work of ours that explains as many of the peer's actions."""
        left = self.left + count
        self.left = left if left < self.burst else self.burst

    def is_full(self, now: float) -> bool:
        """Say whether this bucket is as good as a new one."""
        return self.wait(now, self.burst) == 0.0


class KeyedTokenBucket(Generic[Key]):
    """A token bucket for each key, in a table of at most `size` keys.

    When the table is full, a new key takes the place of the key that was charged longest ago. With `shares` it does so
    only if that key's bucket is full again; otherwise it is charged to one bucket that all keys without a place share.

    Without `shares` a peer with many keys cannot lock out another one, and gets a burst for each of its keys. With it
    the sum over any number of keys is bounded, and keys without a place pay for each other.
    """

    __slots__ = ("_buckets", "_shared", "burst", "rate", "size")

    def __init__(self, burst: float, rate: float, *, size: int, shares: bool = False) -> None:
        self.burst = burst
        self.rate = rate
        self.size = size
        self._buckets: OrderedDict[Key, TokenBucket] = OrderedDict()
        """In the order of the last charge, the oldest first."""
        self._shared = TokenBucket(burst, rate) if shares else None

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: Key, now: float, count: float = 1.0) -> bool:
        """Take `count` tokens of `key`; see `TokenBucket.take`."""
        return self._charged(key, now).take(now, count)

    def reserve(self, key: Key, now: float, longest: float = 0.0, count: float = 1.0) -> float | None:
        """Take `count` tokens of `key` unless they are too far away; see `TokenBucket.reserve`."""
        return self._charged(key, now).reserve(now, longest, count)

    def wait(self, key: Key, now: float, count: float = 1.0) -> float:
        """Return the seconds until `key` has `count` tokens; take none, and remember no new key."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._shared
            if bucket is None or self._has_place(now):
                bucket = TokenBucket(self.burst, self.rate)
        return bucket.wait(now, count)

    def change(self, now: float, burst: float, rate: float) -> None:
        """Give every key `burst` tokens at most and `rate` per second from now on; what was spent stays spent."""
        self.burst, self.rate = burst, rate
        for bucket in [*self._buckets.values(), *([self._shared] if self._shared is not None else [])]:
            bucket.change(now, burst, rate)

    def _charged(self, key: Key, now: float) -> TokenBucket:
        buckets = self._buckets
        bucket = buckets.get(key)
        if bucket is None:
            if self._shared is not None and not self._has_place(now):
                return self._shared
            if len(buckets) >= self.size:
                buckets.popitem(last=False)
            bucket = buckets[key] = TokenBucket(self.burst, self.rate)
        else:
            buckets.move_to_end(key)
        return bucket

    def _has_place(self, now: float) -> bool:
        """Say whether a new key can be counted without forgetting what another one owes."""
        return len(self._buckets) < self.size or next(iter(self._buckets.values())).is_full(now)


class Bursts(Generic[Key]):
    """Which events of each key to tell of: the first one, and after it one for each `interval` seconds with the number
    of those that were not told. The keys are a closed set of the caller's."""

    __slots__ = ("_counts", "_told", "interval")

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._told: dict[Key, float] = {}
        """When an event of a key was told of last, monotonic seconds."""
        self._counts: dict[Key, int] = {}
        """Events since then."""

    def seen(self, key: Key, now: float) -> int | None:
        """Count an event; return how many there were since the last one that was told, this one included, or None
        where this one is not to be told."""
        count = self._counts.get(key, 0) + 1
        told = self._told.get(key)
        if told is not None and now - told < self.interval:
            self._counts[key] = count
            return None
        self._counts[key] = 0
        self._told[key] = now
        return count
