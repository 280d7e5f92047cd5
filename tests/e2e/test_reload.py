"""Settings that are read again, an audit log that is rotated, an agent that is stopped, under what people have open."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from arcbridge.errors import ExitCode
from tests.e2e.test_survival_kubectl import NAMESPACE, Everything
from tests.support.cluster import KUBECTL_MINORS, Cluster, Kubectl
from tests.support.collector import Collector, once
from tests.support.processes import ManagedProcess, Mark, run
from tests.support.reports import metrics, records, rewrite, until, wait_for_record
from tests.support.world import ALICE, ApiServer, Client, World, arcbridge

MIB = 1 << 20
RELOADED = "settings reloaded"
NOT_RELOADED = "settings not reloaded"


@pytest.fixture(scope="module")
def collectors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Collector, Collector]]:
    """Where the audit of the relay goes by HTTP, and that of the agents by syslog."""
    directory = tmp_path_factory.mktemp("collectors")
    with Collector("http", directory / "http") as http, Collector("syslog", directory / "syslog") as syslog:
        yield http, syslog


@pytest.fixture(scope="module")
def world(
    api: ApiServer, tmp_path_factory: pytest.TempPathFactory, collectors: tuple[Collector, Collector]
) -> Iterator[World]:
    """A relay of two workers, and two agents of one cluster; each has a sink."""
    world = World(api, directory=tmp_path_factory.mktemp("reload"), agents=2)
    http, syslog = (one.address for one in collectors)
    of_relay = f'{{kind = "http", address = "https://{http}/in", ca_file = "{collectors[0].ca}", interval = "100ms"}}'
    of_agent = f'{{kind = "syslog", address = "{syslog}", ca_file = "{collectors[1].ca}", interval = "100ms"}}'
    world.relay_settings = f"workers = 2\naudit.sinks.siem = {of_relay}"
    world.agent_audit = f"sinks.central = {of_agent}"
    world.agent_settings = "session.drain = 100"
    with world:
        yield world.start()


@pytest.fixture(scope="module")
def alice(world: World) -> Iterator[Client]:
    client = world.start_client(ALICE)
    yield client
    client.process.stop()


@pytest.fixture
def kubectl(cluster: Cluster, alice: Client) -> Kubectl:
    return cluster.kubectl_for(KUBECTL_MINORS[0], alice.kubeconfig)


@pytest.fixture
def everything(kubectl: Kubectl, cluster: Cluster, tmp_path: Path) -> Iterator[Everything]:
    with Everything(kubectl, cluster, tmp_path, 16 * MIB) as found:
        found.wait_moves()
        yield found


def reload(process: ManagedProcess, event: str = RELOADED) -> dict[str, object]:
    """Send SIGHUP as `systemctl reload` does, and return what the log says."""
    mark = process.mark()
    process.signal(signal.SIGHUP)
    return wait_for_record(process, event, after=mark)


def reloads(world: World, result: str) -> list[float]:
    """The reloads of the relay and of the agents."""
    found = [metrics(world.relay_observe)[f'arcbridge_relay_reloads_total{{result="{result}"}}']]
    return found + [
        metrics(port)[f'arcbridge_agent_reloads_total{{result="{result}"}}'] for port in world.agent_observes
    ]


def sessions_total(world: World, index: int) -> float:
    return metrics(world.agent_observes[index])["arcbridge_agent_sessions_total"]


def test_nothing_is_cut_by_reloads_and_rotations(world: World, alice: Client, everything: Everything) -> None:
    everything.copy()
    relay_directory, agent_directory = world.relay_config.parent, world.agent_config.parent
    mark = alice.process.mark()
    # The relay: another policy, a limit, the log's level, and what only a restart can change.
    other = world.policy + '\n[[allow]]\nusers = ["bob"]\nclusters = ["none"]\n'
    rewrite(relay_directory / "policy.toml", other)  # at once: the relay looks at it without a signal, too
    text = world.relay_config.read_text()
    world.relay_config.write_text(
        text.replace("[observe]", '[limits]\nsessions = 500\n[observe]\nlog_level = "debug"').replace(
            "workers = 2", "workers = 3"
        )
    )
    told = reload(world.relay)
    assert told["taken"] == ["limits.sessions", "observe.log_level", "policy"]
    assert told["needs_restart"] == ["workers"]
    # The agents: a denylist would need a restart, a target does not; and the audit log was moved away.
    audit = world.audit_log
    audit.rename(agent_directory / "audit.jsonl.1")
    config = world.agent_config.read_text()
    world.agent_config.write_text(config + '[targets.late]\naddress = "127.0.0.1:9"\ngroups = ["platform"]\n')
    for agent in world.agents:
        told = reload(agent)
        assert told["needs_restart"] == []
    assert reloads(world, "ok") == [1, 1, 1], "of several workers the supervisor counts, once"
    everything.wait_moves()
    # A mistake anywhere keeps all as it was.
    (relay_directory / "authentication.yaml").write_text("kind: Nothing\n")
    world.agent_config.write_text(config + "[targets.late]\naddress = 1\n")
    assert "authentication.yaml, line 1" in str(reload(world.relay, NOT_RELOADED)["reason"])
    assert "targets.late.address" in str(reload(world.agent, NOT_RELOADED)["reason"])
    assert reloads(world, "failed") == [1, 1, 0]
    (relay_directory / "authentication.yaml").write_text(world.authentication("arcbridge-relay"))
    world.agent_config.write_text(config)
    reload(world.relay)
    reload(world.agent)
    everything.wait_moves()
    everything.check()
    lost = [line for line in alice.process.lines(after=mark) if "connection lost" in line or "session lost" in line]
    assert lost == []
    assert sum(records(agent, "session detached") != [] for agent in world.agents) == 0
    until(lambda: audit.exists() and audit.stat().st_size, "the agent writes to a new file")

    def whole() -> bool:
        """The agent goes on writing: a look may find half of its last line."""
        done = run(arcbridge("audit", "verify", str(audit), f"{audit}.1"), check=False)
        print(done.stdout.decode())
        return done.returncode == 0

    until(whole, "the chain goes on over the files")


@pytest.mark.parametrize("role", ["agent", "relay"])
def test_another_authentication_counts_from_the_signal_on(world: World, role: str) -> None:
    """Those whom it lets in, and those whom it refuses."""
    processes = {"agent": world.agents, "relay": [world.relay]}[role]
    files = [world.config_of(role, index).parent / "authentication.yaml" for index in range(len(processes))]
    before = [file.read_text() for file in files]

    def reload_all() -> None:
        for process in processes:
            assert "authentication" in cast("list[str]", reload(process)["taken"])

    def answer() -> tuple[int, bool]:
        done = world.run_client(ALICE, "run", "--", "true")
        return done.returncode, f'the {role} requires the claim "hd"' in done.stderr.replace("its agent", "the agent")

    assert answer() == (0, False)
    for file, text in zip(files, before, strict=True):
        document = json.loads(text)
        document["jwt"][0]["claimValidationRules"] = [{"claim": "hd", "requiredValue": "example.com"}]
        file.write_text(json.dumps(document))
    assert answer() == (0, False), "nothing is read before the signal"
    reload_all()
    # Of several workers of a relay one may be a moment later than the line.
    until(lambda: answer() == (ExitCode.RUN_FAILED, True), "the claim is required")
    for file, text in zip(files, before, strict=True):
        file.write_text(text)
    reload_all()
    until(lambda: answer() == (0, False), "it is no longer required")


def serving(world: World, client: Client, marks: list[Mark]) -> int:
    """Wait until an agent has logged that it has the client's session, and return its number."""
    session = wait_for_record(client.process, "session established")["session"]
    (index,) = until(
        lambda: [n for n in range(2) if records(world.agents[n], "session opened", after=marks[n], session=session)],
        "an agent has the session",
    )
    return index


@pytest.mark.parametrize("detached", [False, True], ids=["connected", "detached"])
def test_an_agent_that_is_stopped_keeps_what_runs_and_begins_nothing(
    world: World, cluster: Cluster, tmp_path: Path, detached: bool
) -> None:
    """Also where it has no relay just then, and its sessions no connection: it comes back for them."""
    pod = "pod-" + os.urandom(4).hex()
    cluster.add_pod(pod, NAMESPACE)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    marks = [agent.mark() for agent in world.agents]
    client = world.start_client(ALICE)
    with cluster.kubectl_for(KUBECTL_MINORS[0], client.kubeconfig).start(
        "exec", "-n", NAMESPACE, pod, "--", "sh", "-c", f"echo started; cat {gate}; echo finished; exit 4"
    ) as shell:
        shell.wait_for_line("started", stream="stdout")
        index = serving(world, client, marks)
        agent, other = world.agents[index], world.agents[1 - index]
        mark = other.mark()
        begun, served = sessions_total(world, index), sessions_total(world, 1 - index)
        if detached:
            world.kill_relay()
            wait_for_record(client.process, "connection lost, waiting to resume")
            wait_for_record(agent, "control connection lost", after=marks[index])
        agent.signal(signal.SIGTERM)
        if detached:
            wait_for_record(agent, "agent stopping", step="waiting")
            world.start_relay()
            wait_for_record(client.process, "session resumed", timeout=60)
            wait_for_record(other, "control connection up", after=mark, timeout=60)
        told = wait_for_record(agent, "agent stopping", step="waiting")
        assert wait_for_record(agent, "agent stopping", step="leaving")["seconds"] == 100
        assert told
        # What begins now is served by the other one, of this client too, which may have looked for it already.
        kubectl = cluster.kubectl_for(KUBECTL_MINORS[0], client.kubeconfig)
        assert kubectl.run("get", "namespace", "default", "-o", "name").stdout == "namespace/default\n"
        assert sessions_total(world, 1 - index) > served
        assert sessions_total(world, index) == begun
        assert agent.running
        gate.write_text("go\n")
        assert shell.wait(20) == 4
        assert "finished" in shell.output("stdout")
    assert agent.wait(20) == 0
    world.start_agent(index)
    assert client.process.stop() == 0
    cluster.delete_pod(pod, NAMESPACE)


def test_a_session_of_an_agent_that_is_being_stopped_does_not_wait_for_it(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    pod = "pod-" + os.urandom(4).hex()
    cluster.add_pod(pod, NAMESPACE)
    marks = [agent.mark() for agent in world.agents]
    client = world.start_client(ALICE)
    with cluster.kubectl_for(KUBECTL_MINORS[0], client.kubeconfig).start(
        "exec", "-n", NAMESPACE, pod, "--", "sh", "-c", "echo started; sleep 600"
    ) as shell:
        shell.wait_for_line("started", stream="stdout")
        index = serving(world, client, marks)
        agent = world.agents[index]
        agent.signal(signal.SIGTERM)
        wait_for_record(agent, "agent stopping", step="waiting")
        wait_for_record(client.process, "the agent drains the session")
        world.kill_relay()
        world.start_relay()
        told = wait_for_record(client.process, "session could not be resumed", timeout=60)
        assert told["reason"] == "the agent that has the session is being stopped, and takes no connection any more"
        assert shell.wait(20) != 0
    agent.signal(signal.SIGTERM)
    assert agent.wait(20) == 0
    world.start_agent(index)
    assert client.process.stop() == 0
    cluster.delete_pod(pod, NAMESPACE)


def test_collectors_get_what_both_roles_record_whatever_is_killed(
    world: World, alice: Client, collectors: tuple[Collector, Collector]
) -> None:
    """Behind all that the tests before have done: rotations, reloads, and ends of agents."""
    http, syslog = collectors
    audit = world.relay_config.parent / "data" / "audit.jsonl"
    command = arcbridge("--role", "relay", "--config", str(world.relay_config))
    http.kill()
    run([*command, "user", "revoke", "oidc:nobody@example.org"])
    failing = 'arcbridge_relay_audit_sink_failing{sink="siem"}'
    until(lambda: metrics(world.relay_observe)[failing], "the supervisor, which alone sends, shows it")
    done = run([*command, "doctor"], check=False)
    assert b"audit sink siem" in done.stdout
    assert done.returncode != 0
    world.kill_relay()
    run([*command, "user", "restore", "oidc:nobody@example.org"])  # recorded by the command itself
    world.start_relay()
    http.start()

    def behind() -> float:
        return metrics(world.relay_observe)['arcbridge_relay_audit_sink_waiting_bytes{sink="siem"}']

    until(lambda: once(http.texts) == audit.read_text().splitlines(), "the collector has all, each in its place")
    until(lambda: behind() == 0, "the relay knows that")
    assert [json.loads(text)["act"] for text in http.texts if '"user re' in text].count("user restore") >= 2
    for config in (world.agent_config, world.config_of("agent", 1)):
        files = [config.parent / name for name in ("audit.jsonl.1", "audit.jsonl")]

        def kept(files: list[Path] = files) -> list[str]:
            return [line for file in files if file.exists() for line in file.read_text().splitlines()]

        def arrived(files: list[Path] = files) -> list[str]:
            here = set(kept(files))
            return [text for text in once(syslog.texts) if text in here]

        until(lambda kept=kept, arrived=arrived: kept() and arrived() == kept(), "the agent's records are there")
