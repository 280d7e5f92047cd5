"""Put two results of one commit and one machine together: what the first one lacks comes from the second.

For a run that was interrupted, and one that measured the rest. Both commands and dates are kept; a scenario is taken
whole from one of them, because only figures of one run may be compared.
"""

from __future__ import annotations

from typing import Any

SAME = ("cores", "cpu", "kernel", "python", "uvloop", "openssl")
"""What must be alike in both machines' descriptions."""


class Unlike(Exception):
    """The two results cannot be put together; the message says why."""


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge two results into one. Raises Unlike."""
    if first["commit"] != second["commit"]:
        raise Unlike(f"the commits differ: {first['commit']} and {second['commit']}")
    for key in SAME:
        if first["machine"].get(key) != second["machine"].get(key):
            raise Unlike(f"the machines differ in {key}")
    result = dict(first)
    plan = dict(first["plan"])
    scenarios = {}
    for name in dict.fromkeys((*first["plan"], *second["plan"])):
        whole = bool(first["scenarios"].get(name)) and _measured_rounds(first, name) >= first["plan"][name]["rounds"]
        source = first if whole or not second["scenarios"].get(name) else second
        scenarios[name] = source["scenarios"].get(name, {})
        plan[name] = source["plan"].get(name, first["plan"].get(name))
    result["plan"] = plan
    result["scenarios"] = scenarios
    result["studies"] = {**second["studies"], **first["studies"]}
    result["systems"] = {**second["systems"], **first["systems"]}
    result["left_out"] = {**second["left_out"], **first["left_out"]}
    result["failures"] = [*first["failures"], *second["failures"]]
    result["command"] = f"{first['command']}; {second['command']}"
    result["seconds_in_all"] = round(first["seconds_in_all"] + second["seconds_in_all"], 1)
    result["complete"] = all(scenarios.values())
    result["merged_of"] = [
        {key: one[key] for key in ("command", "seconds_in_all", "complete", "machine")} for one in (first, second)
    ]
    return result


def _measured_rounds(result: dict[str, Any], name: str) -> int:
    """Return the most rounds that any system has of a scenario."""
    found = result["scenarios"][name].values()
    return max((len(metric["runs"]) for system in found for metric in system.values()), default=0)
