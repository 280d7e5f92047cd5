"""Sessions of tokens that are bound to a key (docs/threats.md#T30, docs/threats.md#T32)."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest

from arcbridge.agent.audit import AuditLog
from arcbridge.agent.authenticator import Authenticator
from arcbridge.agent.sessions import Sessions
from arcbridge.identity.authentication import parse
from arcbridge.identity.proof import IAT_WINDOW, Peer, ProofChecker, ProofKey, ProofPolicy, spki_of
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.mux.connection import AuthMaker, peer_certificate
from arcbridge.mux.session import MuxSession
from arcbridge.net.tls import inner_server_context
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Auth, Goaway
from arcbridge.wire.session import Kind, Side
from tests.identity import issuer as issuing
from tests.support.eventually import until

from .kube.bench import RecordedAudit
from .pair import (
    CA,
    LEAF,
    PEER,
    ClientSide,
    Clock,
    FakeAuthenticator,
    _join,
    asks_for,
    end_of,
    joined,
    knock,
    make_sessions,
    resume,
    used,
)

KEY = ProofKey.generate()


def bound_token(key: ProofKey = KEY, **changes: Any) -> str:
    return issuing.token(issuing.claims(**{"nonce": key.nonce(), **changes}))


def proving(text: str, *, key: ProofKey = KEY, now: float = 1000.0) -> AuthMaker:
    """AUTH as an honest client makes it: about the certificate that the agent shows."""
    return lambda shown: Auth(token=text, proof=key.sign_proof(text, spki_of(shown), CA.pin, now))


def real_sessions(clock: Clock, audit: AuditLog | None = None, policy: ProofPolicy = ProofPolicy.IF_BOUND) -> Sessions:
    verifier = TokenVerifier(parse(issuing.CONFIG), issuing.Issuer().fetch, clock, monotonic=clock)
    judge = Authenticator(None, verifier, ProofChecker(policy, "the agent", clock=clock), token_mode=False, clock=clock)
    return make_sessions(judge, clock, audit=audit)[0]


def lose(client: MuxSession) -> None:
    client.transport.abort()


async def reason_of(client: MuxSession) -> str:
    ended = await end_of(client)
    assert ended.code == GoawayCode.UNAUTHENTICATED
    return ended.refusal.rule.check


async def test_t30_the_holder_of_the_key_is_served() -> None:
    audit = RecordedAudit()
    sessions = real_sessions(Clock(), audit)
    async with joined(sessions, proving(bound_token())) as (_, handler):
        assert handler.accepted[0].subject == "oidc:alice"
        assert sessions.authenticator.proofs.taken["nonce"] == 1


async def test_t30_a_stolen_token_is_refused_and_recorded() -> None:
    audit = RecordedAudit()
    sessions = real_sessions(Clock(), audit)
    text = bound_token()
    for stolen, reason in (
        (lambda shown: Auth(token=text), "missing"),
        (proving(text, key=ProofKey.generate()), "key"),
        (proving(text, now=1000.0 - IAT_WINDOW - 1), "iat"),
        (proving(text, now=1000.0 + IAT_WINDOW + 1), "iat"),
    ):
        async with joined(sessions, stolen) as (client, _):
            assert await reason_of(client) == reason
    refused = audit.lines()
    assert len(refused) == 4
    assert {(one["user"], one["verb"], one["bound"]) for one in refused} == {("oidc:alice", "authenticate", "nonce")}
    assert text not in str(refused)


async def test_t32_what_one_agent_saw_is_worth_nothing_at_another() -> None:
    """The second agent replays AUTH word for word, as one would that collects them."""
    seen: list[Auth] = []

    def make(shown: bytes) -> Auth:
        seen.append(proving(bound_token())(shown))
        return seen[-1]

    first, second = real_sessions(Clock()), real_sessions(Clock())
    async with joined(first, make) as (client, _):
        assert not client.closed
    other = CA.issue_server(["one.cluster.arcbridge"])
    context = inner_server_context(other.certificate_pem, other.key_pem)
    assert Peer(context.spki, CA.pin) != PEER
    handler = ClientSide()
    client = MuxSession(Side.INITIATOR, Kind.SESSION, handler, label="x")
    client.authenticate(seen[0])
    await _join(second, client.protocol, "x", "", context)
    assert await reason_of(client) == "peer"
    await second.close()


async def test_t32_each_connection_of_a_session_has_a_proof_of_its_own() -> None:
    sessions = real_sessions(Clock())
    text = bound_token()
    async with joined(sessions, proving(text)) as (client, handler):
        io = await used(client, b"before")
        lose(client)
        await handler.away.wait()
        # The thief of token and secret has no key; the session waits on.
        answer = await knock(sessions, asks_for(client), text)
        assert isinstance(answer, Goaway)
        assert answer.rule == "proof.missing"
        assert sessions.detached == 1
        # The agent's certificate was renewed meanwhile: the proof is about the one that this connection showed.
        leaf = CA.issue_server(["one.cluster.arcbridge"])
        renewed = inner_server_context(leaf.certificate_pem, leaf.key_pem)
        await resume(sessions, client, proving(text), server=renewed)
        await io.write(b"after")
        assert await io.read() == b"after"
        # And so is that of a renewal.
        newer = bound_token(iat=1001)
        client.authenticate(proving(newer)(peer_certificate(client.transport)))
        async with asyncio.timeout(5):
            await handler.accepted_again.wait()
        assert not client.closed


async def test_t32_a_renewal_needs_a_proof_as_well() -> None:
    sessions = real_sessions(Clock())
    for unproved, reason in (
        (Auth(token=bound_token(iat=1001)), "missing"),
        (Auth(token=bound_token(iat=1001), proof=KEY.sign_proof(bound_token(), PEER.spki, PEER.pin, 1000.0)), "ath"),
    ):
        async with joined(sessions, proving(bound_token())) as (client, _):
            client.authenticate(unproved)
            assert await reason_of(client) == reason


async def test_t32_a_renewal_from_before_a_loss_changes_nothing() -> None:
    """It is sent again with the rest, and what it says about the time is old then. That is no theft, and gets no
    record; another user's token is none that is sent again."""
    clock = Clock()
    audit = RecordedAudit()
    sessions = real_sessions(clock, audit)
    async with joined(sessions, proving(bound_token())) as (client, handler):
        lose(client)
        await handler.away.wait()
        client.authenticate(
            proving(bound_token(iat=1001), now=1000.0 - IAT_WINDOW - 1)(ssl.PEM_cert_to_DER_cert(LEAF.certificate_pem))
        )
        await resume(sessions, client, proving(bound_token()))
        io = await used(client, b"on")
        assert sessions.authenticator.proofs.refused["iat"] == 1
        assert not client.closed
        for _ in range(3):
            client.authenticate(Auth(token=bound_token(iat=1001)))
            await io.write(b"on")
            assert await io.read() == b"on"
        await until(lambda: sessions.authenticator.proofs.refused["missing"])
        assert not client.closed
        client.authenticate(Auth(token=bound_token(sub="bob")))
        assert await reason_of(client) == "missing"
    (record,) = [one for one in audit.lines() if one.get("outcome") == "refused"]
    assert (record["user"], record["bound"]) == ("oidc:bob", "nonce")


@pytest.mark.parametrize("policy", [ProofPolicy.REQUIRED, ProofPolicy.OFF])
async def test_t31_the_other_settings(policy: ProofPolicy) -> None:
    sessions = real_sessions(Clock(), policy=policy)
    required = policy is ProofPolicy.REQUIRED
    async with joined(sessions, proving(bound_token()), alone=False) as (client, _):
        if required:
            await client.wait_established()
        else:
            assert await reason_of(client) == "off"
    async with joined(sessions, issuing.token(issuing.claims())) as (client, _):
        if required:
            assert await reason_of(client) == "unbound"
        else:
            await client.wait_established()


async def test_t30_an_older_agent_passes_over_the_proof() -> None:
    """A token that is bound is a bearer token there, as it was before."""
    judge, text = FakeAuthenticator(), bound_token()
    judge.add(text, "alice")
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions, proving(text)) as (_, handler):
        assert handler.accepted[0].subject == "alice"


async def test_t30_an_older_client_is_served_with_an_unbound_token_alone() -> None:
    sessions = real_sessions(Clock())
    async with joined(sessions, issuing.token(issuing.claims()), alone=False) as (client, _):
        assert not client.closed
    async with joined(sessions, bound_token()) as (client, _):
        assert "update arcbridge here" in (await end_of(client)).message
