"""A drill: the registry is lost at work, alone or in a fleet on NATS, with a backup or without. The relay is back, no
agent enrols again, no join token is used twice, and a revoked user and a revoked cluster stay out
(docs/disaster-recovery.md).
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyrage
import pytest

from arcbridge.pki.authority import Authority
from arcbridge.relay.registry.base import UNKNOWN_TOKEN
from tests.e2e.test_cluster_alerts import Prometheus
from tests.support.nats_server import NatsServer
from tests.support.processes import ManagedProcess, run
from tests.support.reports import metrics, records, until
from tests.support.world import ALICE, ApiServer, User, World, arcbridge, fixed_port

pytestmark = pytest.mark.timeout(400)
BERLIN, OSLO, MUNICH, VIENNA = "berlin", "oslo", "munich", "vienna"
CAROL, DAVE = User("carol", ("platform",)), User("dave", ("platform",))
BACK = 60.0
"""Seconds in which users work again."""


class Drill:
    """An organisation of four clusters, the last of which enrols after the backup."""

    def __init__(self, world: World, nats: NatsServer | None) -> None:
        self.world, self.nats = world, nats
        self.relays = range(len(world.relay_listens))

    def start_relay(self, index: int) -> None:
        settings = f'[fleet]\nservers = ["{self.nats.url}"]\nname = "relay-{index}"\n' if self.nats else ""
        self.world.start_relay(index, extra=settings)

    def command(self, *words: str, check: bool = True) -> str:
        """Run a command of the first relay's operator; return what it prints, errors included."""
        argv = arcbridge("--role", "relay", *words, "--config", str(self.world.relay_config))
        done = run(argv, check=check, timeout=60)
        return done.stdout.decode() + done.stderr.decode()

    def of(self, name: str, index: int = 0) -> float:
        return metrics(self.world.relay_observes[index])[f"arcbridge_relay_{name}"]

    def works(self, user: User, cluster: str) -> str:
        """Return why a user's session with a cluster does not come about; empty where it does."""
        self.world.cluster = cluster
        done = self.world.run_client(user, "run", "--", "true", timeout=60)
        return "" if done.returncode == 0 else done.stderr

    def forbids(self, user: User, cluster: str) -> bool:
        """Return whether the user is refused for good, and not until the relay knows more."""
        told = self.works(user, cluster)
        assert told, "let in"
        return "may not reach it" in told

    def set_up(self) -> None:
        """Start all; then back up, and change what the backup does not know."""
        world = self.world
        world.start_issuer()
        for index in self.relays:
            self.start_relay(index)
        for index in (0, 1, 2):
            world.start_agent(index)
        self.command("user", "revoke", DAVE.email, "--before", "2099-01-01")
        self.token, _ = world.join_token(VIENNA)

    def change(self) -> None:
        """Use the token, and change who may do what."""
        self.world.join_token = lambda cluster=None: (self.token, self.world.relay_pin)
        self.world.start_agent(3)
        self.command("user", "revoke", CAROL.email, "--before", "2099-01-01")
        self.command("user", "restore", DAVE.email)
        self.command("cluster", "revoke", MUNICH)
        until(lambda: self.agents_hold(3), "the agents keep what was said", timeout=30)
        assert "may not reach it" in self.works(CAROL, BERLIN)

    def agents_hold(self, entries: int) -> bool:
        ports = [self.world.agent_observes[index] for index in (0, 1, 3)]
        return all(metrics(port)["arcbridge_agent_ledger_entries"] >= entries * len(self.relays) for port in ports)

    def lose(self) -> None:
        """Lose each relay's process and directory, and NATS with its data."""
        for index in self.relays:
            self.world.kill_relay(index)
            shutil.rmtree(self.world.config_of("relay", index).parent / "data")
        if self.nats is not None:
            self.nats.stop()
            shutil.rmtree(self.nats.directory / "jetstream")
            self.nats.start()

    def back(self) -> None:
        """Wait until alice works; check that she did within a minute of the relay's start, whatever the load."""
        until(lambda: not self.works(ALICE, BERLIN), "alice works", timeout=120)
        relays = self.world.relays
        served = min(moment(one) for relay in relays for one in records(relay, "relay serving"))
        joined = min(moment(one) for relay in relays for one in records(relay, "joined", user=ALICE.email))
        assert (joined - served).total_seconds() < BACK

    def stays_out(self) -> None:
        """Check that what was taken is taken, and that nothing that was used is of use again."""
        until(lambda: self.forbids(CAROL, BERLIN), "carol is refused for good", timeout=60)
        until(lambda: self.forbids(ALICE, MUNICH), "munich is refused for good", timeout=60)
        refused = {one["user"]: one["reason"] for one in self.failed_joins()}
        assert refused[CAROL.email] == "the user's login was revoked"
        assert refused[ALICE.email] in ("the cluster is revoked", "the cluster is unknown"), "and its name is kept"
        rows = {row["name"]: row for row in json.loads(self.clusters("-o", "json"))}
        assert rows[MUNICH]["state"] == "Revoked"
        for index in (0, 1, 3):
            assert not records(self.world.agents[index], "agent enrolled", after=self.lost_at[index])
        thief = self.world.directory / "thief"
        thief.mkdir()
        (thief / "join-token").write_text(self.token)
        for name in ("agent.toml", "authentication.yaml"):
            shutil.copy2(self.world.config_of("agent", 3).with_name(name), thief)
        done = run(arcbridge("--role", "agent", "--config", str(thief / "agent.toml"), "enroll"), check=False)
        assert done.returncode
        assert UNKNOWN_TOKEN in (done.stdout + done.stderr).decode()

    def failed_joins(self) -> list[dict[str, str]]:
        return [one for relay in self.world.relays for one in records(relay, "join failed", code="FORBIDDEN")]

    def clusters(self, *words: str) -> str:
        argv = arcbridge("--role", "relay", "cluster", "list", *words, "--config", str(self.world.relay_config))
        return run(argv).stdout.decode()


@pytest.fixture
def api(tmp_path: Path) -> ApiServer:
    """No API server listens: what is drilled ends where a session begins."""
    token = tmp_path / "kube-token"
    token.write_text("token")
    return ApiServer(f"https://127.0.0.1:{fixed_port()}", None, token)


@pytest.fixture(params=["alone", "nats"])
def drill(request: pytest.FixtureRequest, api: ApiServer, tmp_path: Path) -> Iterator[Drill]:
    with ExitStack() as stack:
        nats = stack.enter_context(NatsServer(tmp_path / "nats")) if request.param == "nats" else None
        world = World(api, directory=tmp_path / "world", cluster=BERLIN, agents=4, relays=2 if nats else 1)
        world.agent_clusters[1:] = OSLO, MUNICH, VIENNA
        yield Drill(stack.enter_context(world), nats)


@pytest.mark.parametrize("drill", ["nats"], indirect=True)
def test_a_lost_registry_is_restored_at_work(drill: Drill, tmp_path: Path) -> None:
    """test_operator_week.py restores that of one relay."""
    world, key = drill.world, pyrage.x25519.Identity.generate()
    world.relay_settings = 'recovery_wait = "8s"'
    drill.set_up()
    (tmp_path / "key").write_text(f"# public key: {key.to_public()}\n{key}\n")
    backup = tmp_path / "relay.backup"
    drill.command("backup", str(backup), "--recipient", str(key.to_public()))
    assert backup.stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE KEY" not in backup.read_bytes()
    drill.change()
    world.agents[1].kill()  # a source that is not heard
    drill.lost_at = {index: world.agents[index].mark() for index in (0, 1, 3)}
    drill.lose()
    said = drill.command("restore", str(backup), "--identity", str(tmp_path / "key"), "--settings", str(tmp_path / "s"))
    assert "1 revoked" in said
    assert "3 clusters are awaited" in said
    assert (tmp_path / "s/policy.toml").read_text() == world.policy
    for index in drill.relays:
        if index:
            data = world.config_of("relay", index).parent / "data"
            data.mkdir(mode=0o700)
            for name in ("ca.crt", "ca.key"):
                shutil.copy2(world.relay_config.parent / "data" / name, data)
        drill.start_relay(index)
    prometheus = Prometheus(tmp_path / "prometheus", {"arcbridge-relay": [world.relay_observe]})
    try:
        came = {"event": "revocation came back", "name": CAROL.email}  # through either relay
        until(lambda: any(records(relay, **came) for relay in world.relays), "carol's came back", timeout=30)
        drill.back()
        assert not drill.works(ALICE, VIENNA), "a cluster that the backup does not know is adopted"
        assert not drill.works(DAVE, BERLIN), "what was taken back stays taken back"
        drill.stays_out()
        # Oslo was not heard.
        assert drill.of("revocations_missing") == 1
        assert "revocations made after" in drill.command("cluster", "list")
        assert OSLO in drill.command("recovery", "list")
        assert "revocations_missing" in drill.command("doctor", "-o", "json", check=False)
        until(lambda: "ArcbridgeRevocationsMissing" in firing(prometheus), "it is an alert", timeout=60)
        world._agents[1] = again(world, 1)
        until(lambda: not drill.of("revocations_missing"), "oslo was heard", timeout=60)
        until(lambda: "ArcbridgeRevocationsMissing" not in firing(prometheus), "and it is none", timeout=60)
        assert "revocations" not in drill.command("cluster", "list")
    finally:
        prometheus.process.stop()


def test_a_registry_that_is_lost_without_a_backup_takes_the_revocations_of_adopted_clusters(drill: Drill) -> None:
    world = drill.world
    data = world.relay_config.parent / "data"
    data.mkdir(parents=True, mode=0o700)
    # A CA of yesterday: beside it a registry without clusters is not just new.
    yesterday = (datetime.now(UTC) - timedelta(days=1)).timestamp()
    Authority.load_or_create(data, "arcbridge relay CA", clock=lambda: yesterday)
    world.relay_settings = 'recovery_wait = "8s"'
    drill.set_up()
    drill.change()
    drill.lost_at = {index: world.agents[index].mark() for index in (0, 1, 3)}
    kept = {name: (data / name).read_bytes() for name in ("ca.crt", "ca.key")}
    drill.lose()
    for index in drill.relays:
        place = world.config_of("relay", index).parent / "data"
        place.mkdir(mode=0o700)
        for name, content in kept.items():
            (place / name).write_bytes(content)
            (place / name).chmod(0o600)
        drill.start_relay(index)
    drill.back()
    drill.stays_out()
    assert drill.of("revocations_missing") == 1
    assert "may have been lost" in drill.command("cluster", "list")
    drill.command("recovery", "end")
    until(lambda: not drill.of("revocations_missing"), "the operator has ended it")


def moment(record: dict[str, str]) -> datetime:
    return datetime.fromisoformat(record["timestamp"])


def firing(prometheus: Prometheus) -> set[str]:
    with urllib.request.urlopen(f"{prometheus.url}/api/v1/alerts", timeout=10) as answer:
        alerts = json.load(answer)["data"]["alerts"]
    return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def again(world: World, index: int) -> ManagedProcess:
    """Start an agent on the state that it has."""
    return world._start(
        f"agent-{index}", arcbridge("--role", "agent", "--config", str(world.config_of("agent", index)))
    )
