"""kubectl's way: GET, LIST, watches and exec through client, relay and agent, beside the same straight to the API
server.

A real kube-apiserver with etcd. *Through*: the kubeconfig that the client wrote, its local HTTPS endpoint, the three
roles as shipped (policy, audit to a file, resumption), impersonation at the API server. *Direct*: the API server with a
client certificate of the same user. Both take turns within each round, and the first of a round is the other's second.

vegeta asks for one object in a closed loop; `receiver`, a small Go program, lists 10 MB and holds 500 watches; kubectl
executes a command, one after the other. What came is compared: each answer is 200, each list has the SHA-256 of the
first (but for the list's own version), each watch sees each write, in order, each command's output is what was asked.
"""

from __future__ import annotations

import base64
import json
import os
import random
import ssl
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bench.load.generator import GRACE, LoadFailed
from bench.peers.base import Unavailable
from bench.peers.go.build import programs, required_version
from bench.process import NotReady
from bench.studies.base import Study
from bench.usage import cpu_seconds, resident_bytes
from tests.support.cluster import KUBERNETES_VERSION, Cluster, Kubectl
from tests.support.cluster import Unavailable as NoCluster
from tests.support.processes import ProcessFailed
from tests.support.world import ALICE, HEAVY_USERS, ApiServer, World

MODULE = "kubernetes"
VEGETA = "github.com/tsenart/vegeta/v12"
NAMESPACE = "bench"
OBJECT = "/api/v1/namespaces/default"
LIST = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
LIST_OBJECTS = 100
LIST_OBJECT_BYTES = 100 * 1024
"""Of text in one ConfigMap; 100 of them are a list of 10 MB."""
WATCHED = "watched"
WATCHES = 500
EVENTS = 20
POD = "shell"
EXECS = 40
"""In a round and way: 40 of 4 ms are 16 ticks of the clock that tells CPU time."""
WARM_UP = 1.0
"""Seconds of requests on each way before anything counts."""
TRAFFIC = "traffic"
"""The namespace of the object that is watched, so that writing it changes no list."""


@dataclass(frozen=True, slots=True)
class Way:
    """How to reach the API server, and as whom: a URL and three PEM files."""

    name: str
    server: str
    certificate: Path
    key: Path
    roots: Path

    @property
    def flags(self) -> list[str]:
        """The flags that vegeta and the receiver take."""
        return [f"-cert={self.certificate}", f"-key={self.key}", f"-root-certs={self.roots}"]

    @property
    def kubeconfig(self) -> str:
        """The kubeconfig that kubectl takes."""
        cluster = {"server": self.server, "certificate-authority": str(self.roots)}
        user = {"client-certificate": str(self.certificate), "client-key": str(self.key)}
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": self.name, "cluster": cluster}],
                "users": [{"name": self.name, "user": user}],
                "contexts": [{"name": self.name, "context": {"cluster": self.name, "user": self.name}}],
                "current-context": self.name,
            }
        )


class Kubernetes(Study):
    """P10 and P15, and the time from a new connection to the answer on a client that runs."""

    name = "kubernetes"
    expected_s = 200.0
    title = (
        f"kube-apiserver {KUBERNETES_VERSION}: GET, LIST of 10 MB, {WATCHES} watches and exec through all roles, "
        "and directly"
    )

    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        tools = programs(MODULE, ("vegeta", "receiver"), packages=("tool", "./receiver"))
        with _setting(directory) as setting:
            bench = _Bench(setting, tools, directory)
            _say("warming up")
            for way in setting.ways:
                bench.get(way, workers=8, seconds=WARM_UP)
                bench.exec(way, count=1)
            runs = []
            for number in range(rounds):
                _say(f"round {number + 1} of {rounds}")
                runs.append(bench.round(number, seconds))
            names = sorted({name for run in runs for name in run})
            values: dict[str, Any] = {
                name: statistics.median(run[name] for run in runs if name in run) for name in names
            }
            values["watches"] = WATCHES
            values["list_bytes"] = bench.list_bytes
            notes = [
                f"load: vegeta {required_version(MODULE, VEGETA)}, closed loop, HTTP/1.1; lists and watches: receiver; "
                "exec: kubectl, one command after the other, each with a GET of its pod before it",
                "direct: the same user with a client certificate of his own; the agent: a service account's token",
                *setting.prove_identity(),
                *bench.compare_audit(),
            ]
            if values["direct_list_mb_per_s"] < 300:
                notes.append(
                    "the API server itself lists fewer than 300 MB/s here, as JSON: "
                    f"{values['direct_list_mb_per_s']:.0f} MB/s directly, {values['list_mb_per_s']:.0f} MB/s through; "
                    f"list_ratio {values['list_ratio']:.2f} is what says something about the way. As protobuf: "
                    f"{values['direct_list_protobuf_mb_per_s']:.0f} directly, "
                    f"{values['list_protobuf_mb_per_s']:.0f} through"
                )
            return {"values": values, "runs": runs, "notes": notes}


class _Setting:
    """The cluster and the organisation, and the two ways to it."""

    def __init__(self, cluster: Cluster, world: World, through: Way, direct: Way, pids: Mapping[str, int]) -> None:
        self.cluster = cluster
        self.world = world
        self.ways = (direct, through)
        self.pids = pids

    def prove_identity(self) -> list[str]:
        """Say as whom the API server sees each way's requests. Raises LoadFailed unless both are the same user."""
        users = {way.name: _whoami(way) for way in self.ways}
        if set(users.values()) != {ALICE.email}:
            raise LoadFailed(f"requests run as {users}, and not all as {ALICE.email}")
        return [f"both ways run as {ALICE.email}, as the API server says (SelfSubjectReview)"]


class _Bench:
    """The measurements; each returns numbers by name."""

    def __init__(self, setting: _Setting, tools: Path, directory: Path) -> None:
        self._setting = setting
        self._tools = tools
        self._directory = directory
        self._asked = 0
        """Requests of vegeta's that went through."""
        self._executed = 0
        """Commands that went through."""
        self._kubectls: dict[str, Kubectl] = {}
        self._sums: dict[str, str] = {}
        """SHA-256 of the list, by how it is encoded."""
        self.list_bytes = 0

    def round(self, number: int, seconds: float) -> dict[str, float]:
        """Measure everything once on both ways, in turns."""
        ways = self._setting.ways if number % 2 == 0 else self._setting.ways[::-1]
        run: dict[str, float] = {}

        def both(measure: Callable[[Way], dict[str, float]]) -> None:
            for way in ways:
                prefix = "direct_" if way.name == "direct" else ""
                measured = measure(way)
                idle = ("client_", "relay_", "agent_") if prefix else ()  # roles that direct requests do not meet
                run.update({prefix + name: value for name, value in measured.items() if not name.startswith(idle)})

        both(lambda way: self.get(way, workers=1, seconds=seconds))
        both(lambda way: self.get(way, workers=8, seconds=seconds))
        both(lambda way: self.get(way, workers=32, seconds=seconds))
        both(lambda way: self.get(way, workers=1, seconds=max(1.0, seconds / 2), keep=False))
        both(lambda way: self.lists(way, seconds=seconds))
        both(lambda way: self.lists(way, seconds=seconds, kind="gzip"))
        both(lambda way: self.lists(way, seconds=seconds, kind="protobuf"))
        both(self.watch)
        both(self.exec)
        run["get_p50_overhead_ms"] = (run["get_p50_us"] - run["direct_get_p50_us"]) / 1000
        run["get_p99_overhead_ms"] = (run["get_p99_us"] - run["direct_get_p99_us"]) / 1000
        for name in ("get", "get_8"):
            run[f"{name}_ratio"] = run[f"{name}_per_s"] / run[f"direct_{name}_per_s"]
        for name in ("list", "list_gzip", "list_protobuf"):
            run[f"{name}_ratio"] = run[f"{name}_mb_per_s"] / run[f"direct_{name}_mb_per_s"]
        return run

    def get(self, way: Way, *, workers: int, seconds: float, keep: bool = True) -> dict[str, float]:
        """GETs of one object by `workers`, each the next when it has its answer. `keep=False`: a connection each."""
        results = self._directory / "vegeta.bin"
        command: list[str | os.PathLike[str]] = [
            self._tools / "vegeta",
            "attack",
            "-rate=0",
            f"-workers={workers}",
            f"-max-workers={workers}",
        ]
        command += [f"-connections={workers}", "-http2=false", f"-duration={seconds}s", f"-output={results}"]
        command += [f"-keepalive={'true' if keep else 'false'}", *way.flags]
        before = self._cpu()
        _run(command, seconds, f"GET {way.server}{OBJECT}\n")
        spent = {role: after - before[role] for role, after in self._cpu().items()}
        said = json.loads(_run([self._tools / "vegeta", "report", "-type=json", results], 0))
        results.unlink()
        count = said["requests"]
        if said["status_codes"] != {"200": count} or said["errors"]:
            raise LoadFailed(f"GET {way.name}: {said['status_codes']} {said['errors'][:3]}")
        if way.name != "direct":
            self._asked += count
        latencies = said["latencies"]
        if not keep:
            return {f"first_byte_p{p}_us": latencies[f"{p}th"] / 1000 for p in (50, 99)}
        cpu = {f"{role}_cpu_us_per_request": value / count * 1e6 for role, value in spent.items()}
        match workers:
            case 1:
                return {f"get_p{p}_us": latencies[f"{p}th"] / 1000 for p in (50, 90, 99)}
            case 32:
                return {"get_per_s": said["throughput"], "get_32_p99_us": latencies["99th"] / 1000, **cpu}
            case _:
                return {f"get_{workers}_per_s": said["throughput"], f"get_{workers}_p99_us": latencies["99th"] / 1000}

    def lists(self, way: Way, *, seconds: float, kind: str = "") -> dict[str, float]:
        """LISTs one after the other: bytes of the list (before gzip) over the time from asking to the last byte.

        `kind`: JSON without gzip, `gzip` (kubectl offers it), or `protobuf` (controllers ask for it).
        """
        command: list[str | os.PathLike[str]] = [self._tools / "receiver", "list", f"-server={way.server}"]
        command += [f"-path={LIST}", f"-seconds={seconds}", *way.flags, *([f"-{kind}"] if kind else [])]
        before = self._cpu()
        said = json.loads(_run(command, seconds))
        spent = {role: after - before[role] for role, after in self._cpu().items()}
        encoding = "protobuf" if kind == "protobuf" else "json"
        if not said["consistent"] or said["sha256"] != self._sums.setdefault(encoding, said["sha256"]):
            raise LoadFailed(f"LIST {way.name}: its bytes are not those of the first list")
        if said["compressed"] != (kind == "gzip"):
            raise LoadFailed(f"LIST {way.name} {kind}: gzip was not as it was asked for")
        rate = said["bytes"] / said["seconds"] / 1e6
        if kind == "gzip":
            return {"list_gzip_mb_per_s": rate, "list_gzip_sent_mb_per_s": said["wire_bytes"] / said["seconds"] / 1e6}
        moved = (said["requests"] + 1) * said["bytes_per_list"] / 1e9
        if kind:
            cpu = {f"{role}_list_{kind}_cpu_s_per_gb": value / moved for role, value in spent.items()}
            return {f"list_{kind}_mb_per_s": rate, **cpu}
        self.list_bytes = said["bytes_per_list"]
        cpu = {f"{role}_list_cpu_s_per_gb": value / moved for role, value in spent.items()}
        return {"list_mb_per_s": rate, "list_first_byte_ms": said["first_byte_s"] / said["requests"] * 1000, **cpu}

    def watch(self, way: Way) -> dict[str, float]:
        """Watches of one object, all open at once: from asking to write it until a watch has read the event."""
        command: list[str | os.PathLike[str]] = [
            self._tools / "receiver",
            "watch",
            f"-server={way.server}",
            f"-namespace={TRAFFIC}",
        ]
        command += [f"-name={WATCHED}", f"-count={WATCHES}", f"-events={EVENTS}", *way.flags]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            try:
                assert process.stdout is not None
                opened = process.stdout.readline().strip()
                memory = {
                    f"{role}_watch_rss_mb": resident_bytes([pid]) / 1e6 for role, pid in self._setting.pids.items()
                }
                out, err = process.communicate("\n" if opened == "open" else None, timeout=GRACE + 30)
            except BaseException as error:
                process.kill()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise LoadFailed(f"watches {way.name}: no end within {error.timeout:.0f} s") from error
                raise
        if opened != "open" or process.returncode:
            raise LoadFailed(f"watches {way.name}: {err.strip()[-500:]}")
        said = json.loads(out.splitlines()[-1])
        return {
            "watch_event_p50_ms": said["p50_ms"],
            "watch_event_p99_ms": said["p99_ms"],
            "watch_last_p50_ms": said["all_p50_ms"],
            "watch_open_s": said["open_s"],
            **memory,
        }

    def exec(self, way: Way, *, count: int = EXECS) -> dict[str, float]:
        """Commands in a pod by kubectl, one after the other: until kubectl has ended; CPU time of each role."""
        kubectl = self._kubectl(way)
        taken = []
        before = self._cpu()
        for number in range(count):
            begun = time.perf_counter()
            said = kubectl.run("exec", "-n", TRAFFIC, POD, "--", "echo", f"{way.name} {number}").stdout
            taken.append(time.perf_counter() - begun)
            if said != f"{way.name} {number}\n":
                raise LoadFailed(f"exec {way.name}: it said {said[-100:]!r}")
        spent = {role: after - before[role] for role, after in self._cpu().items()}
        if way.name != "direct":
            self._executed += count
        cpu = {f"{role}_cpu_ms_per_exec": value / count * 1e3 for role, value in spent.items()}
        return {"exec_p50_ms": statistics.median(taken) * 1e3, **cpu}

    def _kubectl(self, way: Way) -> Kubectl:
        if way.name not in self._kubectls:
            home = _private(self._directory / f"kubectl-{way.name}")
            (home / "config").write_text(way.kubeconfig)
            self._kubectls[way.name] = Kubectl(self._setting.cluster.binaries.kubectl, home / "config", home)
        return self._kubectls[way.name]

    def compare_audit(self) -> list[str]:
        """The agent's audit log must have a record of each request that went through it."""
        kept = self._setting.world.audit_records()
        gets = sum(
            record.get("verb") == "get" and record.get("resource") == "namespaces" and record.get("status") == 200
            for record in kept
        )
        execs = sum(record.get("subresource") == "exec" and record.get("outcome") == "upgraded" for record in kept)
        for what, records, asked in (("requests", gets, self._asked), ("commands", execs, self._executed)):
            if records < asked:
                raise LoadFailed(f"the agent's audit log has {records} records of {asked} {what}")
        return [f"the agent's audit log has a record of each of the {self._asked} GETs and {self._executed} commands"]

    def _cpu(self) -> dict[str, float]:
        return {role: cpu_seconds([pid]) for role, pid in self._setting.pids.items()}


Front = Callable[[Cluster, ApiServer], AbstractContextManager[ApiServer]]
"""Puts something before the API server of a cluster, and says how the agent reaches that."""


@contextmanager
def _setting(directory: Path, front: Front = lambda _, api: nullcontext(api)) -> Iterator[_Setting]:
    _say("starting etcd, kube-apiserver, issuer, relay, agent and client")
    try:
        cluster = Cluster(directory=directory / "cluster")
    except NoCluster as error:
        raise Unavailable(str(error)) from error
    except ProcessFailed as error:
        raise NotReady(str(error)) from error
    with cluster:
        try:
            cluster.install_agent()
            cluster.grant("cluster-admin", group=ALICE.groups[0])
            _fill(cluster)
            token = directory / "agent-token"
            token.touch(mode=0o600)
            token.write_text(cluster.service_account_token("arcbridge", "arcbridge-agent", lifetime=24 * 3600))
            direct_api = ApiServer(cluster.api_url, cluster.ca_file, token)
            with front(cluster, direct_api) as api, World(api, directory=directory / "world") as world:
                world.agent_settings = HEAVY_USERS
                world.start()
                client = world.start_client(ALICE)
                through = _way_of_kubeconfig(client.kubeconfig, _private(directory / "through"))
                direct = _direct_way(cluster, _private(directory / "direct"))
                programs = {process.name: process.pid for process in cluster.processes}
                pids = {
                    "client": client.process.pid,
                    "relay": world.relay.pid,
                    "agent": world.agent.pid,
                    "apiserver": programs["kube-apiserver"],
                    "etcd": programs["etcd"],
                }
                yield _Setting(cluster, world, through, direct, pids)
        except ProcessFailed as error:
            raise NotReady(str(error)) from error


def _fill(cluster: Cluster) -> None:
    """The objects that are listed, which gzip makes a quarter smaller; elsewhere the one that is watched, and a pod."""
    numbers = random.Random(1)
    for place in range(LIST_OBJECTS):
        text = base64.b64encode(numbers.randbytes(LIST_OBJECT_BYTES * 3 // 4)).decode()
        _create(cluster, f"list-{place}", NAMESPACE, {"text": text})
    _create(cluster, WATCHED, TRAFFIC, {"event": "none"})
    cluster.add_pod(POD, TRAFFIC)


def _create(cluster: Cluster, name: str, namespace: str, data: dict[str, str]) -> None:
    cluster.ensure_namespace(namespace)
    cluster.request("POST", f"/api/v1/namespaces/{namespace}/configmaps", {"metadata": {"name": name}, "data": data})


def _way_of_kubeconfig(file: Path, directory: Path) -> Way:
    """What kubectl would do with the kubeconfig that the client wrote."""
    import yaml  # the client writes YAML where the file was YAML before

    document = yaml.safe_load(file.read_text())
    cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
    way = Way("through", cluster["server"], directory / "cert", directory / "key", directory / "roots")
    for path, text in (
        (way.certificate, user["client-certificate-data"]),
        (way.key, user["client-key-data"]),
        (way.roots, cluster["certificate-authority-data"]),
    ):
        path.write_bytes(base64.b64decode(text))
    return way


def _direct_way(cluster: Cluster, directory: Path) -> Way:
    certificate, key = cluster.client_certificate(ALICE.email, ALICE.groups)
    way = Way("direct", cluster.api_url, directory / "cert", directory / "key", cluster.ca_file)
    way.certificate.write_bytes(certificate)
    way.key.write_bytes(key)
    return way


def _whoami(way: Way) -> str:
    context = ssl.create_default_context(cafile=way.roots)
    context.load_cert_chain(way.certificate, way.key)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    question = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    request = urllib.request.Request(
        f"{way.server}/apis/authentication.k8s.io/v1/selfsubjectreviews",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json", "Accept": "application/json"},
    )
    with opener.open(request, timeout=GRACE) as answer:
        return cast(str, json.load(answer)["status"]["userInfo"]["username"])


def _private(directory: Path) -> Path:
    directory.mkdir(mode=0o700)
    return directory


def _run(command: list[str | os.PathLike[str]], seconds: float, text: str = "") -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds + GRACE, check=False)
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"{Path(command[0]).name} did not end within {error.timeout:.0f} s") from error
    if done.returncode:
        raise LoadFailed(f"{Path(command[0]).name} {command[1]}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _say(text: str) -> None:
    print(f"kubernetes: {text}", file=sys.stderr, flush=True)
