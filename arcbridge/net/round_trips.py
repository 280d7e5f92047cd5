"""Keeps the round trips that this end has measured or was told, by name, over its starts where it has a directory.

It measures nothing and asks no peer. The least of the last three counts, so that one slow answer moves no session.
Invariants: a round trip is above 0 and at most 10 s, names and samples are bounded, and what cannot be read or written
costs a measurement, never a start.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from arcbridge.errors import StateError

LONGEST: Final = 10.0
"""Seconds: a longer round trip is none (docs/threats.md#J33)."""
SAMPLES: Final = 3
"""Of each name."""
KEPT: Final = 7 * 86400.0
"""Seconds for which a sample counts that no newer one has replaced."""
NAMES: Final = 512
"""Names that are kept; the ones whose last sample is oldest go first."""
LARGEST: Final = 256 * 1024
"""Bytes of a file that is read."""


class RoundTrips:
    """The round trips of one end. `clock` returns unix seconds, because what is kept outlives the machine's start."""

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        """`file`: where they are kept; None: nowhere."""
        self._file = file
        self._clock = clock
        self._samples: dict[str, list[tuple[float, float]]] = {}
        """Time and round trip, seconds, the oldest first; the name that was noted last is the last."""
        self._changed = False
        self._merge(self._read())

    def note(self, name: str, seconds: float) -> None:
        """Take a sample; one that no path has is passed over."""
        if 0 < seconds <= LONGEST:
            self._put(name, [*self._samples.get(name, ()), (self._clock(), seconds)])
            self._changed = True

    def least(self, name: str, within: float = KEPT) -> float:
        """Return the round trip, seconds, by the samples of the last `within` seconds; infinity: there is none."""
        now = self._clock()
        return min((seconds for at, seconds in self._samples.get(name, ()) if 0 <= now - at < within), default=math.inf)

    def age(self, name: str) -> float:
        """Return the seconds since the last sample; infinity: there is none."""
        samples = self._samples.get(name)
        return max(self._clock() - samples[-1][0], 0.0) if samples else math.inf

    @property
    def unsaved(self) -> bool:
        """Whether there is something to keep."""
        return self._file is not None and self._changed

    def save(self) -> None:
        """Keep what was noted beside what other processes have kept; blocks on the disk."""
        if self._file is None or not self._changed:
            return
        from arcbridge.pki.private_files import ensure_private_directory, locked, write_private

        try:
            ensure_private_directory(self._file.parent)
            with locked(self._file.with_suffix(".lock")):
                self._merge(self._read())
                write_private(self._file, json.dumps(self._samples).encode())
            self._changed = False
        except StateError:
            self._file = None  # a full or read-only disk; the next start measures

    # -- inside -------------------------------------------------------------------------------------------------------

    def _read(self) -> object:
        if self._file is None:
            return None
        from arcbridge.pki.private_files import read_file
        from arcbridge.untrusted_json import read_json

        try:
            data = read_file(self._file, limit=LARGEST)
            return read_json(data) if data else None
        except (StateError, ValueError):
            return None  # damaged: it is written anew

    def _merge(self, document: object) -> None:
        """Take over the samples of a document that are not here; what is malformed is left out."""
        now = self._clock()
        for name, samples in document.items() if isinstance(document, dict) else ():
            pairs = [one for one in samples if _is_pair(one)] if isinstance(samples, list) else []
            good = {(float(at), float(s)) for at, s in pairs if now - KEPT < at <= now and 0 < s <= LONGEST}
            if found := good | set(self._samples.get(name, ())):
                self._put(name, sorted(found))

    def _put(self, name: str, samples: list[tuple[float, float]]) -> None:
        self._samples.pop(name, None)
        self._samples[name] = samples[-SAMPLES:]
        while len(self._samples) > NAMES:
            del self._samples[min(self._samples, key=lambda one: self._samples[one][-1][0])]


def _is_pair(value: object) -> bool:
    """Return whether a value of a document is two numbers."""
    return isinstance(value, list) and len(value) == 2 and all(type(part) in (int, float) for part in value)
