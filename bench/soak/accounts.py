"""Joins what both ends of the soak's streams wrote down: what completed, what failed and why, what was lost or doubled.

*Completed* is a stream of which all four halves (each direction at each end) ended in order, with equal bytes,
records and SHA-256. Everything else *failed*, with a reason. A failure is *explained* when the near end saw it as a
local program would, its connection refused or reset, and its client logged why. A hung stream, an end in order that
is none, a wrong byte, a row that one end alone knows: those are not explained by anything.

*Lost*: in a direction whose reader saw an end in order, the bytes that its writer counts and the reader does not; and
what a reader found missing on the way, whatever came then. *Doubled*: what a reader got twice. *Wrong*: what belongs
nowhere. A stream that was reset has lost nothing: who reads it was told.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.soak.conversation import CLEAN

Row = dict[str, Any]
NO_REASON = "its client gave no reason"
MOST_FAILURES = 500
"""Failures that are told one by one."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One relay killed."""

    number: int
    relay: int
    at: float
    """Seconds, monotonic."""
    clients: frozenset[int]
    """Those whose connection to a relay was one to this relay, told by the kernel just before."""


@dataclass(slots=True)
class Accounts:
    """What the streams of a soak add up to."""

    opened: int = 0
    completed: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[Row] = field(default_factory=list)
    unexplained: int = 0
    bytes_lost: int = 0
    bytes_doubled: int = 0
    bytes_wrong: int = 0
    bytes_up: int = 0
    """Received by the target."""
    bytes_down: int = 0
    """Received by the load."""
    records: int = 0
    first_record_s: list[float] = field(default_factory=list)
    """For each stream: from its opening to the first record back."""

    @property
    def sound(self) -> bool:
        """Whether no byte was lost, doubled or wrong, each failure is explained, and at least one stream completed."""
        wrong = self.bytes_lost or self.bytes_doubled or self.bytes_wrong or self.unexplained
        return self.completed > 0 and not wrong


def read_ledger(path: Path) -> list[Row]:
    """The rows of one end; a last line that is not whole is left out (its process was killed)."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def settle(
    near: Iterable[Row], far: Iterable[Row], opened: int, told: Mapping[int, Sequence[str]] | None = None
) -> Accounts:
    """Join the rows of the load and of the target.

    `opened`: streams that the load says it opened. `told`: client -> the reasons that it gave for connections it
    refused or cut, one each; a stream that was refused or cut without one is not explained. None: there is no log to
    ask.
    """
    accounts = Accounts(opened=opened)
    loads = {row["stream"]: row for row in near}
    left = None if told is None else {client: list(reasons) for client, reasons in told.items()}
    targets: dict[int, Row] = {}
    for row in far:
        if "nameless" in row:
            # The target of a stream that broke before its first bytes were there; its near end tells why.
            _mismatch(accounts, row)
            accounts.unexplained += "mismatch" in row
        elif row["stream"] in targets or row["stream"] not in loads:
            accounts.bytes_doubled += row["received"]["bytes"]
            accounts.unexplained += 1
            accounts.reasons["a stream arrived that was not opened, or arrived before"] += 1
        else:
            targets[row["stream"]] = row
    for number, load in loads.items():
        target = targets.get(number)
        reason = _settle(accounts, load, target)
        if reason is None:
            accounts.completed += 1
            continue
        explained = reason.startswith(("refused", "cut"))
        if explained and left is not None:
            reasons = left.get(load["client"], [])
            reason += f" ({reasons.pop() if reasons else NO_REASON})"
            explained = NO_REASON not in reason
        accounts.failed += 1
        accounts.reasons[reason] += 1
        accounts.unexplained += not explained
        if len(accounts.failures) < MOST_FAILURES:
            accounts.failures.append({"reason": reason, "load": load, "target": target})
    if missing := opened - len(loads):
        accounts.failed += missing
        accounts.unexplained += missing
        accounts.reasons["the load wrote no row"] += missing
    return accounts


def _settle(accounts: Accounts, load: Row, target: Row | None) -> str | None:
    """Judge one stream: return why it failed, or None."""
    if "refused" in load:
        return f"refused: {load['refused']}"
    accounts.bytes_down += load["received"]["bytes"]
    accounts.records += load["received"]["records"]
    if load["first_record_s"]:
        accounts.first_record_s.append(load["first_record_s"])
    problems = [_direction(accounts, load["received"], target and target["sent"])]
    if target is not None:
        accounts.bytes_up += target["received"]["bytes"]
        accounts.records += target["received"]["records"]
        problems.append(_direction(accounts, target["received"], load["sent"]))
    elif load["sent"]["end"] == load["received"]["end"] == CLEAN:
        accounts.bytes_lost += load["sent"]["bytes"]
        problems.append("ended in order, but the target never saw it")
    if found := [problem for problem in problems if problem]:
        return found[0]
    ends = [load["received"]["end"], load["sent"]["end"]]
    if target is not None:
        ends += [f"at the target alone: {end}" for end in (target["received"]["end"], target["sent"]["end"])
                 if end != CLEAN]  # fmt: skip
    broken = [end for end in ends if end != CLEAN]
    return broken[0] if broken else None


def _direction(accounts: Accounts, reader: Row, writer: Row | None) -> str | None:
    """Judge one direction: return what is wrong with its bytes, or None."""
    if "mismatch" in reader:
        _mismatch(accounts, reader)
    in_order = reader["end"] == CLEAN or (reader.get("mismatch") == "lost" and not reader["count"])
    if in_order and writer is not None:
        missing = writer["bytes"] - reader["bytes"]
        accounts.bytes_lost += max(missing, 0)
        accounts.bytes_doubled += max(-missing, 0)
        if missing:
            return "ended in order with other bytes than were sent"
        if reader["sha256"] != writer["sha256"] or reader["records"] != writer["records"]:
            accounts.bytes_wrong += 1
            return "the same number of bytes, but not the same bytes"
    if "mismatch" in reader:
        return f"bytes {reader['mismatch']}" if reader["count"] else "ended in order without a trailer"
    return None


def _mismatch(accounts: Accounts, row: Row) -> None:
    match row.get("mismatch"):
        case "lost":
            accounts.bytes_lost += row["count"]
        case "doubled":
            accounts.bytes_doubled += row["count"]
        case "wrong":
            accounts.bytes_wrong += row["count"]


def stalls(near: Iterable[Row], far: Iterable[Row], kills: Sequence[Kill]) -> Mapping[int, list[float]]:
    """Return for each kill how long the streams that it hit stalled, in ascending seconds.

    A kill hits the streams that are open at that moment in a session whose connection goes through that relay. A
    stall is the longest time that a reader of the stream, at either end, waited for a record between this kill and
    the next one. A wait under way at the kill counts whole, from the record before it; so does one that is still under
    way at the next kill, if no record has come since this one; and the wait for the end in order counts too. Nothing
    is subtracted: the stream's own pause between two records (up to 0.31 s) is in it, and so is any other delay until
    the next kill.
    """
    found: dict[int, list[float]] = {kill.number: [] for kill in kills}
    loads = {row["stream"]: row for row in near if "refused" not in row}
    targets = {row["stream"]: row for row in far if "nameless" not in row}
    for stream, load in loads.items():
        both = [row["stalls"] for row in (load, targets.get(stream)) if row]
        for kill in kills:
            waits = [one[str(kill.number)] for one in both if str(kill.number) in one]
            if waits and load["client"] in kill.clients:
                found[kill.number].append(max(waits))
    return {number: sorted(waits) for number, waits in found.items()}


def percentile(ascending: Sequence[float], share: float) -> float | None:
    """The least value that `share` of the values do not exceed; None without values."""
    return ascending[max(math.ceil(share * len(ascending)) - 1, 0)] if ascending else None
