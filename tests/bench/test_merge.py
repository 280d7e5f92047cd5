"""An interrupted result and one of the rest become one; figures of two runs are never mixed in a scenario."""

from __future__ import annotations

from typing import Any

import pytest

from bench.merge import Unlike, merged

MACHINE = {"cores": 2, "cpu": "X", "kernel": "6", "python": "3.11", "uvloop": "1", "openssl": "3", "date": "today"}


def result(plan: dict[str, int], measured: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        "commit": "c",
        "machine": MACHINE,
        "command": "python -m bench",
        "seconds_in_all": 1.0,
        "complete": False,
        "plan": {name: {"rounds": rounds} for name, rounds in plan.items()},
        "scenarios": {
            name: {"arcbridge": {"per_s": {"runs": [1.0] * runs}}} if runs else {} for name, runs in measured.items()
        },
        "studies": {},
        "systems": {},
        "left_out": {},
        "failures": [],
        **more,
    }


def test_what_was_not_measured_whole_comes_from_the_other_one() -> None:
    first = result({"bulk": 5, "echo": 5, "last": 3}, {"bulk": 5, "echo": 2, "last": 0}, failures=["a"])
    second = result({"echo": 4, "last": 3}, {"echo": 4, "last": 3}, studies={"start": {"values": {}}}, failures=["b"])
    both = merged(first, second)
    runs = {name: len(found["arcbridge"]["per_s"]["runs"]) for name, found in both["scenarios"].items()}
    assert runs == {"bulk": 5, "echo": 4, "last": 3}
    assert {name: one["rounds"] for name, one in both["plan"].items()} == {"bulk": 5, "echo": 4, "last": 3}
    assert both["complete"]
    assert both["failures"] == ["a", "b"]
    assert list(both["studies"]) == ["start"]
    assert len(both["merged_of"]) == 2
    assert not merged(first, result({}, {}))["complete"], "`last` was not measured"


def test_other_code_or_another_machine_is_refused() -> None:
    one = result({}, {})
    with pytest.raises(Unlike, match="commits differ"):
        merged(one, {**one, "commit": "d"})
    with pytest.raises(Unlike, match="machines differ in cores"):
        merged(one, {**one, "machine": {**MACHINE, "cores": 4}})
