"""Programs that act for users, before a real API server: what it sees of them, what the relay's policy says, and how
many sessions one has (docs/authentication.md#actors)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.support.cluster import Cluster
from tests.support.processes import run
from tests.support.reports import audited
from tests.support.world import ALICE, BOB, ApiServer, User, World, arcbridge

KEY = "arcbridge.io/actor"
POLICY = """
[[allow]]
groups = ["platform", "developers"]
clusters = ["*"]

[[allow]]
groups = ["platform", "developers"]
actors = ["bot", "ci"]
clusters = ["berlin"]
"""


class Acting(World):
    """Tokens have an actor while `claims` says so."""

    claims: Mapping[str, object] = {}

    def token(self, user: User, audience: str, *, lifetime: int = 3600) -> str:
        return self.issuer.mint(
            sub=user.name,
            aud=audience,
            lifetime=lifetime,
            groups=list(user.groups),
            email=user.email,
            claims=self.claims,
        )


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acting]:
    made = Acting(api, cluster="berlin", directory=tmp_path_factory.mktemp("actors"))
    made.policy = POLICY
    made.relay_settings = 'actor_clients = ["ci"]\n'
    made.agent_settings = f"{made.relay_settings}limits.actors.bot.sessions = 1\n"
    with made as world:
        yield world.start()


def info(world: Acting, cluster: Cluster, user: User, **claims: object) -> dict[str, Any]:
    """Return whom the API server takes a request of this user for."""
    world.claims = claims
    kubectl = cluster.kubectl_for(kubeconfig=world.start_client(user).kubeconfig)
    found: dict[str, Any] = json.loads(kubectl.run("auth", "whoami", "-o", "json").stdout)["status"]["userInfo"]
    return found


@pytest.mark.timeout(240)
def test_the_api_server_the_audit_and_the_operator_see_the_actor(world: Acting, cluster: Cluster) -> None:
    bot = info(world, cluster, ALICE, act={"sub": "bot", "act": {"sub": "former"}})
    assert (bot["username"], bot["extra"][KEY]) == (ALICE.email, ["bot"])
    assert KEY not in info(world, cluster, ALICE).get("extra", {})
    client = info(world, cluster, ALICE, azp="ci")
    assert client["extra"][KEY] == ["ci"]
    record = audited(world, "the bot's question", resource="selfsubjectreviews", actor="bot")
    assert record["user"] == ALICE.email
    command = arcbridge("--role", "relay", "--config", str(world.relay_config))
    listed = json.loads(run([*command, "session", "list", "-o", "json"]).stdout)
    assert sorted(row["actor"] for row in listed) == ["", "bot", "ci"]


def test_no_other_program_comes_in_and_one_has_no_more_sessions_than_it_may(world: Acting) -> None:
    world.claims = {"act": {"sub": "other"}}
    done = world.run_client(ALICE, "run", "--", "true")
    assert done.returncode != 0
    assert "may not reach it" in done.stderr
    world.claims = {"act": "bot"}
    done = world.run_client(ALICE, "run", "--", "true")
    assert done.returncode != 0
    assert "cannot read who acts for its user" in " ".join(done.stderr.split()), done.stderr
    world.claims = {"act": {"sub": "bot"}}
    done = world.run_client(BOB, "run", "--", "true")
    assert done.returncode != 0, "the session of the test before counts, though it is another user's"
    assert "at one of its limits" in done.stderr
    world.claims = {}
    assert world.run_client(BOB, "run", "--", "true").returncode == 0
