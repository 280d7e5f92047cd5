"""What was granted is taken back: a user's exec, watch, port-forward and TCP target end within ten seconds, on one
relay, on several without an engine, in a fleet on NATS and on a relay of two workers (docs/threats.md#V1,
docs/threats.md#V11).

The relay's policy takes, or `user revoke`, or the agent's denylist. Beside the user another one works all the time, who
notices nothing. kubectl is the real one, and so is the API server.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

import pytest

from tests.support.cluster import KUBECTL_MINORS, Cluster, Kubectl
from tests.support.fault_proxy import FaultProxy
from tests.support.nats_server import NatsServer
from tests.support.processes import ManagedProcess, run
from tests.support.reports import metrics, records, rewrite, until, wait_for_record
from tests.support.targets import EchoServer
from tests.support.world import (
    ALICE,
    CLUSTER_AUDIENCE,
    RELAY_AUDIENCE,
    ApiServer,
    Client,
    User,
    World,
    arcbridge,
    fixed_port,
)

NAMESPACE = "taking-back"
CAROL = User("carol", ("contractors",))
"""Whose right is taken back."""
DAVE = User("dave", ("contractors",))
"""Whose group the issuer takes away; no denylist of another test has the name."""
WITHIN = 10.0
"""Seconds from the change to the end of all that runs."""
TICK = 'n=0; while [ $n -lt 36000 ]; do echo tick-$n; n=$((n+1)); sleep 0.1; done'  # fmt: skip
BOTH_GROUPS = 'groups = ["platform", "contractors"]'
ONLY_PLATFORM = 'groups = ["platform"]'


class Place:
    """An organisation on one of the four topologies, and its pod."""

    def __init__(self, world: World, cluster: Cluster, topology: str, port: int) -> None:
        self.world = world
        self.cluster = cluster
        self.topology = topology
        self.port = port
        """The port of the pod on which an echo server listens."""

    @property
    def registries(self) -> list[int]:
        """The relays at which an operator's command is needed: each has a registry of its own, or all share one."""
        return list(range(len(self.world.relay_listens))) if self.topology == "several" else [0]

    def command(self, *words: str) -> None:
        """Run an operator's command wherever it is needed."""
        for index in self.registries:
            run(arcbridge("--role", "relay", *words, "--config", str(self.world.config_of("relay", index))))

    def none_revoked(self) -> bool:
        """Whether no relay, nor any worker of one, refuses a user whom it took for revoked."""
        return not any(metrics(port)["arcbridge_relay_users_revoked"] for port in self.world.relay_observes)

    def policy(self, allowed: str) -> None:
        """Write the policy of every relay anew."""
        for index in range(len(self.world.relay_listens)):
            path = self.world.config_of("relay", index).parent / "policy.toml"
            rewrite(path, f'[[allow]]\n{allowed}\nclusters = ["*"]\n')

    def deny(self, text: str) -> None:
        """Write the agent's denylist anew."""
        rewrite(self.world.agent_config.parent / "denylist.toml", text)


@pytest.fixture(scope="module", params=["one", "several", "nats", "workers"])
def place(
    request: pytest.FixtureRequest, api: ApiServer, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    topology = str(request.param)
    directory = tmp_path_factory.mktemp(f"taking-back-{topology}")
    cluster.grant("cluster-admin", group="contractors")
    with ExitStack() as stack:
        nats = stack.enter_context(NatsServer(directory / "nats")) if topology == "nats" else None
        echo = stack.enter_context(EchoServer())
        world = World(api, directory=directory / "world", relays=2 if topology in ("several", "nats") else 1)
        stack.enter_context(world)
        world.policy = f'[[allow]]\n{BOTH_GROUPS}\nclusters = ["*"]\n'
        world.targets["echo"] = (echo.address, ("platform", "contractors"))
        world.agent_settings = 'denylist_file = "denylist.toml"'
        world.relay_settings = "workers = 2" if topology == "workers" else ""
        world.agent_config.parent.mkdir(parents=True)
        (world.agent_config.parent / "denylist.toml").write_text("")
        world.start_issuer()
        for index, listens in enumerate(world.relay_listens):
            lines = ["[fleet]", f'name = "relay-{index}"', f'internal_address = "{listens}"']
            if nats is not None:
                lines.append(f'servers = ["{nats.url}"]')
            world.start_relay(index, extra="\n".join(lines) + "\n" if nats is not None else "")
        world.start_agent()
        port = int(echo.address.rpartition(":")[2])
        cluster.add_pod(topology, NAMESPACE, ports=[port])
        stack.callback(cluster.delete_pod, topology, NAMESPACE)
        until(lambda: connected(world), "every relay has the agent", timeout=60)
        yield Place(world, cluster, topology, port)


def connected(world: World) -> bool:
    return all(metrics(port)["arcbridge_relay_agents"] > 0 for port in world.relay_observes)


class Running:
    """What a user has open: a shell, a watch, a forwarded port of the pod, and a TCP target of the agent."""

    def __init__(self, place: Place, user: User) -> None:
        self.place = place
        self.user = user
        self._stack = ExitStack()
        self.client: Client = place.world.start_client(user)
        self._stack.callback(self.client.process.stop)
        self.kubectl: Kubectl = place.cluster.kubectl_for(KUBECTL_MINORS[0], self.client.kubeconfig)
        self._changes, self._mark = 0, os.urandom(4).hex()
        self.open()

    def open(self) -> None:
        """Start all of it."""
        pod = self.place.topology
        self.shell = self._start("exec", "-n", NAMESPACE, pod, "--", "sh", "-c", TICK)
        self.watch = self._start("get", "configmaps", "-n", NAMESPACE, "--watch", "-o", "name")
        self.port_forward = self._start("port-forward", "-n", NAMESPACE, f"pod/{pod}", f":{self.place.port}")
        local = int(self.port_forward.wait_for_line(r"Forwarding from 127\.0\.0\.1:(\d+)", timeout=30)[1])
        self.forward, target = self.place.world.start_forward("echo", self.user)
        self._stack.callback(self.forward.stop)
        self.through_pod = socket.create_connection(("127.0.0.1", local), timeout=20)
        self.through_agent = socket.create_connection(("127.0.0.1", target), timeout=20)
        for sock in (self.through_pod, self.through_agent):
            self._stack.callback(sock.close)
        self.works()

    def _start(self, *arguments: str) -> ManagedProcess:
        process = self.kubectl.start(*arguments)
        self._stack.callback(process.stop)
        return process

    def works(self) -> None:
        """Require that all of it moves."""
        self.shell.wait_for_line(r"tick-\d+", stream="stdout", after=self.shell.mark(), timeout=20)
        self.watch_works()
        for sock in (self.through_pod, self.through_agent):
            sock.sendall(b"still there")
            assert sock.recv(11, socket.MSG_WAITALL) == b"still there"

    def watch_works(self) -> None:
        """Require that the watch sees a change."""
        self._changes += 1
        name = f"{self.user.name}-{self.place.topology}-{self._mark}-{self._changes}"
        self.place.cluster.kubectl("create", "configmap", name, "-n", NAMESPACE)
        self.watch.wait_for_line(f"configmap/{name}$", timeout=20)

    def ended(self, since: float, within: float = WITHIN) -> None:
        """Require that all of it has ended, within so many seconds of `since` (monotonic seconds)."""
        self.streams_ended(since, within)
        self.watch.wait(max(0.1, since + within - time.monotonic()))

    def streams_ended(self, since: float, within: float = WITHIN) -> None:
        """Require the same of all but the watch."""
        for sock in (self.through_agent, self.through_pod):
            sock.settimeout(max(0.1, since + within - time.monotonic()))
            try:
                assert sock.recv(1) == b""
            except ConnectionError:
                pass
        for process in (self.shell, self.port_forward):
            process.wait(max(0.1, since + within - time.monotonic()))
        assert self.shell.wait() != 0, "an exec that was cut is no success"

    def get(self) -> str:
        """What the next command prints, which must fail."""
        done = self.kubectl.run("get", "namespaces", check=False, timeout=20)
        assert done.returncode == 1, done
        return done.stderr

    def new_tokens(self) -> None:
        """Log in again: other tokens, of now."""
        access, identity = self.client.directory / "access-token", self.client.directory / "id-token"
        for path, audience in ((access, RELAY_AUDIENCE), (identity, CLUSTER_AUDIENCE)):
            rewrite(path, self.place.world.token(self.user, audience))

    def in_again(self) -> bool:
        done = self.kubectl.run("get", "namespace", "default", "-o", "name", check=False, timeout=20)
        return done.stdout == "namespace/default\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


@pytest.fixture
def carol(place: Place) -> Iterator[Running]:
    with Running(place, CAROL) as found:
        yield found
    place.policy(BOTH_GROUPS)  # also where the test has failed
    place.deny("")


@pytest.fixture(scope="module")
def alice(place: Place) -> Iterator[Running]:
    """The other user, who works through all of it."""
    with Running(place, ALICE) as found:
        yield found


class Cut:
    """Takes one right of a user and requires what follows, for the user and for the others."""

    def __init__(self, place: Place, carol: Running, alice: Running) -> None:
        self.carol = carol
        self._place = place
        self._alice = alice
        self._at = {process: process.mark() for process in (*place.world.relays, place.world.agent)}
        self._at |= {one.client.process: one.client.process.mark() for one in (carol, alice)}
        self._at |= {one.forward: one.forward.mark() for one in (carol, alice)}
        self._audited = len(place.world.audit_records())
        self._began = time.monotonic()

    def changed(self) -> None:
        """From now on the time counts: a command has ended."""
        self._began = time.monotonic()

    def ends(self) -> None:
        """Require that all of the user's ends in time, that kubectl fails, and that the other user's goes on."""
        self.carol.ended(self._began)
        print(f"all had ended {time.monotonic() - self._began:.1f} s after the change ({self._place.topology})")
        self._alice.works()
        for process in (self._alice.client.process, self._alice.forward):
            assert records(process, after=self._at[process]) == [], "the other user's session saw nothing"

    def told(self, words: str) -> None:
        """Require that kubectl's next command, the client's log and the log of `forward` say why."""
        said = self.carol.get()
        assert said.startswith("Error from server (Forbidden): arcbridge: "), said
        assert words in said, said
        for process in (self.carol.client.process, self.carol.forward):
            record = wait_for_record(process, "no session", after=self._at[process])
            assert words in record["reason"], record
        cut = wait_for_record(self.carol.forward, "connection cut", after=self._at[self.carol.forward])
        assert "access was revoked" in cut["reason"], cut

    def stays_out(self) -> None:
        """Require that the client asks at most once for each kubectl, whose commands all fail, and never by itself."""
        before = self._refusals()
        for _ in range(3):
            self.carol.get()
        assert self._refusals() - before <= 3
        assert not self._log(self.carol.client.process, "session resumed")
        assert not self._log(self.carol.client.process, "session established")

    def audited(self, verb: str, outcome: str) -> dict[str, object]:
        """Wait for the agent's audit record of the session as a whole."""
        return until(lambda: self.audit_record(verb, outcome), f"the agent's audit has {verb}, {outcome}")

    def audit_record(self, verb: str, outcome: str) -> dict[str, object]:
        """The agent's audit record of a session of the user since the cut; empty before there is one."""
        wanted = (self.carol.user.email, verb, outcome)
        for one in self._place.world.audit_records()[self._audited :]:
            if (one.get("user"), one.get("verb"), one.get("outcome")) == wanted:
                return one
        return {}

    def _refusals(self) -> int:
        """Times that a relay or the agent has refused the user."""
        at = [(relay, "join failed") for relay in self._place.world.relays]
        return sum(len(self._log(*one)) for one in [*at, (self._place.world.agent, "session refused")])

    def _log(self, process: ManagedProcess, event: str) -> list[dict[str, object]]:
        return records(process, event, after=self._at[process])


OF_THE_AGENT = pytest.mark.parametrize("place", ["several"], indirect=True)
"""For what the agent decides, whatever the relays are to each other."""


def test_the_policy_takes_back(place: Place, carol: Running, alice: Running) -> None:
    cut = Cut(place, carol, alice)
    place.policy(ONLY_PLATFORM)
    cut.ends()
    cut.told("ask the relay's operator for access")
    cut.audited("session", "cut")
    cut.stays_out()
    place.policy(BOTH_GROUPS)
    until(carol.in_again, "carol is in again", timeout=30)


def test_user_revoke_takes_back(place: Place, carol: Running, alice: Running) -> None:
    cut = Cut(place, carol, alice)
    place.command("user", "revoke", CAROL.email, "--reason", "laptop stolen")
    cut.changed()
    try:
        cut.ends()
        cut.told('the relay\'s operator says "laptop stolen"; logins from before ')
        cut.stays_out()
        assert "laptop stolen" in str(cut.audited("session", "cut")["reason"])
    finally:
        place.command("user", "restore", CAROL.email)
    # A relay looks every five seconds. With a token that one has still refused a client asks again after longer and
    # longer waits.
    until(place.none_revoked, "every relay has heard of it")
    carol.new_tokens()
    until(carol.in_again, "carol is in again with a new token", timeout=30)


@OF_THE_AGENT
def test_the_denylist_takes_back(place: Place, carol: Running, alice: Running) -> None:
    cut = Cut(place, carol, alice)
    place.deny(f'[[deny]]\nuser = "{CAROL.email}"\nreason = "left the company"\n')
    cut.ends()
    cut.told("the cluster's operator says \"left the company\"; ask the cluster's operator for access")
    carol.shell.wait_for_line('^error: arcbridge: access was revoked: the cluster\'s operator says "left the company"')
    # Not even with a token of now, and through any relay: the agent decides.
    carol.new_tokens()
    cut.stays_out()
    cut.audited("session", "cut")
    # The client asks again no sooner than a second after it was refused.
    until(lambda: carol.get() and cut.audit_record("authenticate", "refused"), "the new token is refused")
    place.deny("# no user\n")
    carol.new_tokens()
    until(carol.in_again, "carol is in again with a new token", timeout=30)


@OF_THE_AGENT
def test_a_detached_session_is_not_resumed(place: Place, alice: Running) -> None:
    """The user is revoked while the client has no way to a relay; when it has one again, the session is gone."""
    world = place.world
    direct = world.client_routes
    with ExitStack() as stack:
        doors = [
            stack.enter_context(
                FaultProxy(("127.0.0.1", int(address.rpartition(":")[2])), listen=("127.0.0.1", fixed_port()))
            )
            for address in world.relay_listens
        ]
        world.client_routes = [f"127.0.0.1:{door.port}" for door in doors]
        try:
            carol = stack.enter_context(Running(place, CAROL))
        finally:
            world.client_routes = direct
        cut = Cut(place, carol, alice)
        mark = world.agent.mark()
        both = {wait_for_record(one, "session established")["session"] for one in (carol.client.process, carol.forward)}

        def told(event: str) -> bool:
            return both <= {one["session"] for one in records(world.agent, event, after=mark)}

        for door in doors:  # all before one is cut: what is cut at the first would come in at the last
            door.refuse()
        for door in doors:
            door.cut()
        until(lambda: told("session detached"), "both sessions are detached")
        place.deny(f'[[deny]]\nuser = "{CAROL.email}"\n')
        until(lambda: told("session ended"), "both sessions have ended")
        began = time.monotonic()
        for door in doors:
            door.accept_again()
        carol.ended(began, within=50)  # a client that was away for longer waits for longer between two tries
        lost = wait_for_record(carol.client.process, "session could not be resumed")
        assert "ask the cluster's operator for access" in lost["reason"]
        cut.audited("resume", "refused")
        assert "ask the cluster's operator for access" in carol.get()
        alice.works()
        place.deny("")


@pytest.mark.parametrize("place", ["one"], indirect=True)
def test_a_group_that_the_issuer_takes_away(place: Place, alice: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator does anything: the next token lacks the group (docs/threats.md#V20, docs/threats.md#V21)."""
    world = place.world
    life = 40  # seconds: the client renews after half of them
    monkeypatch.setattr(world, "login_files", partial(world.login_files, lifetime=life))
    before = len(world.audit_records())
    with Running(place, DAVE) as dave:
        issued = time.time()  # of two tokens of one second the one with fewer groups counts, and these have one each
        until(lambda: int(time.time()) > int(issued), "the next token is of a later second")
        began = time.monotonic()
        for path in world.directory.glob(f"client-*-{DAVE.name}/id-token"):
            rewrite(path, world.token(User(DAVE.name, ("interns",)), CLUSTER_AUDIENCE))
        dave.streams_ended(began, within=life)
        dave.shell.wait_for_line("^error: arcbridge: the token was renewed with fewer groups, or with another name$")
        print(f"the streams had ended {time.monotonic() - began:.1f} s after the issuer took the group away")
        alice.works()
        dave.watch_works()
        assert "(Forbidden)" in dave.get()

        def cut() -> set[object]:
            mine = [one for one in world.audit_records()[before:] if one.get("user") == DAVE.email]
            return {one.get("target") or one.get("subresource") for one in mine if one["outcome"] == "cut"}

        until(lambda: cut() == {"exec", "portforward", "tcp:echo"}, "each stream has its record")
        counted = metrics(world.agent_observe)
        assert counted["arcbridge_agent_targets_ended_total"] == 1
        assert counted["arcbridge_agent_upgrades_ended_total"] >= 2
