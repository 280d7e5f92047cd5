"""Idle scale: one relay process with 10,000 paired sessions and 5,000 agents; what each costs, and what idling costs.

Agents are the herd's (`bench.herd.agents`): real TLS, HELLO and PING. Sessions are joined as the product joins them,
and then idle as the product idles (`bench.herd.sessions`): a PING every ten seconds and its answer, through the pump.
The relay is the executable with policy, an OIDC issuer, and logs at level info.

One process may not open more descriptors than its hard limit says; where that does not suffice for all, there are as
many sessions as it allows, and a note says so.

    python -m bench.studies.scale --sessions 500 --agents 200 --idle 5         # a quick check
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.herd.agents import MAX_AGENTS
from bench.herd.hall import Hall
from bench.herd.sessions import MAX_SESSIONS
from bench.studies.base import Study

SESSIONS, AGENTS = 10_000, MAX_AGENTS
ENDS = 2
"""Processes that hold the sessions' ends."""
WARM_SESSIONS, WARM_AGENTS = 100, 50
"""Come first and are not counted: what they make the relay load is no session's share."""
UNAUTHENTICATED, OTHERS = 300, 64 + 128
"""Descriptors of no session: strangers, as configured below; files and pipes."""
SETTLE, IDLE = 11.0, 24.0
"""Seconds: each end has sent a PING since the last join; then the relay's CPU time is taken."""
_SLABS = ("TCP", "TCPv6", "sock_inode_cache", "filp", "eventpoll_epi", "eventpoll_pwq", "tcp_bind_bucket")


@dataclass(frozen=True, slots=True)
class Size:
    """How many of each."""

    sessions: int
    agents: int


def fitting(sessions: int, agents: int, descriptors: int, workers: int = 1) -> Size:
    """As many as processes with so many descriptors each can hold: all agents, and sessions for the rest. The kernel
    does not give each of several workers the same number."""
    if workers > 1:
        descriptors = int(descriptors * workers * 0.9)
    agents = min(agents, max(0, descriptors // 2))
    warm = WARM_AGENTS + 10 + 2 * (WARM_SESSIONS + 50)  # with a margin for those that come again
    free = descriptors - UNAUTHENTICATED - OTHERS - agents - warm
    return Size(max(0, min(sessions, free // 2, ENDS * MAX_SESSIONS)), agents)


class Scale(Study):
    """P9."""

    name = "scale"
    title = "one relay with 10,000 idle sessions and 5,000 agents, PING every ten seconds"
    expected_s = 180.0

    def __init__(self, sessions: int = SESSIONS, agents: int = AGENTS, idle: float = IDLE, *, workers: int = 1) -> None:
        self._wanted = Size(sessions, agents)
        self._idle = idle
        self._workers = workers

    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptors = sys.maxsize if hard == resource.RLIM_INFINITY else hard
        size = fitting(self._wanted.sessions, self._wanted.agents, descriptors, self._workers)
        with Hall(directory, workers=self._workers) as hall:
            return _measure(hall, size, self._wanted, descriptors, self._idle)


def _measure(hall: Hall, size: Size, wanted: Size, descriptors: int, idle: float) -> dict[str, Any]:
    room = 1.2 if hall.world.relay_settings else 1.0  # each of several workers has a part of the limits
    sessions, agents_most = size.sessions + WARM_SESSIONS + 50, size.agents + WARM_AGENTS + 10
    hall.start(
        f"sessions = {int(sessions * room)}\nsessions_per_user = {int(sessions * room)}\n"
        f"unauthenticated = {UNAUTHENTICATED}\nagents = {int(agents_most * room)}"
    )
    few_agents, few_sessions = min(WARM_AGENTS, size.agents), min(WARM_SESSIONS, size.sessions)
    warm_agents, warm_sessions = hall.agents(few_agents, first=0), hall.sessions(few_sessions, net=1)
    hall.wait("the first agents", lambda: warm_agents.last.get("up") == few_agents)
    hall.wait("the first sessions", lambda: warm_sessions.last.get("paired") == few_sessions)
    hall.idle(1.0)
    empty, kernel_empty = hall.resident(), _kernel_bytes()

    agents = hall.agents(size.agents, first=WARM_AGENTS)
    agents_took = hall.wait("the agents", lambda: agents.last.get("up") == size.agents)
    _say(f"{size.agents} agents after {agents_took:.0f} s")
    agents_idle = hall.idle(min(idle, 12.0))
    with_agents, kernel_agents = hall.resident(), _kernel_bytes()

    cpu = hall.cpu()
    shares = [size.sessions // ENDS + (number < size.sessions % ENDS) for number in range(ENDS)]
    ends = [hall.sessions(share, net=2 + number) for number, share in enumerate(shares)]
    pairing_took = hall.wait(
        "the sessions", lambda: sum(p.last.get("paired", 0) + p.last.get("failed", 0) for p in ends) == size.sessions
    )
    pairing_cpu = hall.cpu() - cpu
    _say(f"{size.sessions} sessions after {pairing_took:.0f} s, {pairing_cpu:.0f} s of the relay's CPU time")
    hall.idle(min(SETTLE, idle))
    before = [dict(p.last) for p in ends]
    share = hall.idle(idle)
    full, kernel_full = hall.resident(), _kernel_bytes()
    after = [dict(p.last) for p in ends]

    def rise(name: str) -> int:
        return sum(last[name] - first[name] for first, last in zip(before, after, strict=True))

    paired = sum(p["paired"] for p in after)
    lost = sum(p["lost"] for p in after)
    seconds = max(last["at"] - first["at"] for first, last in zip(before, after, strict=True))
    values: dict[str, float] = {
        "sessions": paired,
        "agents": agents.last["up"],
        "session_rss_kib": round((full - with_agents) / 1024 / max(paired, 1), 2),
        "agent_rss_kib": round((with_agents - empty) / 1024 / max(size.agents, 1), 2),
        "idle_percent_of_a_core": round(share, 2),
        "agents_idle_percent_of_a_core": round(agents_idle, 2),
        "pairing_per_s": round(size.sessions / pairing_took, 1) if pairing_took else 0.0,
        "pairing_relay_cpu_ms": round(1000 * pairing_cpu / max(size.sessions, 1), 3),
        "pings_per_s": round(rise("pings") / seconds, 1),
        "pongs_per_s": round(rise("pongs") / seconds, 1),
        "relay_rss_mb": round(full / 1e6, 1),
        "sessions_lost": lost,
    }
    if kernel_empty is not None and kernel_agents is not None and kernel_full is not None:
        values["kernel_kib_per_session"] = round((kernel_full - kernel_agents) / 1024 / max(paired, 1), 2)
        values["kernel_kib_per_agent"] = round((kernel_agents - kernel_empty) / 1024 / max(size.agents, 1), 2)
    notes = [
        "pings of a session are bytes of a PING's size and at its times, not TLS records: the relay is blind to it",
        "kernel memory (sockets, files, epoll, and TCP's buffers) counts both sides of each socket, for all run here",
    ]
    if size != wanted:
        # Nothing is extrapolated in `values`; this only says what the same rates come to.
        scaled = (share - agents_idle) * wanted.sessions / max(paired, 1)
        scaled += agents_idle * wanted.agents / max(size.agents, 1)
        notes.append(
            f"a process may open {descriptors} descriptors here (hard limit), which is room for {size.sessions} "
            f"sessions beside {size.agents} agents and not for {wanted.sessions} beside {wanted.agents}; at the same "
            f"cost each, those would take {scaled:.1f} % of a core"
        )
    failed = sum(p["failed"] for p in after)
    if failed or lost:
        notes.append(f"{failed} sessions were not joined, {lost} ends were cut: {[p['word'] for p in after]}")
    return {"values": values, "runs": [values], "notes": notes}


def _kernel_bytes() -> int | None:
    """What the kernel holds for sockets and for watching them, and TCP's buffers; None where it does not say.

    By name, because slab in all is mostly files that others have opened meanwhile.
    """
    total = 0
    try:
        for line in Path("/proc/slabinfo").read_text().splitlines():
            name, *fields = line.split()
            if name in _SLABS:
                total += int(fields[0]) * int(fields[2])  # objects in use, bytes of each (slabinfo(5))
    except OSError:
        return None
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        if line.startswith("TCP:"):
            words = line.split()
            total += int(words[words.index("mem") + 1]) * resource.getpagesize()
    return total


def _say(text: str) -> None:
    print(f"scale: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Run this study alone and print its result."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.scale")
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--agents", type=int, default=AGENTS)
    parser.add_argument("--idle", type=float, default=IDLE, help="seconds for which the relay's CPU time is taken")
    parser.add_argument("--workers", type=int, default=1, help="processes of the relay")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="arcbridge-scale-") as name:
        scale = Scale(args.sessions, min(args.agents, MAX_AGENTS), args.idle, workers=args.workers)
        result = scale.run(Path(name), rounds=1, seconds=0.0)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
