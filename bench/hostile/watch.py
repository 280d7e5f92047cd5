"""What the roles hold while they are attacked: resident memory, descriptors, CPU time, read from /proc by a thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.usage import cpu_seconds, resident_bytes

EVERY = 0.25
"""Seconds between two looks."""
KEPT = 4
"""Of so many looks one goes into the series of a result."""


class Watch:
    """Looks at processes until it is stopped; `start`, then `stop`, then `over`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._looks: list[tuple[float, dict[str, tuple[int, int, float]]]] = []
        """When (monotonic seconds); role -> resident bytes, descriptors, CPU seconds."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what was seen stays."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(EVERY):
            self._looks.append(
                (
                    time.monotonic(),
                    {
                        role: (resident_bytes([pid]), descriptors(pid), cpu_seconds([pid]))
                        for role, pid in self._pids.items()
                    },
                )
            )

    def over(self, alone: float, attacked: float, ended: float) -> dict[str, Any]:
        """What each role held: before the attack, at most, and at the last look; `alone`, `attacked` and `ended` are
        when the phases began, and when the attack ended."""
        found: dict[str, Any] = {}
        for role in self._pids:
            looks = [(at, seen[role]) for at, seen in self._looks]
            before = [seen for at, seen in looks if alone <= at < attacked]
            during = [seen for at, seen in looks if attacked <= at]
            if not before or not during:
                continue
            cpu_alone = (before[-1][2] - before[0][2]) / max(attacked - alone, 1e-9)
            under = [seen for at, seen in looks if attacked <= at < ended] or during
            cpu_under = (under[-1][2] - under[0][2]) / max(ended - attacked, 1e-9)
            found[role] = {
                "rss_mib": _of([mib(seen[0]) for seen in before], [mib(seen[0]) for seen in during]),
                "descriptors": _of([seen[1] for seen in before], [seen[1] for seen in during]),
                "cpu_cores": {"alone": round(cpu_alone, 3), "attack": round(cpu_under, 3)},
                "series": [
                    {"at_s": round(at - attacked, 1), "rss_mib": mib(seen[0]), "descriptors": seen[1]}
                    for at, seen in looks[::KEPT]
                ],
            }
        return found


def descriptors(pid: int) -> int:
    """Open descriptors of a process; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def connections_opened() -> int:
    """TCP connections that this machine's processes have begun since its start (ActiveOpens, RFC 4022)."""
    names, values = (
        line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    return int(values[names.index("ActiveOpens")])


def mib(count: int) -> float:
    """Bytes in MiB."""
    return round(count / 1024 / 1024, 1)


def _of(before: list[Any], during: list[Any]) -> dict[str, Any]:
    return {"before": before[-1], "peak": max(during), "after": during[-1]}
