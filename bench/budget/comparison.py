"""Holds what was counted against the file that is committed: pure, with no processes and no clock.

A total is within the budget when it is within `MARGIN` of the file's, in either direction: what a path saves belongs
in the file as well, or a later change could spend it unseen. What costs less may also be a busy machine, on which two
reads become one: it is said, and only what costs more is a failure. A total that is beyond is explained by the
functions whose calls differ most.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MARGIN = 0.03
SLACK = {"exec": {"wake-ups": 2, "": 8}, "": {"allocations": 2}}
"""What figures may differ by, by path and by name, the empty name for all others. An exec: a timer of the relay falls
into half of them, and API server and node write their parts of an answer as one piece or as several. Allocations are
those of a dict that grows, too."""
NAMED = 8
"""Functions that explain one total."""


@dataclass(slots=True)
class Cost:
    """What one operation costs one role."""

    functions: Counter[str] = field(default_factory=Counter)
    """Calls of each function, those of Python and those of C."""
    allocations: int = 0
    system_calls: Counter[str] = field(default_factory=Counter)
    """By name."""
    bytes: int = 0
    """Copied by those, in or out."""
    wake_ups: int = 0
    """Returns of epoll that had something."""

    def totals(self) -> dict[str, int]:
        """Return the figures that are held, by name; the calls of each name are held beside them."""
        return {
            "calls": self.functions.total(),
            "allocations": self.allocations,
            "system calls": self.system_calls.total(),
            "wake-ups": self.wake_ups,
            "bytes": self.bytes,
        }


Costs = Mapping[str, Mapping[str, Cost]]
"""By path, then by role."""


@dataclass(frozen=True, slots=True)
class Change:
    """One total that is not the file's."""

    path: str
    role: str
    what: str
    before: int
    after: int
    functions: tuple[tuple[str, int, int], ...] = ()
    """What explains it, for calls and allocations: functions with their calls before and after."""

    @property
    def beyond(self) -> bool:
        """Whether it is more than the margin."""
        slacks = SLACK.get(self.path, SLACK[""])
        slack = slacks.get(self.what, slacks.get("", 0))
        return abs(self.after - self.before) > max(MARGIN * self.before, slack)

    @property
    def spends(self) -> bool:
        """Whether the path costs more than its budget."""
        return self.beyond and self.after > self.before

    def __str__(self) -> str:
        more = self.after - self.before
        share = f", {more / self.before:+.1%}" if self.before else ""
        lines = [f"{self.path}, {self.role}: {self.what} {self.before} -> {self.after} ({more:+}{share})"]
        lines += [f"    {after - before:+5}  {name} ({before} -> {after})" for name, before, after in self.functions]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Budget:
    """What was counted, and by which versions: the file."""

    versions: Mapping[str, str]
    """`python` has the minor version alone: with another one calls and allocations are others."""
    costs: Costs

    def text(self) -> str:
        """Return the file: a line for each figure, in a fixed order, so that a difference shows what changed alone."""
        paths = {
            path: {
                role: {
                    **cost.totals(),
                    "by name": dict(sorted(cost.system_calls.items())),
                    "functions": dict(sorted(cost.functions.items())),
                }
                for role, cost in roles.items()
            }
            for path, roles in self.costs.items()
        }
        return json.dumps({"versions": dict(self.versions), "paths": paths}, indent=1) + "\n"

    @classmethod
    def read(cls, text: str) -> Budget:
        """Return the budget that `text` wrote."""

        def cost(kept: dict[str, Any]) -> Cost:
            calls, names = Counter(kept["functions"]), Counter(kept["by name"])
            return Cost(calls, kept["allocations"], names, kept["bytes"], kept["wake-ups"])

        document = json.loads(text)
        paths = document["paths"].items()
        return cls(
            document["versions"], {path: {role: cost(kept) for role, kept in roles.items()} for path, roles in paths}
        )

    def table(self) -> str:
        """Return one row for each path and role, Markdown."""
        columns = list(Cost().totals())
        rows = [["path", "role", *columns], ["---"] * (2 + len(columns))]
        for path, roles in self.costs.items():
            rows += [[path, role, *map(str, cost.totals().values())] for role, cost in roles.items()]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compare(kept: Costs, counted: Costs) -> list[Change]:
    """Return every total that differs, in the order of the paths; a path or role that one side lacks costs nothing."""
    found: list[Change] = []
    for path in {**kept, **counted}:
        before, after = kept.get(path, {}), counted.get(path, {})
        for role in {**before, **after}:
            found += _differences(path, role, before.get(role, Cost()), after.get(role, Cost()))
    return found


def _differences(path: str, role: str, kept: Cost, counted: Cost) -> Iterator[Change]:
    before, after = ({**cost.totals(), **cost.system_calls} for cost in (kept, counted))
    changed = sorted(
        (name for name in kept.functions | counted.functions if kept.functions[name] != counted.functions[name]),
        key=lambda name: (-abs(counted.functions[name] - kept.functions[name]), name),
    )
    functions = tuple((name, kept.functions[name], counted.functions[name]) for name in changed[:NAMED])
    for what in {**before, **after}:
        if before.get(what, 0) != after.get(what, 0):
            named = functions if what in ("calls", "allocations") else ()
            yield Change(path, role, what, before.get(what, 0), after.get(what, 0), named)
