"""What processes cost: CPU seconds and resident memory, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the processes and of children they have waited for, seconds (resolution 10 ms).

    `/proc/PID/stat`, fields 14 to 17 (proc_pid_stat(5)). A process that is gone counts nothing.
    """
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()  # the name before may hold spaces
        total += sum(map(int, fields[11:15]))
    return total / _TICKS


def waited_seconds(pid: int) -> float:
    """Seconds that the process's threads were ready to run while no core was free for them; 0 when it is gone.

    `/proc/PID/task/TID/schedstat`, the second number, nanoseconds (sched-stats.rst of the kernel).
    """
    total = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[1])
        except OSError:
            continue
    return total / 1e9


def resident_bytes(pids: Iterable[int]) -> int:
    """Sum of VmRSS."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    return total


def with_descendants(pid: int) -> list[int]:
    """A process and all that it started (sshd forks for each connection)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        todo.extend(children.get(one, []))
    return found
