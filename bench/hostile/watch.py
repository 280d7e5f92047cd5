"""What processes hold while the roles are attacked: memory, descriptors, CPU time, waits for a core; read from /proc by
a thread.

It also tells when the machine had no core to spare: a call that is slow then is slow on a machine of that size."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.usage import cpu_seconds, resident_bytes, waited_seconds

EVERY = 0.25
"""Seconds between two looks."""
KEPT = 4
"""Of so many looks one goes into the series of a result."""
FULL = 0.1
"""Of the machine's time between two looks: where less was idle, no core was to spare."""


class Watch:
    """Looks at processes until it is stopped; `start`, then `stop`, then `over`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._looks: list[tuple[float, dict[str, tuple[int, int, float, float]]]] = []
        """When (monotonic seconds); role -> resident bytes, descriptors, CPU seconds, seconds of waiting for a core."""
        self._idle: list[tuple[float, float, float]] = []
        """From when until when (monotonic seconds), and the share of the cores' time that was idle."""
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
        then, idle, whole = time.monotonic(), *_ticks()
        while not self._stopped.wait(EVERY):
            now, idle_now, whole_now = time.monotonic(), *_ticks()
            self._idle.append((then, now, (idle_now - idle) / max(whole_now - whole, 1)))
            then, idle, whole = now, idle_now, whole_now
            self._looks.append(
                (
                    time.monotonic(),
                    {
                        role: (resident_bytes([pid]), descriptors(pid), cpu_seconds([pid]), waited_seconds(pid))
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
            under = [seen for at, seen in looks if attacked <= at < ended] or during
            cpu, waited = (
                {
                    phase: round((some[-1][field] - some[0][field]) / max(seconds, 1e-9), 3)
                    for phase, some, seconds in (
                        ("alone", before, attacked - alone),
                        ("attack", under, ended - attacked),
                    )
                }
                for field in (2, 3)
            )
            found[role] = {
                "rss_mib": _of([mib(seen[0]) for seen in before], [mib(seen[0]) for seen in during]),
                "descriptors": _of([seen[1] for seen in before], [seen[1] for seen in during]),
                "cpu_cores": cpu,
                "waited_cores": waited,
                "series": [
                    {"at_s": round(at - attacked, 1), "rss_mib": mib(seen[0]), "descriptors": seen[1]}
                    for at, seen in looks[::KEPT]
                ],
            }
        return found

    def idle(self, begun: float, ended: float) -> dict[str, float]:
        """Return the share of the cores' time that was idle in a phase: the mean, and the least between two looks."""
        looks = [(until - since, share) for since, until, share in self._idle if begun <= since and until <= ended]
        whole = sum(length for length, _ in looks)
        return {
            "mean": round(sum(length * share for length, share in looks) / whole, 3) if whole else math.nan,
            "least": round(min((share for _, share in looks), default=math.nan), 3),
        }

    def full(self, begun: float, ended: float) -> bool:
        """Return whether the machine had no core to spare at some time of a call."""
        return any(share < FULL for since, until, share in self._idle if since < ended and begun < until)


def _ticks() -> tuple[int, int]:
    """Return the idle and all ticks of all cores since the machine's start (proc_stat(5))."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


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
