"""Timestamps and durations: reading them, writing them, and their parts, as Go's package `time` does it for CEL.

Source: the CEL specification's "Timestamps and durations"; RFC 3339. Nothing here asks a clock: an expression has no
way to learn the present time.
"""

from __future__ import annotations

import datetime
import re
import zoneinfo
from collections.abc import Callable, Mapping

from arcbridge.identity.cel.values import (
    INT_MAX,
    INT_MIN,
    NANOSECONDS,
    Duration,
    EvaluationError,
    Timestamp,
    checked_timestamp,
)

_TIMESTAMP = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d{1,2}):(\d\d):(\d\d)(?:[.,](\d+))?(Z|([+-])(\d\d):(\d\d))", re.ASCII)
_UNITS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": NANOSECONDS,
    "m": 60 * NANOSECONDS,
    "h": 3600 * NANOSECONDS,
}
_DURATION_PART = re.compile(r"(\d*)(?:\.(\d*))?(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_DURATION = re.compile(r"([+-]?)(0|(?:(?:\d{1,25}(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+)", re.ASCII)
_EPOCH = datetime.date(1970, 1, 1).toordinal()


def read_timestamp(text: str) -> Timestamp:
    """Read RFC 3339. Raises EvaluationError."""
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise EvaluationError("not a timestamp")
    year, month, day, hour, minute, second = (int(match[n]) for n in range(1, 7))
    offset = 0
    if match[8] != "Z":
        hours, minutes = int(match[10]), int(match[11])
        if hours > 24 or minutes > 59:
            raise EvaluationError("not a timestamp")
        offset = (hours * 60 + minutes) * 60 * (-1 if match[9] == "-" else 1)
    try:
        days = datetime.date(year, month, day).toordinal() - _EPOCH
    except ValueError as error:
        raise EvaluationError("not a timestamp") from error
    if hour > 23 or minute > 59 or second > 59:
        raise EvaluationError("not a timestamp")
    seconds = days * 86400 + hour * 3600 + minute * 60 + second - offset
    fraction = int((match[7] or "")[:9].ljust(9, "0"))
    return checked_timestamp(seconds * NANOSECONDS + fraction, offset)


def write_timestamp(value: Timestamp) -> str:
    """Return RFC 3339 in the offset in which the timestamp was written, with as many digits of a second as it needs."""
    seconds, fraction = divmod(value.nanoseconds, NANOSECONDS)
    days, rest = divmod(seconds + value.offset, 86400)
    try:
        date = datetime.date.fromordinal(days + _EPOCH)
    except (ValueError, OverflowError) as error:
        raise EvaluationError("timestamp overflow") from error
    text = f"{date.isoformat()}T{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    if fraction:
        text += "." + f"{fraction:09}".rstrip("0")
    if not value.offset:
        return text + "Z"
    minutes = abs(value.offset) // 60
    return f"{text}{'-' if value.offset < 0 else '+'}{minutes // 60:02}:{minutes % 60:02}"


def read_duration(text: str) -> Duration:
    """Read a duration such as `1h30m`. Raises EvaluationError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise EvaluationError("not a duration")
    total = 0
    for whole, fraction, unit in _DURATION_PART.findall(match[2]):
        digits = fraction[:18]
        total += int(whole or 0) * _UNITS[unit] + int(digits or 0) * _UNITS[unit] // 10 ** len(digits)
    total = -total if match[1] == "-" else total
    if not INT_MIN <= total <= INT_MAX:
        raise EvaluationError("not a duration")
    return Duration(total)


def write_duration(value: Duration) -> str:
    """Return seconds, such as `5400s` or `0.5s`."""
    seconds = value.nanoseconds / NANOSECONDS
    text = f"{seconds:.9f}".rstrip("0").rstrip(".")
    return ("-0" if text == "-0" else text) + "s"


def _local(value: Timestamp, zone: str) -> tuple[datetime.date, int]:
    """Return the date, and the second of the day, in a zone: a name, `+01:00`, or empty for UTC."""
    seconds = value.nanoseconds // NANOSECONDS
    days, rest = divmod(seconds + _offset(seconds, zone), 86400)
    try:
        return datetime.date.fromordinal(days + _EPOCH), rest
    except (ValueError, OverflowError) as error:
        raise EvaluationError("timestamp overflow") from error


def _offset(seconds: int, zone: str) -> int:
    if zone in ("", "UTC"):
        return 0
    hours, colon, minutes = zone.partition(":")
    if colon:
        if not re.fullmatch(r"[+-]?\d{1,9}", hours, re.ASCII) or not re.fullmatch(r"[+-]?\d{1,9}", minutes, re.ASCII):
            raise EvaluationError("not a time zone")
        sign = -1 if zone[0] == "-" else 1
        return (int(hours) * 60 + sign * int(minutes)) * 60
    try:
        info = zoneinfo.ZoneInfo(zone)
        moment = datetime.datetime.fromtimestamp(seconds, info)
        offset = moment.utcoffset()
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError, OverflowError) as error:
        raise EvaluationError("unknown time zone") from error
    return 0 if offset is None else int(offset.total_seconds())


PARTS: Mapping[str, Callable[[datetime.date, int, int], int]] = {
    "getFullYear": lambda date, second, fraction: date.year,
    "getMonth": lambda date, second, fraction: date.month - 1,
    "getDayOfYear": lambda date, second, fraction: date.timetuple().tm_yday - 1,
    "getDate": lambda date, second, fraction: date.day,
    "getDayOfMonth": lambda date, second, fraction: date.day - 1,
    "getDayOfWeek": lambda date, second, fraction: date.isoweekday() % 7,
    "getHours": lambda date, second, fraction: second // 3600,
    "getMinutes": lambda date, second, fraction: second // 60 % 60,
    "getSeconds": lambda date, second, fraction: second % 60,
    "getMilliseconds": lambda date, second, fraction: fraction // 1_000_000,
}
"""The functions of a timestamp, of its date, the second of the day, and the nanoseconds beside it."""
DURATION_PARTS = {
    "getHours": 3600 * NANOSECONDS,
    "getMinutes": 60 * NANOSECONDS,
    "getSeconds": NANOSECONDS,
    "getMilliseconds": 1_000_000,
}
"""The functions of a duration, and what they count, in nanoseconds."""


def part(of: Callable[[datetime.date, int, int], int], value: Timestamp, zone: str = "") -> int:
    """Apply one of `PARTS` in a zone. Raises EvaluationError."""
    date, second = _local(value, zone)
    return of(date, second, value.nanoseconds % NANOSECONDS)


def duration_part(unit: int, value: Duration) -> int:
    """Return how many whole units of so many nanoseconds a duration has, towards zero."""
    whole = abs(value.nanoseconds) // unit
    return -whole if value.nanoseconds < 0 else whole
