"""Writes durations, sizes and times for people, alike in every role; a leaf that all may import."""

from __future__ import annotations

import time


def duration(seconds: float) -> str:
    """Write seconds in the largest unit of which there is one: `90 min` is `1.5 h`, and what is negative `0 s`."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{_short(seconds / length)} {unit}"
    return f"{_short(max(0.0, seconds))} s"


def rfc3339(when: float) -> str:
    """Write unix seconds as a time in UTC (RFC 3339)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))


def size(count: float) -> str:
    """Write bytes: `512 bytes`, `1.5 KiB`, `1 TiB`."""
    for unit, length in (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= length:
            return f"{_short(count / length)} {unit}"
    return f"{count:.0f} bytes"


def _short(value: float) -> str:
    """Write a number with one decimal place, which is left out where it is 0."""
    return f"{value:.1f}".removesuffix(".0")
