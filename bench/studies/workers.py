"""P13: a relay with two workers against one with one; bulk over many sessions at once.

The relay is to be the bottleneck, so its ends are light: they are joined as the product joins them, over real outer
TLS, and then a program in C (`bench/load/pour.c`) writes into the clients' ends and drops what comes out of the agents'
ends in the kernel. To the relay, which is blind, the bytes are the same as encrypted ones.

Two measurements, each in turns of the one relay and the other, in the same run:

* *as they are*: on a machine with two cores the ends need a part of the second one, so that two workers have less than
  two cores; the CPU time of each side says how much less;
* *held*: each worker may use `SHARE` of a core (a control group of its own), so that all of them and the ends together
  fit into the machine. That is the question "what does a second core give, where it is free?" on a machine that has
  none; it needs the right to make control groups, and is left out, with a note, where that is missing.

    python -m bench.studies.workers --rounds 3 --seconds 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay.data_dir import open_authority
from bench.herd.sessions import Orders
from bench.load.generator import LoadFailed
from bench.process import NotReady
from bench.result import rounded
from bench.studies.base import Study
from bench.usage import cpu_seconds, with_descendants
from tests.support.processes import ProcessFailed
from tests.support.world import ALICE, RELAY_AUDIENCE, ApiServer, World

SESSIONS = 32
WARMUP = 0.5
SHARE = 0.3
"""Of a core, for each held worker: two, and the ends at twice one's speed, then take about half of two cores."""
PERIOD_US = 5000
"""Of a control group: short, so that a held worker runs often and never for long."""
GROUPS = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
NAMES = {1: "one", 2: "two"}


class Workers(Study):
    """P13."""

    name = "workers"
    title = f"a relay with two workers against one with one: bulk over {SESSIONS} sessions, ends that are light"
    expected_s = 60.0

    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        runs: list[dict[str, Any]] = []
        notes: list[str] = []
        with ExitStack() as stack:
            sides = {count: stack.enter_context(_side(directory / NAMES[count], count)) for count in NAMES}
            for turn in range(rounds):
                for count in sorted(NAMES, reverse=bool(turn % 2)):
                    runs.append({"held": False, **sides[count].measure(seconds)})
            with _held([pid for side in sides.values() for pid in side.movers()]) as held:
                if not held:
                    notes.append("not held: this user may not make control groups here, so no core could be kept free")
                for turn in range(rounds if held else 0):
                    for count in sorted(NAMES, reverse=bool(turn % 2)):
                        runs.append({"held": True, **sides[count].measure(seconds)})
            notes += [f"{NAMES[count]}: sessions by worker {side.spread()}" for count, side in sides.items()]
        values = _values(runs)
        return {
            "values": {name: rounded(value) for name, value in values.items()},
            "runs": runs,
            "notes": [*_limits(values), *notes],
        }


class _Side:
    """One relay, and the process that holds the ends of its sessions."""

    def __init__(self, world: World, workers: int, ends: subprocess.Popen[str]) -> None:
        self._world = world
        self._workers = workers
        self._ends = ends

    def movers(self) -> list[int]:
        """The processes that move bytes: the relay itself, or its workers."""
        relay = self._world.relay.pid
        return [relay] if self._workers == 1 else [pid for pid in with_descendants(relay) if pid != relay]

    def measure(self, seconds: float) -> dict[str, Any]:
        assert self._ends.stdin is not None
        before = {pid: cpu_seconds([pid]) for pid in self.movers()}
        self._ends.stdin.write(f"{seconds} {WARMUP}\n")
        self._ends.stdin.flush()
        poured = self._told()
        if "error" in poured:
            raise LoadFailed(poured["error"])
        spent = [cpu_seconds([pid]) - before[pid] for pid in before]
        moved = poured["total_bytes"] / 1e9
        return {
            "workers": self._workers,
            "mb_per_s": poured["mb_per_s"],
            "relay_cpu_s_per_gb": sum(spent) / moved,
            "ends_cpu_s_per_gb": poured["cpu_s"] / moved,
            "cpu_s_by_worker": [round(one, 2) for one in spent],
        }

    def spread(self) -> str:
        from tests.support.reports import metrics

        seen = metrics(self._world.relay_observe)
        if self._workers == 1:
            return str(int(seen["arcbridge_relay_pumps_open"]))
        return " and ".join(
            str(int(seen[f'arcbridge_relay_worker_sessions{{worker="{index}"}}'])) for index in range(self._workers)
        )

    def joined(self) -> None:
        if self._told().get("paired") != SESSIONS:
            raise NotReady("not all sessions were joined")

    def _told(self) -> dict[str, Any]:
        assert self._ends.stdout is not None
        line = self._ends.stdout.readline()
        if not line:
            raise NotReady(f"the ends' process ended with {self._ends.wait()}")
        told: dict[str, Any] = json.loads(line)
        return told


@contextmanager
def _side(directory: Path, workers: int) -> Iterator[_Side]:
    directory.mkdir()
    unused = directory / "agent-token"
    unused.write_text("never-asked-for")
    with World(ApiServer("https://127.0.0.1:1", token_file=unused), directory=directory / "world") as world:
        world.relay_settings = f"workers = {workers}"
        world.start_issuer()
        try:
            world.start_relay()
        except ProcessFailed as error:
            raise NotReady(str(error)) from error
        authority = open_authority(world.relay_config.parent / "data")
        ca, key = Authority.create("ends"), make_key()
        orders = Orders(
            host="127.0.0.1",
            port=world.relay_port,
            relay_ca=authority.certificate_pem,
            cluster="ends",
            certificate=authority.sign_agent(make_csr(key), "ends", life=86400.0, cluster_ca_pin=ca.pin),
            key=key,
            cluster_ca=ca.certificate_pem,
            token=world.token(ALICE, RELAY_AUDIENCE),
            sessions=SESSIONS,
            sources=8,
            net=workers,
        )
        ends = subprocess.Popen(
            [sys.executable, "-m", "bench.herd.pour"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert ends.stdin is not None
            ends.stdin.write(json.dumps(asdict(orders)) + "\n")
            ends.stdin.flush()
            side = _Side(world, workers, ends)
            side.joined()
            yield side
        finally:
            ends.kill()
            ends.wait()
            for stream in (ends.stdin, ends.stdout):
                if stream is not None:
                    stream.close()


@contextmanager
def _held(pids: list[int]) -> Iterator[bool]:
    """Each of these processes in a control group that gives it `SHARE` of a core; False: no such group can be made."""
    made: list[Path] = []
    root = next((one for one in GROUPS if (one / "cgroup.procs").exists()), None)
    try:
        for pid in pids if root is not None else []:
            assert root is not None
            group = root / f"arcbridge-bench-{os.getpid()}-{pid}"
            group.mkdir()
            made.append(group)
            if (group / "cpu.cfs_quota_us").exists():
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(int(PERIOD_US * SHARE)))
            else:
                (group / "cpu.max").write_text(f"{int(PERIOD_US * SHARE)} {PERIOD_US}")
            (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        _free(made, root)
        made = []
    try:
        yield bool(made)
    finally:
        _free(made, root)


def _free(made: list[Path], root: Path | None) -> None:
    for group in made:
        assert root is not None
        for pid in (group / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(pid)
        group.rmdir()


def _values(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians; `held_…` of the runs with a share of a core each."""
    values: dict[str, float] = {}
    for held in (False, True):
        prefix = "held_" if held else ""
        for workers, name in NAMES.items():
            found = [run for run in runs if run["held"] is held and run["workers"] == workers]
            for metric in ("mb_per_s", "relay_cpu_s_per_gb", "ends_cpu_s_per_gb") if found else ():
                values[f"{prefix}{name}_{metric}"] = statistics.median(run[metric] for run in found)
        if f"{prefix}one_mb_per_s" in values:
            values[f"{prefix}ratio"] = values[f"{prefix}two_mb_per_s"] / values[f"{prefix}one_mb_per_s"]
    return values


def _limits(values: dict[str, float]) -> list[str]:
    """What limited each, from speed and CPU time per byte."""
    cores = len(os.sched_getaffinity(0))
    notes = []
    for prefix, what in (("", ""), ("held_", ", held")):
        for name in NAMES.values() if f"{prefix}ratio" in values else ():
            gigabytes = values[f"{prefix}{name}_mb_per_s"] / 1e3
            relay, ends = (gigabytes * values[f"{prefix}{name}_{who}_cpu_s_per_gb"] for who in ("relay", "ends"))
            notes.append(f"{name}{what}: the relay used {relay:.2f} cores and the ends {ends:.2f}, of {cores}")
    if "held_ratio" in values:
        notes.append(f"held: each worker had at most {SHARE} of a core: ratio {values['held_ratio']:.2f}")
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="arcbridge-workers-") as directory:
        found = Workers().run(Path(directory), rounds=options.rounds, seconds=options.seconds)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
