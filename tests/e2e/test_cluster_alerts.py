"""A real Prometheus scrapes the three roles: its alerts name what is lost, and it answers all that the dashboard asks.

Those on clusters read the relay's metrics alone. The same world has a collector of spans, and an API server whose
/statusz is beside those of the roles.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.observe.statusz import OBJECT
from tests.agent.recording.keys import RECIPIENT
from tests.agent.tracing.collector import attributes, decoded
from tests.support.cluster import Cluster
from tests.support.processes import ManagedProcess, require_or_skip, run
from tests.support.reports import until
from tests.support.world import ALICE, ApiServer, Client, World, arcbridge, fixed_port

from .test_audit import ask

ROOT = Path(__file__).parents[2]
RULES, DASHBOARD = ROOT / "config/prometheus/rules.yaml", ROOT / "config/grafana/arcbridge.json"
BERLIN, OSLO = "berlin", "oslo"
SHORT, LONG = ("[5m]", "[10m]", "[15m]", "[30m]", "[2h]"), ("[1h]", "[6h]", "[1d]", "[3d]")
"""Windows of the rules; ten seconds and half a minute here."""
WITHOUT_ANSWER = frozenset(
    {"Tokens refused", "Connections turned away", "Users over a limit", "Audit records that wait"}
)
"""Panels that show faults, of which there is none here, and sinks."""
SPANS = fixed_port()
"""Of the collector of spans."""
RECORDINGS = {"ArcbridgeRecordingsFail", "ArcbridgeRecordingsMissing"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Prometheus:
    """A Prometheus that scrapes each second, with the shipped rules in seconds where they have minutes."""

    def __init__(self, directory: Path, targets: dict[str, list[int]]) -> None:
        """`targets`: ports of each job."""
        binary = shutil.which("prometheus")
        if binary is None:
            require_or_skip("promtool", "prometheus is not on this machine (Debian: package prometheus)")
        directory.mkdir()
        rules = re.sub(r"\bfor: \d+m|(?<=keep_firing_)for: 1h", "for: 2s", RULES.read_text())
        rules = rules.replace("interval: 3m", "interval: 1s")
        for seconds, windows in (("[10s]", SHORT), ("[30s]", LONG)):
            for window in windows:
                rules = rules.replace(window, seconds)
        rules = rules.replace("process_start_time_seconds < 900", "process_start_time_seconds < 10")
        (directory / "rules.yaml").write_text(rules)
        jobs = [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
            for job, ports in targets.items()
        ]
        interval = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings = {"global": interval, "rule_files": ["rules.yaml"], "scrape_configs": jobs}
        (directory / "prometheus.yml").write_text(yaml.safe_dump(settings))
        self.url = f"http://127.0.0.1:{fixed_port()}"
        self.process = ManagedProcess(
            [str(binary), f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
             f"--web.listen-address={self.url.removeprefix('http://')}"],
            log_dir=directory,
            name="prometheus",
        )  # fmt: skip
        self.process.wait_for_url(f"{self.url}/-/ready", timeout=60)

    def _alerts(self) -> list[dict[str, str]]:
        with urllib.request.urlopen(f"{self.url}/api/v1/alerts", timeout=10) as answer:
            return [one["labels"] for one in json.load(answer)["data"]["alerts"] if one["state"] == "firing"]

    def firing(self) -> set[tuple[str, ...]]:
        """The alerts of clusters that fire now: name, cluster, and the check where it has one."""
        return {
            (labels["alertname"], labels["cluster"], *([labels["check"]] if "check" in labels else []))
            for labels in self._alerts()
            if "cluster" in labels
        }

    def firing_of_processes(self) -> set[str]:
        """The names of the other alerts that fire now."""
        return {labels["alertname"] for labels in self._alerts() if "cluster" not in labels}

    def answer(self, expression: str) -> list[Any]:
        """What it answers to an expression; raises for one that it cannot read."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=10) as answer:
            result: list[Any] = json.load(answer)["data"]["result"]
            return result


def asked() -> Iterator[tuple[str, str]]:
    """Title and expression of everything that dashboard and recording rules ask, as it is when a person looks."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "30s").replace("$__range", "10m")
            yield panel["title"], re.sub(r"\$(cluster|relay)\b", ".*", expression)
    for variable in dashboard["templating"]["list"][1:]:
        yield variable["name"], re.fullmatch(r"label_values\((\w+), \w+\)", variable["query"])[1]
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from ((rule["record"], rule["record"]) for rule in group["rules"] if "record" in rule)


@contextmanager
def collecting(port: int) -> Iterator[list[bytes]]:
    """A collector of spans in a thread; gives the bodies that it was sent."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield bodies
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def world(api: ApiServer, tmp_path: Path) -> Iterator[World]:
    """Two clusters at one relay; the agents' token of the API server is the test's own."""
    token = tmp_path / "token"
    assert api.token_file is not None
    token.write_text(api.token_file.read_text())
    world = World(replace(api, token_file=token), directory=tmp_path / "world", cluster=BERLIN, agents=2)
    world.agent_clusters[1] = OSLO
    world.agent_settings = f'tracing.endpoint = "http://127.0.0.1:{SPANS}/v1/traces"\n'
    world.agent_audit = (
        f'[recording]\nrecipients = ["{RECIPIENT}"]\ndirectory = "recordings"\nsession_bytes = 1048576\n'
        "[recording.rules.all]\nrequired = false\n"
    )
    with world:
        yield world.start()


def clusters(world: World, *arguments: str) -> str:
    """The relay's list of clusters."""
    command = arcbridge("--role", "relay", "cluster", "list", "--config", str(world.relay_config), *arguments)
    return run(command).stdout.decode()


def check_traces(world: World, client: Client) -> None:
    """A request that its caller traces has one span of the agent, between the caller's and the API server's."""
    with collecting(SPANS) as bodies:
        status, _ = ask(client, "GET", "/api/v1/pods?limit=1", traceparent=f"00-{TRACE}-{PARENT}-01")
        assert status == 200
        assert ask(client, "GET", "/api/v1/pods?limit=1")[0] == 200
        until(lambda: bodies, "the span is sent", timeout=30)
        ((resource, span),) = [span for body in bodies for span in decoded(body)]
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, PARENT, "list pods")
    records = [json.loads(line) for line in world.audit_log.read_text().splitlines()]
    (record,) = (one for one in records if one.get("request") == attributes(span)["audit-id"])
    assert record["session"] == attributes(span)["arcbridge.session"]
    assert resource["service.name"] == "arcbridge-agent"


def check_statusz(cluster: Cluster, ports: dict[str, int]) -> None:
    """Each role answers as the API server does: the same fields of the same types, the same words on the page."""
    model = cluster.request("GET", "/statusz", accept=OBJECT)
    words = re.findall(r"(?m)^([A-Z][a-z]+)[ :=]", cluster.kubectl("get", "--raw", "/statusz").stdout)
    for role, port in ports.items():
        request = urllib.request.Request(f"http://127.0.0.1:{port}/statusz", headers={"Accept": OBJECT})
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = json.load(answer)
        kinds = {name: type(value) for name, value in model.items() if name != "emulationVersion"}
        assert {name: type(value) for name, value in found.items()} == kinds
        assert (found["kind"], found["apiVersion"]) == (model["kind"], model["apiVersion"])
        assert found["metadata"]["name"] == f"arcbridge-{role}"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/statusz", timeout=10) as answer:
            ours = re.findall(r"(?m)^([A-Z][a-z]+)[ :=]", answer.read().decode())
        assert {*ours} - {"Python"} <= {*words}


def check_recordings(cluster: Cluster, client: Client, prometheus: Prometheus) -> None:
    """One session prints more than its recording may have, another one comes by SPDY: both go on, and are named."""
    kubectl = cluster.kubectl_for(kubeconfig=client.kubeconfig)
    cluster.add_pod("web")
    try:
        until(lambda: len(prometheus.answer("arcbridge_agent_recordings_missing_total == 0")) == 2, "both are scraped")
        assert not RECORDINGS & prometheus.firing_of_processes()
        assert len(kubectl.run("exec", "web", "--", "head", "-c", "1000000", "/dev/zero").stdout) == 1_000_000
        kubectl.run("exec", "web", "--", "true", env={"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false"})
    finally:
        cluster.delete_pod("web")
    until(lambda: prometheus.firing_of_processes() >= RECORDINGS, "what was not recorded is named", timeout=60)


@pytest.mark.timeout(400)
def test_a_cluster_that_is_lost_or_cannot_serve_is_named_by_an_alert_until_it_is_back(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    observed = fixed_port()
    client = world.start_client(ALICE, "--observe-listen", f"127.0.0.1:{observed}")
    jobs = {"relay": [world.relay_observe], "agent": world.agent_observes, "client": [observed]}
    prometheus = Prometheus(tmp_path / "prometheus", {f"arcbridge-{role}": ports for role, ports in jobs.items()})
    try:
        check_traces(world, client)
        check_statusz(cluster, {role: ports[0] for role, ports in jobs.items()})
        check_recordings(cluster, client, prometheus)
        # Lost: the agent is gone, and users of this cluster alone fail.
        world.agents[1].kill()
        until(lambda: ("ArcbridgeClusterOffline", OSLO) in prometheus.firing(), "the lost cluster is named", timeout=90)
        world.cluster = OSLO

        def named() -> bool:
            assert world.run_client(ALICE, "run", "--", "true").returncode
            return ("ArcbridgeClusterJoinsFail", OSLO) in prometheus.firing()

        until(named, "its joins are named", timeout=90)
        assert {cluster for _, cluster, *_ in prometheus.firing()} == {OSLO}, "and the other one is not"
        world.start_agent(1)
        until(lambda: not prometheus.firing(), "all is well again", timeout=90)
        # Connected, and no use: its credential at the API server is void.
        token = world.api.token_file
        assert token is not None
        good = token.read_text()
        token.write_text("no.such.token")
        world.agent.signal(signal.SIGHUP)
        expected = {("ArcbridgeClusterUnready", BERLIN), ("ArcbridgeClusterCheckFails", BERLIN, "credential")}
        until(lambda: expected <= prometheus.firing(), "the cluster that cannot serve is named", timeout=60)
        (row,) = (one for one in json.loads(clusters(world, "-o", "json")) if one["name"] == BERLIN)
        assert (row["agents"], row["ready"], row["state"]) == (1, 0, "Connected")
        assert "credential:" in row["failing"]
        head, *rows = clusters(world, "-o", "wide").splitlines()
        assert head.split()[:6] == ["NAME", "STATE", "AGENTS", "READY", "FAILING", "SESSIONS"]
        assert any(line.split()[:4] == [OSLO, "Connected", "1", "1"] for line in rows)
        ill = {"ArcbridgeAgentNotReady", "ArcbridgeCheckFails"}
        until(lambda: ill <= prometheus.firing_of_processes(), "so is the agent, where it is scraped", timeout=60)
        token.write_text(good)
        world.agent.signal(signal.SIGHUP)
        until(lambda: not prometheus.firing(), "all is well again", timeout=60)
        until(lambda: not (ill | RECORDINGS) & prometheus.firing_of_processes(), "the agent is, too", timeout=60)
        lacking = {title for title, expression in asked() if not prometheus.answer(expression)}
        assert lacking <= WITHOUT_ANSWER
        world.kill_relay()
        down = {"ArcbridgeRelayDown", "ArcbridgeAgentRelayMissing"}
        until(lambda: down <= prometheus.firing_of_processes(), "the relay that is down is named", timeout=60)
        world.start_relay()
        until(lambda: not down & prometheus.firing_of_processes(), "until it is back", timeout=90)
    finally:
        prometheus.process.stop()
