"""An agent that collects what its users log in with, and tries it everywhere (docs/threats.md#D1).

The operator of cluster `evil` is a user of the organisation, and may join every cluster. What the agent was shown opens
nothing where tokens name their cluster, or where they are bound to a key: not another cluster, not the relay, not its
API.
"""

from __future__ import annotations

import json
import ssl
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from arcbridge.agent.authenticator import REVIEW
from arcbridge.errors import JoinRefused
from arcbridge.identity.proof import ProofKey, spki_of
from arcbridge.net.join import JoinCode
from arcbridge.wire.frames import FrameType, GoawayCode
from arcbridge.wire.records import Auth
from tests.hostile.agent_lies import Collects
from tests.hostile.by_hand import auth, hello, session_by_hand
from tests.hostile.organisation import ALICE, MALLORY, RELAY_AUDIENCE, Organisation, Person
from tests.support.fake_apiserver import reply

EVIL = {"evil": {"Authenticator": Collects}}
PER_CLUSTER = {"prod": "cluster-prod", "evil": "cluster-evil"}
BOUND = replace(ALICE, key=ProofKey.generate())


async def collect(org: Organisation, person: Person) -> Auth:
    """A person uses the hostile cluster; what its agent has then."""
    async with org.client(person, "evil") as client:
        assert (await client.get()).status == 200
    return Collects.made[-1].taken[-1]


async def try_at(org: Organisation, taken: Auth, **changes: Any) -> tuple[int, str]:
    """The agent's operator joins `prod` and logs in with what was taken; the code of the refusal, and its reason."""
    found = replace(taken, **changes)
    before = len(org.said("session refused"))
    async with session_by_hand(await org.joined(MALLORY.token(RELAY_AUDIENCE))) as session:
        session.say(hello(join_id=session.reply.join_id), auth(found.token, kind=found.kind, proof=found.proof))
        goaway = await session.goaway()
    return goaway.code, str(org.said("session refused")[before]["reason"])


async def test_d1_tokens_that_name_their_cluster(tmp_path: Path) -> None:
    async with Organisation.running(tmp_path, "prod", "evil", agents=EVIL, audiences=PER_CLUSTER) as org:
        taken = await collect(org, ALICE)
        assert await try_at(org, taken) == (
            GoawayCode.UNAUTHENTICATED,
            "the token is not meant for this place (audience)",
        )
        assert {cluster.name: len(cluster.api.requests) for cluster in org.clusters.values()} == {"prod": 0, "evil": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda taken: {}, "was made for another end than the agent"),
        (lambda taken: {"proof": ""}, "came without a proof of it"),
        (lambda taken: {"proof": taken.proof[:-4] + "AAAA"}, "was made for another end than the agent"),
        (lambda taken: {"proof": "a.b.c"}, "is malformed"),
        (lambda taken: {"kind": "bearer"}, "was made for another end than the agent"),
    ],
    ids=["as it came", "without its proof", "another signature", "no proof", "as another kind"],
)
async def test_d1_tokens_that_are_bound_to_a_key(tmp_path: Path, change: Any, reason: str) -> None:
    """All clusters take one audience; the proof that the hostile agent saw names its own key, and it has no other."""
    async with Organisation.running(tmp_path, "prod", "evil", agents=EVIL) as org:
        # As if the API server itself took the token.
        review = json.dumps({"status": {"userInfo": {"username": "alice", "groups": ["platform"]}}}).encode()
        org.clusters["prod"].api.routes[REVIEW] = reply(201, review)
        taken = await collect(org, BOUND)
        assert taken.proof, "the honest client has proved its key to the hostile agent"
        code, said = await try_at(org, taken, **change(taken))
        assert code == GoawayCode.UNAUTHENTICATED
        assert reason in said
        # The owner's name is in the audit of the cluster where it was tried.
        await org.until(org.clusters["prod"].audit, "a record, which a thread writes")
        (record,) = org.clusters["prod"].audit()
        assert (record["user"], record["verb"], record["outcome"]) == ("alice", "authenticate", "refused")
        assert [one.target for one in org.clusters["prod"].api.requests if one.target != REVIEW] == []


async def test_d1_a_bound_token_with_a_proof_by_another_key(tmp_path: Path) -> None:
    mallorys = ProofKey.generate()
    async with Organisation.running(tmp_path, "prod", "evil", agents=EVIL) as org:
        taken = await collect(org, BOUND)
        async with session_by_hand(await org.joined(MALLORY.token(RELAY_AUDIENCE))) as session:
            pin = org.clusters["prod"].pin
            proof = mallorys.sign_proof(taken.token, spki_of(session.certificate), pin, time.time())
            session.say(hello(join_id=session.reply.join_id), auth(taken.token, proof=proof))
            assert (await session.goaway()).code == GoawayCode.UNAUTHENTICATED
        (told,) = org.said("session refused")
        assert "bound to another key than this machine's" in told["reason"]


async def test_d1_where_nothing_binds_a_token_another_cluster_of_its_audience_takes_it(tmp_path: Path) -> None:
    """What is open, in plain words: one audience for all clusters, and tokens without a key. `proof = "required"` at
    the other cluster closes it, and so does an audience for each cluster."""
    async with Organisation.running(tmp_path, "prod", "evil", agents=EVIL) as org:
        taken = await collect(org, ALICE)
        async with session_by_hand(await org.joined(MALLORY.token(RELAY_AUDIENCE))) as session:
            session.say(hello(join_id=session.reply.join_id), auth(taken.token))
            await session.next(FrameType.AUTH_OK)
        assert org.said("session opened")[-1]["user"] == "alice"
    (tmp_path / "closed").mkdir()
    async with Organisation.running(tmp_path / "closed", "evil", agents=EVIL) as org:
        cluster = await org.add_cluster("prod", lies={}, proof="required")
        assert cluster.pin
        taken = await collect(org, ALICE)
        code, said = await try_at(org, taken)
        assert code == GoawayCode.UNAUTHENTICATED
        assert "takes only tokens that are bound to a key" in said


@pytest.mark.parametrize("person", [ALICE, BOUND], ids=["bearer", "bound"])
async def test_d1_nothing_at_the_relay(tmp_path: Path, person: Person) -> None:
    async with Organisation.running(tmp_path, "prod", "evil", agents=EVIL) as org:
        taken = await collect(org, person)
        for proof in ("", taken.proof):
            with pytest.raises(JoinRefused) as caught:
                await org.joined(taken.token, proof=proof)
            assert caught.value.code == JoinCode.UNAUTHENTICATED
            assert "not meant for this place (audience)" in caught.value.message
            context = ssl.create_default_context(cadata=org.relay_ca)
            headers = {"Authorization": f"Bearer {taken.token}", **({"Arcbridge-Proof": proof} if proof else {})}
            async with (
                aiohttp.ClientSession(headers=headers) as http,
                http.get(f"https://{org.relay_address}/v1/clusters", ssl=context) as answer,
            ):
                assert answer.status == 401
                assert "clusters" not in await answer.text()


async def test_d1_a_session_of_one_cluster_is_not_resumed_at_another(tmp_path: Path) -> None:
    """The hostile agent knows id and secret of its sessions: it made them."""
    async with (
        Organisation.running(tmp_path, "prod", "evil", agents=EVIL) as org,
        org.client(ALICE, "prod") as alice,
        org.client(ALICE, "evil") as used,
    ):
        assert (await alice.get()).status == (await used.get()).status == 200
        taken = Collects.made[-1].taken[-1]
        async with session_by_hand(await org.joined(MALLORY.token(RELAY_AUDIENCE))) as session:
            session.say(
                hello(session_id=b"i" * 16, resume_secret=b"s" * 16, epoch=1, join_id=session.reply.join_id),
                auth(taken.token),
            )
            assert (await session.goaway()).code == GoawayCode.GONE
        assert org.said("resumption refused")[-1]["reason"] == "unknown"
        assert (await alice.get()).status == 200


async def test_d1_a_join_that_was_seen_is_refused_at_another_relay(tmp_path: Path) -> None:
    """A relay that keeps the token and the proof of a JOIN, and shows both to another relay that trusts the issuer."""
    from tests.hostile.relay_lies import KeepsTokens

    made: list[KeepsTokens] = []

    def rendezvous(*args: Any, **settings: Any) -> KeepsTokens:
        made.append(KeepsTokens(*args, **settings))
        return made[-1]

    (tmp_path / "hostile").mkdir()
    (tmp_path / "honest").mkdir()
    async with (
        Organisation.running(tmp_path / "hostile", relay={"ClientJoins": rendezvous}) as hostile,
        Organisation.running(tmp_path / "honest") as honest,
    ):
        async with hostile.client(BOUND) as client:
            assert (await client.get()).status == 200
        (seen,) = made[0].requests
        assert seen.proof
        for proof, reason in ((seen.proof, "proof.peer"), ("", "proof.missing")):
            with pytest.raises(JoinRefused) as caught:
                await honest.joined(seen.token, proof=proof)
            assert caught.value.code == JoinCode.UNAUTHENTICATED
            assert caught.value.refusal.rule == reason
        # At the relay itself a JOIN is good again while its proof is of now: the same relay learns nothing new by that.
        sock, _ = await hostile.joined(seen.token, proof=seen.proof)
        sock.close()
