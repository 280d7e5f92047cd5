"""One attack after the other: on roles started anew as shipped, with the honest callers alone, then beside it.

The API server is a real kube-apiserver for all of them, started once. Phases of an attack: the honest alone, the
attack, and what is left some seconds after the attacker has vanished without a word. Nothing here judges speed: the
result states figures and whether the goals were met.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcbridge.pki.authority import Authority
from arcbridge.pki.credentials import CLUSTER_CA_CERTIFICATE, DirectoryStore
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay.data_dir import open_authority
from bench import machine
from bench.hostile.attacks import ATTACKS, LARGE
from bench.hostile.place import Person, Place
from bench.hostile.watch import Watch, connections_opened
from bench.peers.base import Unavailable
from bench.studies.kubernetes import _way_of_kubeconfig
from tests.support.cluster import KUBERNETES_VERSION, Cluster
from tests.support.cluster import Unavailable as NoCluster
from tests.support.processes import ManagedProcess, run
from tests.support.world import ALICE, CLUSTER_AUDIENCE, RELAY_AUDIENCE, ApiServer, User, World, arcbridge

SETTLE = 2.0
"""Seconds of calls that count for nothing, before the honest are alone."""
HONEST, HOSTILE = 8, 2
"""Users: a fifth is hostile."""
RATIO, REFUSALS = 2.0, 0
"""Goals: honest p99 under attack over p99 alone, and honest calls refused under attack."""
FEWEST = 100
"""Calls of a kind below which its p99 is only its worst call, and no goal is judged by its ratio."""
ENROLMENTS = 500


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of each phase."""

    alone: float = 10.0
    attack: float = 15.0
    after: float = 5.0


class Setting:
    """The roles of one attack."""

    def __init__(self, cluster: Cluster, agent_token: Path, directory: Path, *, enrols: bool) -> None:
        self.world = World(ApiServer(cluster.api_url, cluster.ca_file, agent_token), directory=directory / "world")
        try:
            self.world.start()
            self.client = self.world.start_client(ALICE)
            self._way = _way_of_kubeconfig(self.client.kubeconfig, directory)
            self._join_token = self._many_uses() if enrols else ""
        except BaseException:
            self.world.stop()
            raise
        self.pids = {
            "relay": self.world.relay.pid,
            "agent": self.world.agent.pid,
            "client": self.client.process.pid,
            "apiserver": next(process.pid for process in cluster.processes if process.name == "kube-apiserver"),
        }

    def _many_uses(self) -> str:
        arguments = ["--role", "relay", "token", "create", "--cluster", self.world.cluster, "--uses", str(ENROLMENTS)]
        done = run(arcbridge(*arguments, "--config", str(self.world.relay_config), "-o", "json"))
        return str(json.loads(done.stdout)["token"])

    def place(self, names: Sequence[str]) -> Place:
        """The place as these people know it."""
        world, way = self.world, self._way
        authority = open_authority(world.relay_config.parent / "data")
        ca, key = Authority.create("spare"), make_key()
        certificate = authority.sign_agent(make_csr(key), "spare", life=86400.0, cluster_ca_pin=ca.pin)
        return Place(
            relay_port=world.relay_port,
            relay_ca=authority.certificate_pem,
            cluster=world.cluster,
            people=tuple(self._person(name) for name in names),
            endpoint_port=int(way.server.rpartition(":")[2]),
            endpoint_ca=way.roots.read_text(),
            endpoint_certificate=way.certificate.read_text(),
            endpoint_key=way.key.read_text(),
            join_token=self._join_token,
            cluster_ca=_cluster_ca(world.agent_config.parent / "state"),
            agent_certificate=certificate,
            agent_key=key,
            agent_ca=ca.certificate_pem,
        )

    def _person(self, name: str) -> Person:
        user = User(name, ALICE.groups)
        return Person(name, self.world.token(user, RELAY_AUDIENCE), self.world.token(user, CLUSTER_AUDIENCE))

    def written(self) -> dict[str, int]:
        """Bytes of audit and logs so far."""
        files = {"audit": self.world.audit_log}
        for role in ("relay", "agent"):
            files[f"{role}_log"] = self.world.logs / f"{role}.stderr.log"
        return {name: file.stat().st_size if file.exists() else 0 for name, file in files.items()}


def _cluster_ca(state: Path) -> str:
    """The cluster's CA as the agent's state directory keeps it."""
    entries = asyncio.run(DirectoryStore(state).load())
    assert entries is not None, "an agent that is ready has enrolled"
    return entries[CLUSTER_CA_CERTIFICATE].decode()


@contextmanager
def api_server(directory: Path) -> Iterator[tuple[Cluster, Path]]:
    """A kube-apiserver with the agent's rights, and the file with the agent's token."""
    try:
        cluster = Cluster(directory=directory / "cluster")
    except NoCluster as error:
        raise Unavailable(str(error)) from error
    with cluster:
        cluster.install_agent()
        cluster.grant("cluster-admin", group=ALICE.groups[0])
        token = directory / "agent-token"
        token.touch(mode=0o600)
        token.write_text(cluster.service_account_token("arcbridge", "arcbridge-agent", lifetime=24 * 3600))
        cluster.request(
            "GET", LARGE
        )  # the API server makes it when it is first asked for, which costs it a core for a while
        yield cluster, token


def measure(name: str, cluster: Cluster, agent_token: Path, directory: Path, phases: Phases) -> dict[str, Any]:
    """Run one attack beside honest callers and return what it did."""
    attack, load = ATTACKS[name], machine.load_average()
    directory.mkdir(mode=0o700, parents=True)
    setting = Setting(cluster, agent_token, directory, enrols=attack.enrols)
    world = setting.world
    try:
        honest = _begin(world, "bench.hostile.honest", setting.place([f"honest-{n}" for n in range(HONEST)]))
        hostile = _begin(world, "bench.hostile.attacker", setting.place([f"hostile-{n}" for n in range(HOSTILE)]), name)
        honest.wait_for_line("ready", stream="stdout", timeout=30)
        watch = Watch({**setting.pids, "honest": honest.pid, "attacker": hostile.pid})
        watch.start()
        time.sleep(SETTLE)
        alone, opened = time.monotonic(), connections_opened()
        time.sleep(phases.alone)
        attacked, opened_alone, written = time.monotonic(), connections_opened() - opened, setting.written()
        hostile.send("go\n")
        time.sleep(phases.attack)
        ended, opened_under = time.monotonic(), connections_opened() - opened - opened_alone
        hostile.close_stdin()
        got = json.loads(hostile.wait_for_line(r"^(\{.*\})$", stream="stdout", timeout=20)[1])
        time.sleep(phases.after)
        watch.stop()
        honest.close_stdin()
        honest.wait(20)
        time.sleep(0.5)  # the audit's writer
        after = setting.written()
        return {
            "title": attack.title,
            "api_server": f"kube-apiserver {KUBERNETES_VERSION}",
            "commit": machine.commit(),
            "load_average_before": load,
            "seconds": {"alone": phases.alone, "attack": phases.attack, "after": phases.after},
            "honest": _honest(honest.stdout_path.read_text(), alone, attacked, ended, watch),
            "idle_share": {"alone": watch.idle(alone, attacked), "attack": watch.idle(attacked, ended)},
            "roles": watch.over(alone, attacked, ended),
            "audit": _audit(world.audit_log, written["audit"]),
            "log_bytes": {role: after[f"{role}_log"] - written[f"{role}_log"] for role in ("relay", "agent")},
            "connections_opened_per_s": {
                "alone": round(opened_alone / (attacked - alone), 1),
                "attack": round(opened_under / (ended - attacked), 1),
            },
            "attacker_got": got,
        }
    finally:
        world.stop()


def _begin(world: World, module: str, place: Place, *arguments: str) -> ManagedProcess:
    argv = [sys.executable, "-m", module, *arguments]
    process = ManagedProcess(argv, log_dir=world.logs, name=module.rpartition(".")[2], stdin=True)
    world.processes.append(process)
    process.send(place.line() + "\n")
    return process


# -- what came of it --------------------------------------------------------------------------------------------------


def _honest(lines: str, alone: float, attacked: float, ended: float, watch: Watch) -> dict[str, Any]:
    """Per kind: the calls that began while the honest were alone, and those that began under attack."""
    calls: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    for line in lines.splitlines():
        kind, tab, rest = line.partition("\t")
        if not tab:
            continue
        begun, took, how = rest.split("\t", 2)
        phase = "alone" if alone <= float(begun) < attacked else "attack" if attacked <= float(begun) < ended else ""
        if phase:
            calls.setdefault(kind, {"alone": [], "attack": []})[phase].append((float(begun), float(took), how))
    found = {}
    for kind, phases in calls.items():
        told = {phase: _distribution([(took, how) for _, took, how in some]) for phase, some in phases.items()}
        if told["alone"]["p99_ms"]:
            told["attack"]["slow"] = _slow(phases["attack"], RATIO * told["alone"]["p99_ms"], attacked, watch)
        found[kind] = {
            **told,
            **{
                f"{p}_ratio": round(told["attack"][f"{p}_ms"] / told["alone"][f"{p}_ms"], 2)
                for p in ("p50", "p99")
                if told["alone"][f"{p}_ms"] and told["attack"][f"{p}_ms"]
            },
        }
    return found


def _slow(calls: list[tuple[float, float, str]], bound: float, attacked: float, watch: Watch) -> dict[str, Any]:
    """Return when the calls began that took more than `bound` milliseconds, in seconds of the attack, and how many of
    them met a machine without a core to spare."""
    slow = [(begun, took) for begun, took, how in calls if how == "ok" and took > bound]
    return {
        "calls": len(slow),
        "began_s": [round(begun - attacked, 2) for begun, _ in slow],
        "on_a_full_machine": sum(watch.full(begun, begun + took / 1000) for begun, took in slow),
    }


def _distribution(calls: list[tuple[float, str]]) -> dict[str, Any]:
    good = sorted(took for took, how in calls if how == "ok")
    refused = Counter(how for _, how in calls if how != "ok")
    return {
        "calls": len(calls),
        "p50_ms": _share(good, 0.5),
        "p99_ms": _share(good, 0.99),
        "max_ms": _share(good, 1.0),
        "refused": sum(refused.values()),
        "refused_as": dict(refused.most_common()),
    }


def _share(ascending: Sequence[float], share: float) -> float | None:
    """The least value that `share` of the values do not exceed, milliseconds."""
    return round(ascending[max(math.ceil(share * len(ascending)) - 1, 0)], 2) if ascending else None


def _audit(log: Path, before: int) -> dict[str, Any]:
    """What the agent's audit log got since it had `before` bytes, by whose it is and how it came out."""
    with log.open("rb") as file:
        file.seek(before)
        data = file.read()
    whose: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the file was cut within a line
        side = "hostile" if str(record.get("user", "")).startswith("hostile-") else "honest"
        whose[side] += 1
        if side == "hostile":
            outcomes[str(record.get("outcome", record.get("event")))] += 1
    return {"bytes": len(data), "records": dict(whose), "hostile_outcomes": dict(outcomes.most_common())}


def goals(found: dict[str, Any]) -> dict[str, bool]:
    """Whether an attack left the honest what they must have: no refusal, and at most twice the p99 where there are
    enough calls for one."""
    kinds = found["honest"]
    judged = [kind for kind, told in kinds.items() if told["alone"]["calls"] >= FEWEST]
    return {
        "no_honest_refusals": all(told["attack"]["refused"] <= REFUSALS for told in kinds.values()),
        "p99_within_twice": all(kinds[kind].get("p99_ratio", math.inf) <= RATIO for kind in judged),
    }


def table(name: str, found: dict[str, Any]) -> str:
    """An attack's figures for people."""
    lines = [f"{name}: {found['title']}"]
    for kind, told in found["honest"].items():
        alone, under = told["alone"], told["attack"]
        lines.append(
            f"  {kind:8} p50 {_ms(alone['p50_ms'])} -> {_ms(under['p50_ms'])}  p99 {_ms(alone['p99_ms'])} -> "
            f"{_ms(under['p99_ms'])} ms ({told.get('p99_ratio', '-')}x)  refused {under['refused']} of {under['calls']}"
            + (f"  {under['refused_as']}" if under["refused"] else "")
        )
    for role, held in found["roles"].items():
        rss, fds, cpu, waited = (held[what] for what in ("rss_mib", "descriptors", "cpu_cores", "waited_cores"))
        lines.append(
            f"  {role:9} RSS {rss['before']} -> {rss['peak']} -> {rss['after']} MiB  descriptors {fds['before']} -> "
            f"{fds['peak']} -> {fds['after']}  CPU {cpu['alone']} -> {cpu['attack']} cores, waited for one "
            f"{waited['alone']} -> {waited['attack']}"
        )
    get, idle = found["honest"]["get"]["attack"].get("slow"), found["idle_share"]
    if get is not None:
        lines.append(
            f"  {get['calls']} slow GETs, {get['on_a_full_machine']} of them while no core was idle; idle share "
            f"{idle['alone']['mean']} -> {idle['attack']['mean']}, at least {idle['attack']['least']}"
        )
    audit = found["audit"]
    lines.append(
        f"  records {audit['records']} ({audit['bytes'] / 1e6:.2f} MB, hostile: {audit['hostile_outcomes']}), logs "
        f"{found['log_bytes']} bytes, connections opened each second {found['connections_opened_per_s']}"
    )
    lines.append(f"  attacker got {found['attacker_got']}")
    lines.append(f"  goals {goals(found)}")
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
