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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay.data_dir import open_authority
from bench.herd.agents import MAX_AGENTS
from bench.herd.agents import Orders as HerdOrders
from bench.herd.sessions import MAX_SESSIONS, Orders
from bench.process import NotReady
from bench.studies.base import Study
from bench.usage import cpu_seconds, resident_bytes
from tests.support.processes import ProcessFailed
from tests.support.world import ALICE, RELAY_AUDIENCE, ApiServer, World

SESSIONS, AGENTS = 10_000, MAX_AGENTS
ENDS = 2
"""Processes that hold the sessions' ends."""
WARM_SESSIONS, WARM_AGENTS = 100, 50
"""Come first and are not counted: what they make the relay load is no session's share."""
UNAUTHENTICATED, OTHERS = 300, 64 + 128
"""Descriptors of no session: strangers, as configured below; files and pipes."""
AGENTS_PER_SECOND = 160
"""At which they come for the first time: half of what the relay lets in, so that none is sent away to come later."""
SETTLE, IDLE = 11.0, 24.0
"""Seconds: each end has sent a PING since the last join; then the relay's CPU time is taken."""
_SLABS = ("TCP", "TCPv6", "sock_inode_cache", "filp", "eventpoll_epi", "eventpoll_pwq", "tcp_bind_bucket")
LONGEST = 300.0
"""Seconds for all to come: half a minute on a quiet machine, several on one that others use."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many of each."""

    sessions: int
    agents: int


def fitting(sessions: int, agents: int, descriptors: int) -> Size:
    """As many as a process with so many descriptors can hold: all agents, and sessions for the rest."""
    agents = min(agents, max(0, descriptors // 2))
    warm = WARM_AGENTS + 10 + 2 * (WARM_SESSIONS + 50)  # with a margin for those that come again
    free = descriptors - UNAUTHENTICATED - OTHERS - agents - warm
    return Size(max(0, min(sessions, free // 2, ENDS * MAX_SESSIONS)), agents)


class Scale(Study):
    """P9."""

    name = "scale"
    title = "one relay with 10,000 idle sessions and 5,000 agents, PING every ten seconds"
    expected_s = 180.0

    def __init__(self, sessions: int = SESSIONS, agents: int = AGENTS, idle: float = IDLE) -> None:
        self._wanted = Size(sessions, agents)
        self._idle = idle

    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptors = sys.maxsize if hard == resource.RLIM_INFINITY else hard
        size = fitting(self._wanted.sessions, self._wanted.agents, descriptors)
        unused = directory / "agent-token"
        unused.write_text("never-asked-for")
        world = World(ApiServer("https://127.0.0.1:1", token_file=unused), directory=directory / "world")
        with _Hall(world) as hall:
            return _measure(hall, size, self._wanted, descriptors, self._idle)


class _Hall:
    """The relay, and the processes whose connections it holds."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.processes: list[_Ends] = []

    def __enter__(self) -> _Hall:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.stop()
        self.world.stop()

    def start(self, size: Size) -> None:
        """The relay, with limits that let these in."""
        self.world.start_issuer()
        limits = (
            f"\n[limits]\nsessions = {size.sessions + WARM_SESSIONS + 50}\nunauthenticated = {UNAUTHENTICATED}\n"
            f"agents = {size.agents + WARM_AGENTS + 10}\n"
            # One user and few addresses stand for many.
            f"sessions_per_user = {size.sessions + WARM_SESSIONS + 50}\njoins_per_minute_per_user = 1000000\n"
            "connections_per_second_per_address = 100000\n"
        )
        try:
            self.world.start_relay(extra=limits)
        except ProcessFailed as error:
            raise NotReady(str(error)) from error
        authority = open_authority(self.world.relay_config.parent / "data")
        self._ca = authority.certificate_pem
        self._credentials: dict[str, dict[str, Any]] = {}
        for cluster in ("herd", "ends"):
            ca, key = Authority.create(cluster), make_key()
            certificate = authority.sign_agent(make_csr(key), cluster, life=86400.0, cluster_ca_pin=ca.pin)
            self._credentials[cluster] = {"certificate": certificate, "key": key, "cluster_ca": ca.certificate_pem}

    def agents(self, number: int, first: int) -> _Ends:
        """A process with so many agents."""
        orders = HerdOrders(
            host="127.0.0.1",
            port=self.world.relay_port,
            relay_ca=self._ca,
            agents=number,
            sources=min(number // 80 + 1, 200),
            ramp=number / AGENTS_PER_SECOND,
            first=first,
            **self._credentials["herd"],
        )
        return self._begin("bench.herd.agents", asdict(orders))

    def sessions(self, number: int, net: int) -> _Ends:
        """A process with both ends of so many sessions."""
        orders = Orders(
            host="127.0.0.1",
            port=self.world.relay_port,
            relay_ca=self._ca,
            cluster="ends",
            token=self.world.token(ALICE, RELAY_AUDIENCE),
            sessions=number,
            sources=40,
            net=net,
            **self._credentials["ends"],
        )
        return self._begin("bench.herd.sessions", asdict(orders))

    def _begin(self, module: str, orders: dict[str, Any]) -> _Ends:
        process = _Ends(module, orders)
        self.processes.append(process)
        return process

    @property
    def relay(self) -> int:
        """The relay's process."""
        return self.world.relay.pid

    def resident(self) -> int:
        return resident_bytes([self.relay])

    def idle(self, seconds: float) -> float:
        """Percent of a core that the relay takes while nothing but pings happens."""
        before, begun = cpu_seconds([self.relay]), time.monotonic()
        while time.monotonic() - begun < seconds:
            for process in self.processes:
                process.told()
        return 100 * (cpu_seconds([self.relay]) - before) / (time.monotonic() - begun)

    def wait(self, what: str, done: Callable[[], bool]) -> float:
        """Until `done()` by what the processes last told; seconds it took. Raises NotReady."""
        begun = time.monotonic()
        while not done():
            for process in self.processes:
                process.told()
            if time.monotonic() - begun > LONGEST:
                raise NotReady(f"{what} did not come within {LONGEST:.0f} s: {[p.last for p in self.processes]}")
        return time.monotonic() - begun


class _Ends:
    """A process that takes orders as a line and tells where it is, four times a second."""

    def __init__(self, module: str, orders: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        self._module = module
        self.last: dict[str, Any] = {}

    def told(self) -> dict[str, Any]:
        """The next count. Raises NotReady when the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NotReady(f"{self._module} ended with {self._process.wait()} after {self.last}")
        self.last = json.loads(line)
        return self.last

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def _measure(hall: _Hall, size: Size, wanted: Size, descriptors: int, idle: float) -> dict[str, Any]:
    hall.start(size)
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

    cpu = cpu_seconds([hall.relay])
    shares = [size.sessions // ENDS + (number < size.sessions % ENDS) for number in range(ENDS)]
    ends = [hall.sessions(share, net=2 + number) for number, share in enumerate(shares)]
    pairing_took = hall.wait(
        "the sessions", lambda: sum(p.last.get("paired", 0) + p.last.get("failed", 0) for p in ends) == size.sessions
    )
    pairing_cpu = cpu_seconds([hall.relay]) - cpu
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
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="arcbridge-scale-") as name:
        result = Scale(args.sessions, min(args.agents, MAX_AGENTS), args.idle).run(Path(name), rounds=1, seconds=0.0)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
