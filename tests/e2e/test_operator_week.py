"""An operator's week on real processes and a real API server, in one organisation: what is changed, lost and brought
back, what of it people notice, and what the audit of relay and agents says of it in the end.

Each step is in its short form; the test that goes into it at length is named there.
"""

from __future__ import annotations

import getpass
import json
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.test_version_skew import echoed, in_tree, tree_of
from tests.support.cluster import KUBECTL_MINORS, Cluster
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import run
from tests.support.reports import metrics, rewrite, until, wait_for_record
from tests.support.targets import EchoServer
from tests.support.world import ALICE, ApiServer, User, World, arcbridge, fixed_port

BEFORE = "b6e47e9"
"""The version with which the week begins."""
NAMESPACE = "week"
BERLIN, OSLO = "berlin", "oslo"
SAM = User("sam", ("oslo-operators",))
FIRM = [User(name, ("contractors",)) for name in ("carol", "dave", "erin")]
RULES = '[[allow]]\ngroups = ["platform"{0}]\nclusters = ["*"]\n'
TEAM = """
[[admin]]
groups = ["oslo-operators"]
clusters = ["oslo"]
what = ["tokens", "sessions", "revocations"]
"""


class Week:
    """The organisation: agent 0 is the berlin's of last week, 1 is its successor, and 2 is the oslo's."""

    def __init__(self, world: World, door: FaultProxy, directory: Path) -> None:
        self.world, self.door, self.directory = world, door, directory
        self.audit = directory / "relay-audit.jsonl"
        """The relay's, on another disk than the registry."""
        self.policy_file = world.relay_config.parent / "policy.toml"
        self.open: list[socket.socket] = []
        """Connections of people, through sessions that are to live."""

    def start_relay(self) -> None:
        self.world.start_relay(extra=f'[audit]\nfile = "{self.audit}"\n')

    def relay(self, *words: str, check: bool = True) -> str:
        """Run a command of the relay's operator; return what it prints."""
        argv = arcbridge("--role", "relay", *words, "--config", str(self.world.relay_config))
        done = run(argv, check=check)
        return done.stdout.decode() + ("" if check else done.stderr.decode())

    def admin(self, *words: str) -> tuple[int, str]:
        """Run a command of oslo's administrator, by her own login."""
        done = self.world.run_client(SAM, "admin", *words)
        return done.returncode, done.stdout + done.stderr

    def connect(self, user: User) -> socket.socket:
        """Open a connection of a user to berlin's TCP target."""
        _, port = self.world.start_forward("echo", user)
        sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        assert echoed(sock, b"begun") == b"begun"
        return sock

    def goes_on(self) -> None:
        """Check that each open connection works: its session has survived."""
        assert all(echoed(sock, b"goes on") == b"goes on" for sock in self.open)

    def of(self, name: str) -> float:
        return metrics(self.world.relay_observe).get(f"arcbridge_relay_{name}", -1.0)

    def policy(self, text: str, event: str) -> dict[str, object]:
        """Write the policy and wait for what the relay says of it."""
        mark = self.world.relay.mark()
        rewrite(self.policy_file, text)
        return wait_for_record(self.world.relay, event, after=mark)


@pytest.fixture
def week(api: ApiServer, echo: EchoServer, tmp_path: Path) -> Iterator[Week]:
    with FaultProxy(("127.0.0.1", int(api.url.rpartition(":")[2])), listen=("127.0.0.1", fixed_port())) as door:
        through = replace(api, url=f"https://127.0.0.1:{door.port}")
        with World(through, directory=tmp_path / "world", cluster=BERLIN, agents=3) as world:
            world.agent_clusters[2] = OSLO
            world.targets["echo"] = (echo.address, ("platform", "contractors"))
            world.policy = RULES.format(', "contractors"')
            made = Week(world, door, tmp_path)
            yield made
            for sock in made.open:
                sock.close()


@pytest.mark.timeout(600)
def test_a_week(week: Week, cluster: Cluster) -> None:
    enrol_and_upgrade(week, cluster)
    delegate(week)
    change_the_policy(week)
    lose_a_cluster_an_api_server_and_a_relay(week, cluster)
    lose_the_registry(week)
    rotate(week)
    the_audit_tells_all(week)


def enrol_and_upgrade(week: Week, cluster: Cluster) -> None:
    """Relay, agent, then clients, under a shell and a connection of the former version (test_version_skew.py)."""
    world, old = week.world, in_tree(tree_of(BEFORE, week.directory / "before"))
    world.relay_prefixes, world.agent_prefixes, world.client_prefix = [old], [old, (), ()], old
    world.start_issuer()
    world.start_relay()
    world.start_agent(0)
    cluster.add_pod("shell", NAMESPACE)
    with ExitStack() as stack:
        stack.callback(cluster.delete_pod, "shell", NAMESPACE)
        kubectl = cluster.kubectl_for(kubeconfig=world.start_client(ALICE).kubeconfig)
        shell = kubectl.start("exec", "-i", "-n", NAMESPACE, "shell", "--", "cat", stdin=True)
        stack.callback(shell.stop)
        shell.send("begun\n")
        shell.wait_for_line("begun", timeout=60)
        week.open.append(week.connect(ALICE))
        assert world.stop_relay()[0] == 0
        world.relay_prefixes = [()]
        world.relay_settings = 'recovery_wait = "8s"'
        week.start_relay()
        week.goes_on()
        shell.send("resumed\n")
        shell.wait_for_line("resumed", timeout=60)
        world.start_agent(1)
        world.agent.signal(signal.SIGTERM)  # it serves what is open, and takes nothing new
        world.client_prefix = ()
        new = cluster.kubectl_for(kubeconfig=world.start_client(ALICE).kubeconfig)
        assert "namespace/default" in new.run("get", "namespaces", "-o", "name").stdout
        shell.send("still there\n")
        shell.wait_for_line("still there", timeout=60)
        shell.close_stdin()
        assert shell.wait(30) == 0
        week.goes_on()
    week.open.pop().close()
    assert world.agent.wait(60) == 0
    week.open.append(week.connect(ALICE))


def delegate(week: Week) -> None:
    """A team enrols its own cluster, and has no right to another (test_administration.py)."""
    week.policy(RULES.format(', "contractors"') + TEAM, "policy taken over")
    code, said = week.admin("token", "create", "--cluster", OSLO, "-o", "json")
    assert code == 0, said
    token = json.loads(said)["token"]
    week.world.join_token = lambda cluster=None: (token, week.world.relay_pin)
    week.world.start_agent(2)
    code, said = week.admin("cluster", "list", "-o", "json")
    assert [(row["name"], row["state"]) for row in json.loads(said)] == [(OSLO, "Connected")]
    code, said = week.admin("cluster", "revoke", BERLIN)
    assert code
    assert "you may not do this" in said
    week.goes_on()


def change_the_policy(week: Week) -> None:
    """An emptied file is held back and withdrawn; a firm's end is held back and accepted (test_policy_changes.py)."""
    contractors = [week.connect(user) for user in FIRM]
    before = week.policy_file.read_text()
    held = week.policy("# everything was deleted\n", "policy held back")
    assert "it has no rule" in str(held["reason"])
    until(lambda: week.of('check_ok{check="policy"}') == 0, "the metric says so", timeout=30)
    assert str(held["hash"]) in week.relay("policy", "list")
    week.goes_on()
    week.policy(before, "policy held back no more")
    held = week.policy(RULES.format("") + TEAM, "policy held back")
    assert held["users_lost"] == len(FIRM)
    assert all(echoed(sock, b"not yet") == b"not yet" for sock in contractors)
    week.relay("policy", "accept", str(held["hash"]))
    for sock in contractors:
        sock.settimeout(30)
        try:
            assert sock.recv(1) == b""
        except ConnectionError:
            pass
        sock.close()
    week.goes_on()


def lose_a_cluster_an_api_server_and_a_relay(week: Week, cluster: Cluster) -> None:
    """The metrics of alerts name the first two (test_cluster_alerts.py); people notice a pause of the third at most."""
    world = week.world
    world.agents[2].kill()
    until(lambda: week.of(f'cluster_agents{{cluster="{OSLO}"}}') == 0, "ArcbridgeClusterOffline has its metric")
    world.start_agent(2)
    kubectl = cluster.kubectl_for(KUBECTL_MINORS[0], world.start_client(ALICE).kubeconfig)
    ready = f'cluster_agents_ready{{cluster="{BERLIN}"}}'
    until(lambda: week.of(ready) == 1, "berlin is ready", timeout=60)
    # kubectl repeats what fails for ten seconds: one request, where it has discovered the resources, and not five.
    assert "namespace/default" in kubectl.run("get", "namespaces", "-o", "name").stdout
    week.door.refuse()
    week.door.cut()
    assert "the API server cannot be reached" in kubectl.run("get", "namespaces", check=False).stderr
    until(lambda: week.of(ready) == 0, "ArcbridgeClusterUnready has its metric", timeout=90)
    (row,) = (one for one in json.loads(week.relay("cluster", "list", "-o", "json")) if one["name"] == BERLIN)
    assert row["failing"] == "api_server:api_unreachable"
    week.goes_on()
    week.door.accept_again()
    world.agents[1].signal(signal.SIGHUP)  # it would look within a minute
    until(lambda: week.of(ready) == 1, "berlin is ready again", timeout=90)
    assert "namespace/default" in kubectl.run("get", "namespaces", "-o", "name").stdout
    world.kill_relay()
    week.start_relay()
    week.goes_on()


def lose_the_registry(week: Week) -> None:
    """It is restored from a backup that lacks a revocation, which an agent gives back (test_disaster_recovery.py)."""
    world, data, backup = week.world, week.world.relay_config.parent / "data", week.directory / "relay.backup"
    until(lambda: week.of(f'cluster_agents{{cluster="{OSLO}"}}') == 1, "all agents are there", timeout=60)
    week.relay("backup", str(backup))
    week.relay("user", "revoke", FIRM[0].email, "--before", "2099-01-01", "--reason", "left")
    ports = [world.agent_observes[index] for index in (1, 2)]
    until(lambda: all(metrics(port)["arcbridge_agent_ledger_entries"] for port in ports), "agents keep it", timeout=30)
    world.kill_relay()
    shutil.rmtree(data)
    week.relay("restore", str(backup))
    week.start_relay()
    wait_for_record(world.relay, "revocation came back", name=FIRM[0].email, timeout=60)
    week.goes_on()
    until(lambda: week.of("revocations_missing") == 0, "all agents were heard", timeout=60)
    assert FIRM[0].email in week.relay("user", "list")


def rotate(week: Week) -> None:
    """The relay's CA gets a successor, and no user is asked anything (test_ca_rotation.py)."""
    for step in ("next", "activate", "retire"):
        # Refused until all agents have followed the step before.
        until(lambda step=step: "error" not in week.relay("ca", step, check=False), f"ca {step}", timeout=180)
        week.goes_on()


def the_audit_tells_all(week: Week) -> None:
    """Each act of the week is there, with who did it and what came of it; nothing is missing from the chains."""
    world, me = week.world, getpass.getuser()
    assert world.stop_relay()[0] == 0
    shown = json.loads(week.relay("audit", "show", "-o", "json"))
    acts = [
        (one["act"], one["by"], one.get("actor", ""), one.get("outcome", ""))
        for one in shown
        if one.get("stage") in ("ended", "complete")
    ]
    week_of_acts = [
        ("relay start", "relay", "", "done"),
        ("policy change", "relay", "", "done"),
        ("token create", "person", SAM.email, "done"),
        ("agent enrol", "agent", "", "done"),
        ("administration", "person", SAM.email, "refused"),
        ("policy change", "relay", "", "held"),
        ("policy change", "relay", "", "withdrawn"),
        ("policy change", "relay", "", "held"),
        ("policy accept", "os", me, "done"),
        ("policy change", "relay", "", "done"),
        ("relay start", "relay", "", "done"),
        ("backup", "os", me, "done"),
        ("user revoke", "os", me, "done"),
        ("restore", "os", me, "done"),
        ("relay start", "relay", "", "done"),
        *((f"ca {step}", "os", me, "done") for step in ("next", "activate", "retire")),
        ("relay stop", "relay", "", "done"),
    ]
    assert [one[0] for one in acts].count("ca follow") == 3
    # The operator tried steps until they came, and the relay takes each over in its own time.
    assert [one for one in acts if one[0] != "ca follow" and (one[0][:3], one[3]) != ("ca ", "refused")] == week_of_acts
    assert [one["arguments"]["user"] for one in shown if one.get("act") == "user revoke"] == [FIRM[0].email] * 2
    agents = [str(world.config_of("agent", index).parent / "audit.jsonl") for index in range(3)]
    said = run(arcbridge("audit", "show", "--user", ALICE.email, "-o", "json", *agents)).stdout.decode()
    requests = {(one["verb"], one.get("subresource", "")) for one in json.loads(said) if "verb" in one}
    assert {("create", "exec"), ("list", ""), ("connect", "")} <= requests
    for log, files in ((world.relay, [str(week.audit)]), (world.agents[1], agents)):
        run(arcbridge("audit", "verify", *files, "--anchors", str(log.stderr_path)))
