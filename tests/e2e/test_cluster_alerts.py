"""A lost cluster and one that cannot serve are named by alerts, of a real Prometheus that scrapes the relay alone."""

from __future__ import annotations

import json
import re
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.processes import ManagedProcess, require_or_skip, run
from tests.support.reports import until
from tests.support.world import ALICE, ApiServer, World, arcbridge, fixed_port

RULES = Path(__file__).parents[2] / "config/prometheus/rules.yaml"
BERLIN, OSLO = "berlin", "oslo"


class Prometheus:
    """A Prometheus that scrapes each second, with the shipped rules in seconds where they have minutes."""

    def __init__(self, directory: Path, target: int) -> None:
        binary = shutil.which("prometheus")
        if binary is None:
            require_or_skip("promtool", "prometheus is not on this machine (Debian: package prometheus)")
        directory.mkdir()
        rules = re.sub(r"\bfor: \d+m", "for: 2s", RULES.read_text()).replace("[10m]", "[30s]")
        (directory / "rules.yaml").write_text(rules)
        (directory / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [rules.yaml]\n"
            "scrape_configs: [{job_name: arcbridge-relay, static_configs: "
            f'[{{targets: ["127.0.0.1:{target}"]}}]}}]\n'
        )
        self.url = f"http://127.0.0.1:{fixed_port()}"
        self.process = ManagedProcess(
            [str(binary), f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
             f"--web.listen-address={self.url.removeprefix('http://')}"],
            log_dir=directory,
            name="prometheus",
        )  # fmt: skip
        self.process.wait_for_url(f"{self.url}/-/ready", timeout=60)

    def firing(self) -> set[tuple[str, ...]]:
        """The alerts of clusters that fire now: name, cluster, and the check where it has one."""
        with urllib.request.urlopen(f"{self.url}/api/v1/alerts", timeout=10) as answer:
            alerts = json.load(answer)["data"]["alerts"]
        return {
            (labels["alertname"], labels["cluster"], *([labels["check"]] if "check" in labels else []))
            for alert in alerts
            if alert["state"] == "firing" and "cluster" in (labels := alert["labels"])
        }


@pytest.fixture
def world(api: ApiServer, tmp_path: Path) -> Iterator[World]:
    """Two clusters at one relay; the agents' token of the API server is the test's own."""
    token = tmp_path / "token"
    assert api.token_file is not None
    token.write_text(api.token_file.read_text())
    world = World(replace(api, token_file=token), directory=tmp_path / "world", cluster=BERLIN, agents=2)
    world.agent_clusters[1] = OSLO
    with world:
        yield world.start()


def clusters(world: World, *arguments: str) -> str:
    """The relay's list of clusters."""
    command = arcbridge("--role", "relay", "cluster", "list", "--config", str(world.relay_config), *arguments)
    return run(command).stdout.decode()


@pytest.mark.timeout(400)
def test_a_cluster_that_is_lost_or_cannot_serve_is_named_by_an_alert_until_it_is_back(
    world: World, tmp_path: Path
) -> None:
    prometheus = Prometheus(tmp_path / "prometheus", world.relay_observe)
    try:
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
        token.write_text(good)
        world.agent.signal(signal.SIGHUP)
        until(lambda: not prometheus.firing(), "all is well again", timeout=60)
    finally:
        prometheus.process.stop()
