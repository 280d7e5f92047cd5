"""How durations, sizes and times are written for people."""

from __future__ import annotations

import pytest

from arcbridge.units import duration, rfc3339, size


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(-1, "0 s"), (5, "5 s"), (59.94, "59.9 s"), (60, "1 min"), (5400, "1.5 h"), (43200, "12 h"), (8640000, "100 d")],
)
def test_durations(seconds: float, written: str) -> None:
    assert duration(seconds) == written


@pytest.mark.parametrize(
    ("count", "written"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (1024**2, "1 MiB"), (1024**4, "1 TiB")],
)
def test_sizes(count: int, written: str) -> None:
    assert size(count) == written


def test_times() -> None:
    assert rfc3339(1800000000.9) == "2027-01-15T08:00:00Z"
