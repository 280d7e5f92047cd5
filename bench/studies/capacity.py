"""What one agent carries where API server and node are not the limit: commands at 30 in parallel, and LISTs of 10 MB.

    python -m bench.studies.capacity OUT [--rounds 5] [--seconds 5]
    python -m bench.studies.capacity --table RESULT

A command is what kubectl's WebSocket is: a TLS connection to the client's endpoint, an exec, its output and status. A
small Go program before the API server (`front`) answers commands in one pod and the list itself, and passes all else
on. Measured in turns: straight to the front, through the three roles to the front, and through the three roles and past
the front to the real kube-apiserver and the tests' node, which then are most of the cost. Each command's output and the
list's SHA-256 are compared. OUT is JSON; `--table` prints the rows of docs/benchmark/requests.md from one.
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
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trustme

from bench.machine import Steal, commit, describe
from bench.peers.go.build import programs
from bench.result import rounded
from bench.studies.kubernetes import LIST, MODULE, TRAFFIC, Way, _Bench, _run, _say, _Setting, _setting
from bench.usage import cpu_seconds
from tests.support.cluster import Cluster
from tests.support.world import ApiServer

AT_A_TIME = 30
WORD = "said in the pod"
COMMAND = "exec?command=echo&command=said+in+the+pod&stdout=true"
STATED = {"exec_per_s": 62.0, "agent_cpu_ms_per_exec": 6.0, "agent_cpu_ms_per_request": 1.7, "agent_cpu_s_per_gb": 13.5}
"""Teleport's agent, as its maintainers measured it with `tsh bench kube`: gravitational/teleport#68112; but for
`exec_per_s`, which our goal names and whose source is not known."""


class Capacity:
    """The measurements of one setting."""

    def __init__(self, tools: Path, directory: Path, setting: _Setting, front: Way, pid: int) -> None:
        self._tools = tools
        self._bench = _Bench(setting, tools, directory)
        self._ways = {"direct": front, "through": setting.ways[1]}
        processes = {process.name: process.pid for process in setting.cluster.processes}
        self._pids = {**setting.pids, "node": processes["node"], "front": pid}

    def round(self, number: int, seconds: float) -> dict[str, float]:
        """Measure everything once, in the other order each time."""
        measures = {
            "direct_exec": partial(self._execs, "direct", "front", seconds),
            "exec": partial(self._execs, "through", "front", seconds),
            "node_exec": partial(self._execs, "through", "shell", seconds),
            "direct_list": partial(self._lists, "direct", seconds),
            "list": partial(self._lists, "through", seconds),
        }
        found: dict[str, float] = {}
        for name, measure in list(measures.items())[:: 1 if number % 2 == 0 else -1]:
            steal = Steal()
            found |= {f"{name}_{key}": value for key, value in measure().items()}
            found[f"{name}_steal_percent"] = steal.percent()
        return found

    def _execs(self, way: str, pod: str, seconds: float) -> dict[str, float]:
        target = self._ways[way]
        path = f"/api/v1/namespaces/{TRAFFIC}/pods/{pod}/{COMMAND}"
        argv: list[str | os.PathLike[str]] = [self._tools / "receiver", "exec", f"-server={target.server}"]
        argv += [f"-path={path}", f"-seconds={seconds}", f"-count={AT_A_TIME}", f"-output={WORD}\n", *target.flags]
        before = self._cpu()
        said = json.loads(_run(argv, seconds))
        cpu = {role: (after - before[role]) / said["commands"] * 1e3 for role, after in self._cpu().items()}
        return {"per_s": said["per_s"], "p50_ms": said["p50_ms"], "p99_ms": said["p99_ms"]} | {
            f"{role}_cpu_ms": value for role, value in cpu.items() if value
        }

    def _lists(self, way: str, seconds: float) -> dict[str, float]:
        found = self._bench.lists(self._ways[way], seconds=seconds)
        return {name.removeprefix("list_").replace("_list_", "_"): value for name, value in found.items()}

    def _cpu(self) -> dict[str, float]:
        return {role: cpu_seconds([pid]) for role, pid in self._pids.items()}


def run(directory: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """All rounds; the result as it is kept."""
    tools = programs(MODULE, ("receiver", "front"), packages=("./receiver", "./front"))
    fronts: list[tuple[Way, int]] = []

    @contextmanager
    def front(cluster: Cluster, api: ApiServer) -> Iterator[ApiServer]:
        ca, files = trustme.CA(), {name: directory / f"front-{name}" for name in ("cert", "key", "roots")}
        leaf = ca.issue_cert("127.0.0.1")
        files["cert"].write_bytes(leaf.cert_chain_pems[0].bytes())
        files["key"].write_bytes(leaf.private_key_pem.bytes())
        files["roots"].write_bytes(ca.cert_pem.bytes())
        argv = [str(tools / "front"), f"-server={api.url}", f"-root-certs={api.ca_file}", f"-list={LIST}"]
        argv += [f"-cert={files['cert']}", f"-key={files['key']}", f"-output={WORD}\n"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                url = f"https://127.0.0.1:{process.stdout.readline().strip()}"
                fronts.append((Way("direct", url, files["cert"], files["key"], files["roots"]), process.pid))
                yield ApiServer(url, files["roots"], api.token_file)
            finally:
                process.kill()

    machine, runs = describe(), []
    with _setting(directory, front) as setting:
        (way, pid) = fronts[0]
        capacity = Capacity(tools, directory, setting, way, pid)
        capacity._lists("through", 0.1)  # the front fetches the list with the first one's token
        capacity.round(0, min(seconds, 1.0))
        for number in range(rounds):
            _say(f"capacity, round {number + 1} of {rounds}")
            runs.append(capacity.round(number, seconds))
    values = {name: rounded(statistics.median(one[name] for one in runs if name in one)) for name in runs[0]}
    return {
        "command": f"python -m bench.studies.capacity OUT --rounds {rounds} --seconds {seconds:g}",
        "commit": commit(),
        "machine": machine,
        "at_a_time": AT_A_TIME,
        "stated": STATED,
        "values": values,
        "runs": runs,
    }


def table(result: dict[str, Any]) -> str:
    """Return the rows of docs/benchmark/requests.md: Teleport's agent as stated, and ours as measured."""
    values, stated = result["values"], result["stated"]
    rows = (
        (
            f"exec/s, {result['at_a_time']} in parallel",
            f"{stated['exec_per_s']:.0f} (our goal's)",
            values["exec_per_s"],
            "{:.0f}",
        ),
        ("the agent's CPU, ms an exec", f"{stated['agent_cpu_ms_per_exec']:g}", values["exec_agent_cpu_ms"], "{:.2f}"),
        ("the agent's CPU, s/GB", f"{stated['agent_cpu_s_per_gb']:g}", values["list_agent_cpu_s_per_gb"], "{:.2f}"),
        ("LIST of 10 MB, MB/s", "–", values["list_mb_per_s"], "{:.0f}"),
        ("exec/s with kube-apiserver and node", "–", values["node_exec_per_s"], "{:.0f}"),
    )
    lines = [f"| {name} | {theirs} | {form.format(ours)} |" for name, theirs, ours, form in rows]
    return "\n".join(["| | Teleport states | arcbridge |", "|---|---|---|", *lines])


def main() -> None:
    """Measure, or print the table of a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--table", action="store_true", help="OUT is a result: print its table")
    options = parser.parse_args()
    if not options.table:
        with tempfile.TemporaryDirectory(prefix="arcbridge-capacity-") as scratch:
            found = run(Path(scratch), options.rounds, options.seconds)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(json.loads(options.out.read_text())), file=sys.stdout)


if __name__ == "__main__":
    main()
