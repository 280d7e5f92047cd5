"""Timestamps and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.identity.cel.timestamps import PARTS, read_duration, read_timestamp, write_duration, write_timestamp
from arcbridge.identity.cel.values import MAX_SECONDS, MIN_SECONDS, NANOSECONDS, Duration, EvaluationError, Timestamp
from tests.identity.cel.calls import called

SAME = ["2024-02-03T10:00:00Z", "2024-02-03T10:00:00.12Z", "2024-02-03T10:00:00+02:00", "0001-01-01T00:00:00Z"]


@pytest.mark.parametrize("text", SAME)
def test_a_timestamp_is_written_as_it_was_read(text: str) -> None:
    assert write_timestamp(read_timestamp(text)) == text


@given(st.integers(MIN_SECONDS * NANOSECONDS, MAX_SECONDS * NANOSECONDS))
def test_every_timestamp_is_read_again(nanoseconds: int) -> None:
    assert read_timestamp(write_timestamp(Timestamp(nanoseconds))).nanoseconds == nanoseconds


@pytest.mark.parametrize("text", [
    "2024-02-30T10:00:00Z", "2024-02-03T25:00:00Z", "2024-02-03T10:60:00Z", "2024-02-03T10:00:61Z",
    "2024-02-03t10:00:00z", "2024-02-03 10:00:00Z", "2024-02-03T10:00:00", "2024-02-03T10:00:00+25:00",
    "9999-12-31T23:59:59-23:00", "", "2024",
])  # fmt: skip
def test_no_timestamp(text: str) -> None:
    with pytest.raises(EvaluationError):
        read_timestamp(text)


DURATIONS = [
    ("1h30m", "5400s"), ("-1.5s", "-1.5s"), ("100ms", "0.1s"), ("0", "0s"), ("1us", "0.000001s"), ("1µs", "0.000001s"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "written"), DURATIONS)
def test_durations(text: str, written: str) -> None:
    assert write_duration(read_duration(text)) == written


@pytest.mark.parametrize(
    "text", ["", "-", "1", "1x", "s", ".s", "9999999h", "1h 1m", "1" * 5000 + "s", "9" * 19 + "ns1ns"]
)
def test_no_duration(text: str) -> None:
    with pytest.raises(EvaluationError):
        read_duration(text)


def test_parts_of_a_timestamp() -> None:
    found = {name: called(name, read_timestamp("2024-02-04T10:11:12.345Z")) for name in PARTS}
    assert found == {
        "getFullYear": 2024,
        "getMonth": 1,
        "getDayOfYear": 34,
        "getDate": 4,
        "getDayOfMonth": 3,
        "getDayOfWeek": 0,
        "getHours": 10,
        "getMinutes": 11,
        "getSeconds": 12,
        "getMilliseconds": 345,
    }


def test_time_zones() -> None:
    moment = read_timestamp("2024-07-01T23:30:00Z")
    assert called("getHours", moment, "Europe/Berlin") == 1
    assert called("getDate", moment, "Europe/Berlin") == 2
    assert called("getHours", moment, "-05:30") == 18
    for zone in ("Nowhere/Place", "../etc/passwd", "1:x", "/etc/localtime"):
        with pytest.raises(EvaluationError):
            called("getHours", moment, zone)


def test_parts_of_a_duration() -> None:
    assert called("getMinutes", Duration(-90 * NANOSECONDS)) == -1
    assert called("getMilliseconds", Duration(NANOSECONDS)) == 1000
    for name, value in (("getDate", Duration(1)), ("getHours", "1h")):
        with pytest.raises(EvaluationError):
            called(name, value)
