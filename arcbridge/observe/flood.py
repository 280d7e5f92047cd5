"""The processor that samples log events: a peer that sends ten thousand bad requests a second must not decide how much
is written.

Rules, per key (the event's name, its level and its `reason`):

1. in each window of `WINDOW` seconds the first `allowance` events pass;
2. the rest are counted, not kept;
3. the first event that passes in a later window carries the count of those omitted before it;
4. the number of keys is bounded: when the table is full, new keys share one bucket.

Pure: time is an argument (monotonic seconds).
"""

from __future__ import annotations

import threading
from time import monotonic
from typing import Any, Final

import structlog
from structlog.typing import EventDict

WINDOW: Final = 10.0
"""Seconds. Short enough that a new burst shows at once, long enough that a flood is a few lines a second."""

ALLOWANCE: Final = 50
"""Events per key and window: a busy but healthy relay (a few joins a second) loses none."""

DEBUG_ALLOWANCE: Final = 5000
"""The same at level debug, which is switched on by an operator who wants to see each one."""

MAX_KEYS: Final = 512

_Key = tuple[str, str, str]
_SHARED: Final[_Key] = ("", "", "")


class Flood:
    """Decides which events pass. A processor for structlog; several threads may log through it."""

    __slots__ = ("_buckets", "_lock", "allowance", "debug_allowance", "omitted")

    def __init__(self, *, allowance: int = ALLOWANCE, debug_allowance: int = DEBUG_ALLOWANCE) -> None:
        self.allowance = allowance
        self.debug_allowance = debug_allowance
        self.omitted = 0
        """Events omitted since the start; read by the metrics."""
        self._buckets: dict[_Key, _Bucket] = {}
        self._lock = threading.Lock()

    def __call__(self, logger: Any, method: str, fields: EventDict) -> EventDict:
        """Let an event pass, with the number of those omitted before it. Raises DropEvent."""
        reason = fields.get("reason")
        with self._lock:  # the standard library's loggers also log from threads
            before = self.admit(
                str(fields.get("event", ""))[:64], method, reason[:64] if isinstance(reason, str) else "", monotonic()
            )
        if before is None:
            raise structlog.DropEvent
        if before:
            fields["omitted"] = before
        return fields

    def admit(self, event: str, level: str, reason: str, now: float) -> int | None:
        """Return how many like it were omitted before (0: none) if the event passes, None if it is omitted."""
        bucket = self._bucket((event, level, reason), now)
        if now - bucket.since >= WINDOW:
            bucket.since = now
            bucket.passed = 0
        if bucket.passed >= (self.debug_allowance if level == "debug" else self.allowance):
            bucket.omitted += 1
            self.omitted += 1
            return None
        bucket.passed += 1
        before, bucket.omitted = bucket.omitted, 0
        return before

    def outstanding(self) -> dict[str, int]:
        """Return and forget what was omitted and not yet reported, by event: written when the process ends."""
        found: dict[str, int] = {}
        for (event, _, _), bucket in self._buckets.items():
            if bucket.omitted:
                name = event or "other"
                found[name] = found.get(name, 0) + bucket.omitted
                bucket.omitted = 0
        return found

    def __len__(self) -> int:
        return len(self._buckets)

    def _bucket(self, key: _Key, now: float) -> _Bucket:
        bucket = self._buckets.get(key)
        if bucket is not None:
            return bucket
        if len(self._buckets) >= MAX_KEYS:
            self._forget_quiet(now)
        if len(self._buckets) >= MAX_KEYS:
            key = _SHARED
        return self._buckets.setdefault(key, _Bucket(now))

    def _forget_quiet(self, now: float) -> None:
        quiet = [key for key, bucket in self._buckets.items() if now - bucket.since >= WINDOW and not bucket.omitted]
        for key in quiet:
            del self._buckets[key]


class _Bucket:
    __slots__ = ("omitted", "passed", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.passed = 0
        self.omitted = 0
