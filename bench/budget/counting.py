"""Counts what each path costs each role: first calls, then allocations, then system calls, of the same processes.

One after the other, because each would count in the next: CPython allocates for a call that is profiled, and strace
slows what it watches. Of many operations the one counts that is like most others. Where there is none, it is the one
that an eighth is below: a timer or another thread makes an operation dearer, and in an eighth of them there is none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from bench.budget.comparison import Cost
from bench.budget.paths import Operation
from bench.budget.probe import Phase, Probe
from bench.budget.system_calls import read, traced

WARM_UP = 3
"""Operations before the first one that counts."""

T = TypeVar("T")


def count(paths: Sequence[Operation], directory: Path) -> dict[str, dict[str, Cost]]:
    """Return the cost of one operation of each path, by role. Raises Broken, NoStrace."""
    costs = {path.name: {role: Cost() for role in path.pids} for path in paths}
    probes = {pid: Probe(directory, pid) for path in paths for pid in path.pids.values()}
    for phase in (Phase.CALLS, Phase.ALLOCATIONS):
        for probe in probes.values():
            probe.count(phase)
        for path in paths:
            _count_inside(path, phase, {role: probes[pid] for role, pid in path.pids.items()}, costs[path.name])
    for probe in probes.values():
        probe.count(Phase.OFF)
        probe.close()
    for path in paths:
        _count_system_calls(path, directory, costs[path.name])
    return costs


def usual(found: Sequence[Counter[str]]) -> Counter[str]:
    """Return the count whose total is the usual one; of several the most frequent."""
    total = usual_number([one.total() for one in found])
    alike = Counter(tuple(sorted(one.items())) for one in found if one.total() == total)
    return Counter(dict(alike.most_common(1)[0][0]))


def usual_number(found: Sequence[int]) -> int:
    """Return the number that at least half of them are, and where there is none, the one that an eighth is below."""
    number, times = Counter(found).most_common(1)[0]
    return number if 2 * times >= len(found) else sorted(found)[len(found) // 8]


def _count_inside(path: Operation, phase: Phase, probes: dict[str, Probe], costs: dict[str, Cost]) -> None:
    marks = _operate(path, lambda: {role: (probe.calls, probe.allocations) for role, probe in probes.items()})
    for role, probe in probes.items():
        spans = pairwise(mark[role] for mark in marks)
        if phase is Phase.CALLS:
            costs[role].functions = usual([probe.functions(begin, end) for (begin, _), (end, _) in spans])
        else:
            costs[role].allocations = usual_number([end - begin for (_, begin), (_, end) in spans])


def _count_system_calls(path: Operation, directory: Path, costs: dict[str, Cost]) -> None:
    traces = directory / f"strace-{path.name}"
    traces.mkdir()
    with traced(path.pids, traces):
        begins = _operate(path, time.time)
    for role, cost in costs.items():
        main_thread = traces / f"{role}.{path.pids[role]}"
        found = read(main_thread.read_text().splitlines(), begins)
        cost.system_calls = usual([one.system_calls for one in found])
        cost.bytes = usual_number([one.bytes for one in found])
        cost.wake_ups = usual_number([one.wake_ups for one in found])


def _operate(path: Operation, mark: Callable[[], T]) -> list[T]:
    """Run a path's operations; return `mark()` before each and after the last, while all roles slept."""
    marks = []
    for number in range(WARM_UP + path.times):
        path.settle()
        if number >= WARM_UP:
            marks.append(mark())
        path.run()
    path.settle()
    return [*marks, mark()]
