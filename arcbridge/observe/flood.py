"""The processor that samples log events: a peer that sends ten thousand bad requests a second must not decide how much
is written.

Each key (the event's name, its level and its `reason`) has a token bucket. An event that finds no token is counted, not
kept, and the next one of its key that passes carries the count. The number of keys is bounded: keys without a place of
their own share one bucket. Every event either passes or is counted.
"""

from __future__ import annotations

import threading
from time import monotonic
from typing import Any, Final

import structlog
from structlog.typing import EventDict

from arcbridge.limiters import KeyedTokenBucket

WINDOW: Final = 10.0
"""Seconds until an empty bucket is full again: a new burst shows soon, and a flood is a few lines a second."""

ALLOWANCE: Final = 50
"""Events per key and window: a busy but healthy relay (a few joins a second) loses none."""

DEBUG_ALLOWANCE: Final = 5000
"""The same at level debug, which is switched on by an operator who wants to see each one."""

MAX_KEYS: Final = 512

_Key = tuple[str, str, str]
_OTHER: Final[_Key] = ("other", "", "")


class Flood:
    """Decides which events pass. A processor for structlog; several threads may log through it."""

    def __init__(self, *, allowance: int = ALLOWANCE, debug_allowance: int = DEBUG_ALLOWANCE) -> None:
        self._usual = KeyedTokenBucket[_Key](allowance, allowance / WINDOW, size=MAX_KEYS, shares=True)
        self._debug = KeyedTokenBucket[_Key](debug_allowance, debug_allowance / WINDOW, size=MAX_KEYS, shares=True)
        self._unreported: dict[_Key, int] = {}
        """Events omitted since one of their key passed."""
        self._lock = threading.Lock()
        self.omitted = 0
        """Events omitted since the start; read by the metrics."""

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
        key = (event, level, reason)
        if (self._debug if level == "debug" else self._usual).reserve(key, now) is not None:
            return self._unreported.pop(key, 0)
        if key not in self._unreported and len(self._unreported) >= MAX_KEYS:
            key = _OTHER
        self._unreported[key] = self._unreported.get(key, 0) + 1
        self.omitted += 1
        return None

    def outstanding(self) -> dict[str, int]:
        """Return and forget what was omitted and not yet reported, by event: written when the process ends."""
        found: dict[str, int] = {}
        for (event, _, _), count in self._unreported.items():
            found[event] = found.get(event, 0) + count
        self._unreported.clear()
        return found
