"""Samples: the least of the last three, what is kept over a start, and what a damaged file costs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from arcbridge.net.round_trips import KEPT, LARGEST, LONGEST, NAMES, RoundTrips
from tests.support.clock import Clock

NOW = 1_800_000_000.0


def kept(file: Path | None = None, now: float = NOW) -> tuple[RoundTrips, Clock]:
    clock = Clock()
    clock.now = now
    return RoundTrips(file, clock), clock


def test_the_least_of_the_last_three() -> None:
    found, _ = kept()
    for seconds in (0.010, 0.150, 0.140, 0.160):
        found.note("a", seconds)
    assert found.least("a") == 0.140, "the path became longer"
    found.note("a", 0.011)
    assert found.least("a") == 0.011, "and shorter at once"
    assert found.least("b") == math.inf


def test_samples_age() -> None:
    found, clock = kept()
    found.note("a", 0.010)
    clock.now += 100
    assert found.age("a") == 100
    assert found.age("b") == math.inf
    assert found.least("a", within=60) == math.inf
    clock.now += KEPT
    assert found.least("a") == math.inf


@pytest.mark.parametrize("seconds", [0.0, -1.0, LONGEST * 1.01, math.inf, math.nan, 1e300])
def test_j33_a_round_trip_that_no_path_has_is_passed_over(seconds: float) -> None:
    found, _ = kept()
    found.note("a", seconds)
    assert found.least("a") == math.inf


def test_names_are_bounded() -> None:
    found, clock = kept()
    for number in range(2 * NAMES):
        clock.now += 1
        found.note(f"relay-{number}", 0.01)
    assert found.least("relay-0") == math.inf
    assert found.least(f"relay-{NAMES}") == found.least(f"relay-{2 * NAMES - 1}") == 0.01


def test_it_outlives_its_process(tmp_path: Path) -> None:
    file = tmp_path / "state" / "round-trips.json"
    (one, _), (other, _) = kept(file), kept(file)
    one.note("a", 0.010)
    one.save()
    other.note("b", 0.020)
    other.save()
    later, _ = kept(file, NOW + 60)
    assert (later.least("a"), later.least("b")) == (0.010, 0.020), "neither process loses what the other kept"
    assert file.stat().st_mode & 0o077 == 0
    before = file.stat().st_mtime_ns
    later.save()
    assert file.stat().st_mtime_ns == before, "nothing was noted"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", '{"a": 3}', '{"a": [3]}', '{"a": [[1, 2, 3]]}', '{"a": [["x", 0.1]]}', '{"a": [[true, 0.1]]}',
     '{"a": [[1e999, 0.1]]}',
     f'{{"a": [[{NOW}, {"9" * 4000}]]}}', f'{{"a": [[{NOW + 60}, 0.1]]}}', " " * (LARGEST + 1)],
)  # fmt: skip
def test_a_damaged_file_costs_a_measurement(tmp_path: Path, text: str) -> None:
    file = tmp_path / "round-trips.json"
    file.write_text(text)
    file.chmod(0o600)
    found, _ = kept(file)
    assert found.least("a") == math.inf
    found.note("a", 0.010)
    found.save()
    assert json.loads(file.read_text()) == {"a": [[NOW, 0.010]]}


def test_a_directory_that_cannot_be_written_costs_no_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found, _ = kept(tmp_path / "file" / "round-trips.json")
    found.note("a", 0.010)
    found.save()
    assert found.least("a") == 0.010
