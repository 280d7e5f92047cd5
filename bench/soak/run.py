"""One soak: real relays, agent and clients, a load at the clients' ports, a target behind the agent, and relays
killed."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from bench.machine import REPOSITORY, commit, describe
from bench.soak.accounts import Accounts, Kill, percentile, read_ledger, settle, stalls
from bench.soak.conversation import PATIENCE
from bench.soak.through import connected
from bench.usage import cpu_seconds, resident_bytes
from tests.support.processes import ManagedProcess
from tests.support.progress import StatusLine
from tests.support.world import ALICE, HEAVY_USERS, ApiServer, World, fixed_port

TARGET = "soak"
DOWN_FOR = (2.0, 5.0)
"""Seconds that a killed relay stays away; less when kills follow each other faster than three times that."""
PROGRESS = 5.0
"""Seconds between two versions of the line that says how far it is."""
LOOK = 1.0
"""Seconds between two looks at whether all processes are still there."""


class Broken(Exception):
    """The soak could not go on: a process ended by itself, or did not start."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one soak does."""

    duration: float
    """Seconds from the moment all streams are being opened to the moment they are told to end."""
    command: str
    streams: int = 200
    clients: int = 8
    relays: int = 2
    every: float = 30.0
    """Seconds between two kills; the first after as long."""
    most_kills: int = 10_000
    patience: float = PATIENCE
    """Seconds without a byte after which a stream has hung; draining takes no longer either."""
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(16))


def run(plan: Plan, directory: Path) -> dict[str, Any]:
    """Run the soak and return the result, of which `summary` is the short form. Raises Broken, ProcessFailed.

    Everything that was started has ended when this returns or raises, also for SIGINT and SIGTERM (KeyboardInterrupt).
    `directory` is where logs and ledgers go; they stay.
    """
    with _interruptible():
        return _Soak(plan, directory).run()


class _Soak:
    def __init__(self, plan: Plan, directory: Path) -> None:
        self._plan = plan
        self._directory = directory
        self._random = random.Random(plan.seed)
        self._kills: list[Kill] = []
        self._down: dict[int, float] = {}
        """Relays that are away -> when they are to be started again."""
        self._back: dict[int, float] = {}
        """Kill -> seconds until the relay was ready again."""
        self._clients: list[ManagedProcess] = []
        self._observed: list[int] = []

    def run(self) -> dict[str, Any]:
        """Start the processes, load them, kill relays, drain, and join the accounts."""
        plan, directory = self._plan, self._directory
        started, machine, version = datetime.now(UTC), describe(), commit()
        # A TCP target needs no API server, but an agent has one: at this address there is none.
        (directory / "agent-token").write_text("never-asked-for")
        api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=directory / "agent-token")
        world = World(api, directory=directory / "world", relays=plan.relays)
        # Entered before anything is started: whatever happens from here on, it ends what was started.
        with world:
            self._world = world
            world.agent_settings = HEAVY_USERS
            target = self._start("target")
            port = int(target.wait_for_line(r"^PORT (\d+)$")[1])
            world.targets[TARGET] = (f"127.0.0.1:{port}", ALICE.groups)
            world.start()
            ports = []
            for _ in range(plan.clients):
                process, local, observe = self._start_client()
                self._clients.append(process)
                self._observed.append(observe)
                ports.append(local)
            self._roles = {"agent": world.agent.pid} | {f"client-{i}": p.pid for i, p in enumerate(self._clients)}
            load = self._start("load", "--ports", ",".join(map(str, ports)), "--streams", str(plan.streams))
            load.wait_for_line("^READY$")
            tell(f"under load: {plan.streams} streams, {plan.clients} clients, {plan.relays} relays")
            begun = time.monotonic()
            before = self._memory()
            cpu = self._cpu()
            self._wait_and_kill(load, target, begun)
            ended = time.monotonic()
            after = self._memory()
            done = self._drain(load, target)
            drained = time.monotonic()
            metrics = self._metrics()
            cpu = {role: round(value - cpu[role], 1) for role, value in self._cpu().items()}
            for process in (*self._clients, world.agent):
                process.stop()  # before the relays, which else wait for them to leave by themselves
        near, far = read_ledger(directory / "load.jsonl"), read_ledger(directory / "target.jsonl")
        told = {index: reasons_told(client.stderr_path) for index, client in enumerate(self._clients)}
        accounts = settle(near, far, done["opened"], told)
        return {
            "started": started.isoformat(timespec="seconds"),
            "commit": version,
            "machine": machine,
            "command": plan.command,
            "plan": {"duration": plan.duration, "streams": plan.streams, "clients": plan.clients,
                     "relays": plan.relays, "every": plan.every, "seed": plan.seed.hex()},
            "duration_s": round(ended - begun, 1),
            "drain_s": round(drained - ended, 1),
            **_sums(accounts, metrics, len(self._kills)),
            "first_record": _first(accounts),
            **_stalls(stalls(near, far, self._kills), self._kills, self._back, begun),
            "load": done,
            "metrics": metrics,
            "resident_mb": {role: [before[role], after[role]] for role in before},
            "cpu_s": cpu,
            "failures": accounts.failures,
        }  # fmt: skip

    # -- processes --------------------------------------------------------------------------------------------------

    def _start(self, name: str, *arguments: str) -> ManagedProcess:
        """Start the load or the target."""
        ledger = self._directory / f"{name}.jsonl"
        plan = self._plan
        argv = [sys.executable, "-m", f"bench.soak.{name}", "--seed", plan.seed.hex(), "--ledger", str(ledger)]
        argv += ["--patience", str(plan.patience)]
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        process = ManagedProcess(
            [*argv, *arguments], log_dir=self._world.logs, name=name, env={"PYTHONPATH": path}, stdin=True
        )
        self._world.processes.append(process)
        return process

    def _start_client(self) -> tuple[ManagedProcess, int, int]:
        observe = fixed_port()
        process, port = self._world.start_forward(TARGET, ALICE, "--observe-listen", f"127.0.0.1:{observe}")
        return process, port, observe

    def _require_alive(self, *more: ManagedProcess) -> None:
        relays = [relay for index, relay in enumerate(self._world.relays) if index not in self._down]
        for process in (*self._clients, self._world.agent, *relays, *more):
            if not process.running:
                raise Broken(f"it ended by itself:\n{process.tail()}")

    # -- the time in between ----------------------------------------------------------------------------------------

    def _wait_and_kill(self, load: ManagedProcess, target: ManagedProcess, begun: float) -> None:
        plan = self._plan
        end, next_kill, next_line = begun + plan.duration, begun + plan.every, begun + PROGRESS
        while (now := time.monotonic()) < end:
            if now >= next_kill and len(self._kills) < plan.most_kills:
                self._kill(load, target)
                next_kill += plan.every
            for relay, due in list(self._down.items()):
                if now >= due:
                    self._restart(relay)
            if now >= next_line:
                self._progress(load, now - begun)
                next_line += PROGRESS
            self._require_alive(load, target)
            time.sleep(max(min(end, next_kill, next_line, *self._down.values(), now + LOOK) - time.monotonic(), 0))
        for relay in list(self._down):
            self._restart(relay)

    def _kill(self, load: ManagedProcess, target: ManagedProcess) -> None:
        number = len(self._kills)
        relay = number % self._plan.relays
        if relay in self._down:
            self._restart(relay)
        port = int(self._world.relay_listens[relay].rpartition(":")[2])
        hit = connected([client.pid for client in self._clients], port)
        for process in (load, target):
            process.send(f"kill {number}\n")
        at = time.monotonic()
        self._world.kill_relay(relay)
        self._down[relay] = at + self._random.uniform(*(min(some, self._plan.every / 3) for some in DOWN_FOR))
        clients = frozenset(index for index, client in enumerate(self._clients) if client.pid in hit)
        self._kills.append(Kill(number, relay, at, clients))

    def _restart(self, relay: int) -> None:
        del self._down[relay]
        self._world.start_relay(relay)
        kill = next(kill for kill in reversed(self._kills) if kill.relay == relay)
        self._back[kill.number] = round(time.monotonic() - kill.at, 2)

    def _progress(self, load: ManagedProcess, passed: float) -> None:
        so_far = _ask(load, "status")
        moved = (so_far["sent"] + so_far["received"]) / 1e6
        _STATUS.show(
            f"{passed:.0f} of {self._plan.duration:.0f} s: {so_far['live']} live, {so_far['opened']} opened, "
            f"{so_far['completed']} completed, "
            f"{so_far['failed']} failed, {moved:.0f} MB both ways, {len(self._kills)} relays killed, "
            f"{resumed(self._metrics()['clients'])} sessions resumed"
        )

    def _drain(self, load: ManagedProcess, target: ManagedProcess) -> dict[str, Any]:
        """End both ends in order, the load first, and return the load's last status."""
        mark = load.mark()
        load.send("drain\n")
        done = load.wait_for_line(
            r"^(\{.*\"done\".*\})$", stream="stdout", timeout=self._plan.patience + 60, after=mark
        )
        target.send("drain\n")
        target.wait(60)
        load.wait(10)
        result: dict[str, Any] = json.loads(done[1])
        return result

    # -- looking ----------------------------------------------------------------------------------------------------

    def _metrics(self) -> dict[str, Any]:
        """Return the counters about sessions, of the clients (summed) and of the agent."""
        clients: dict[str, float] = {}
        for port in self._observed:
            for name, value in scrape(port).items():
                clients[name] = clients.get(name, 0.0) + value
        return {"clients": clients, "agent": scrape(self._world.agent_observe)}

    def _memory(self) -> dict[str, float]:
        return {role: round(resident_bytes([pid]) / 1e6, 1) for role, pid in self._roles.items()}

    def _cpu(self) -> dict[str, float]:
        return {role: cpu_seconds([pid]) for role, pid in self._roles.items()}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What goes on the last line: everything that is one value, in the order of the result."""
    return {key: value for key, value in result.items() if key not in DETAILS}


DETAILS = frozenset(
    {"plan", "load", "metrics", "resident_mb", "cpu_s", "failures", "kills", "stalls_s", "first_record"}
)
"""What only `--out` has."""


def scrape(port: int) -> dict[str, float]:
    """The counters and gauges of a process that are about sessions and streams, by name."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://127.0.0.1:{port}/metrics", timeout=10
    ) as answer:
        text = answer.read().decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines if any(word in name for word in ABOUT)}


ABOUT = ("session", "replay", "detach", "resum", "local_")
"""Words by which the metrics are chosen that a result keeps."""


def reasons_told(log: Path) -> list[str]:
    """What a client's log says of each connection that it refused or cut."""
    reasons = []
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # words for people
        if entry.get("event") in ("connection cut", "connection refused"):
            reasons.append(str(entry.get("reason")))
    return reasons


def resumed(metrics: dict[str, float]) -> int:
    """Return how many sessions a role resumed, for any cause, by its metrics."""
    return int(sum(value for name, value in metrics.items() if "_sessions_resumed_total" in name))


_STATUS = StatusLine()
"""How far the soak is: the last line of a terminal."""


def tell(line: str) -> None:
    """Write a line that stays to stderr."""
    _STATUS.say(line)


def _ask(process: ManagedProcess, order: str) -> dict[str, Any]:
    mark = process.mark()
    process.send(f"{order}\n")
    answer: dict[str, Any] = json.loads(process.wait_for_line(r"^(\{.*\})$", stream="stdout", after=mark)[1])
    return answer


def _sums(accounts: Accounts, metrics: dict[str, Any], kills: int) -> dict[str, Any]:
    return {
        "opened": accounts.opened,
        "completed": accounts.completed,
        "failed": accounts.failed,
        "reasons": dict(accounts.reasons),
        "unexplained": accounts.unexplained,
        "sound": accounts.sound,
        "resumed": resumed(metrics["clients"]),
        "relay_kills": kills,
        "bytes_lost": accounts.bytes_lost,
        "bytes_doubled": accounts.bytes_doubled,
        "bytes_wrong": accounts.bytes_wrong,
        "bytes_up": accounts.bytes_up,
        "bytes_down": accounts.bytes_down,
        "records": accounts.records,
    }


def _first(accounts: Accounts) -> dict[str, Any]:
    """From a stream's opening to the first record back, whether a relay was away then or not."""
    waits = sorted(accounts.first_record_s)
    return {f"p{share}_s": percentile(waits, share / 100) for share in (50, 99, 100)}


def _stalls(
    found: Mapping[int, list[float]], kills: Sequence[Kill], back: Mapping[int, float], begun: float
) -> dict[str, Any]:
    every = sorted(stall for waits in found.values() for stall in waits)
    return {
        "stalls": len(every),
        "stall_p50_s": percentile(every, 0.5),
        "stall_p99_s": percentile(every, 0.99),
        "stall_max_s": percentile(every, 1.0),
        "stalls_s": {f"p{share}": percentile(every, share / 100) for share in (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)},
        "kills": [
            {
                "kill": kill.number,
                "relay": kill.relay,
                "at_s": round(kill.at - begun, 1),
                "relay_ready_again_after_s": back.get(kill.number),
                "sessions_hit": len(kill.clients),
                "streams_hit": len(found[kill.number]),
                "stall_p50_s": percentile(found[kill.number], 0.5),
                "stall_max_s": percentile(found[kill.number], 1.0),
            }
            for kill in kills
        ],
    }


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, so that what was started is ended; a shell that starts this in the background has
    SIGINT ignored, which is not meant here."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
