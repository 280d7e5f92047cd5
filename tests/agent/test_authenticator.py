"""AUTH: OIDC here, service-account tokens at the API server."""

from __future__ import annotations

import base64
import json

import pytest

from arcbridge.agent.authenticator import MAX_LIFE, REVIEW, UNKNOWN_LIFE, Authenticator, UnprovedToken
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.errors import PermissionRefused, Unauthenticated, Unreachable
from arcbridge.identity.authentication import parse
from arcbridge.identity.proof import Peer, ProofChecker, ProofKey, ProofPolicy
from arcbridge.identity.verifier import LEEWAY, TokenVerifier
from arcbridge.wire.records import Auth, Restrictions
from tests.identity.issuer import CONFIG, Issuer, claims, token
from tests.support.clock import Clock
from tests.support.fake_apiserver import FakeApiServer, impersonation_of, reply

NOW = 1000.0
Made = tuple[FakeApiServer, Authenticator]


@pytest.fixture
def made(fake: FakeApiServer, api: ApiServer) -> Made:
    clock = Clock(NOW)
    verifier = TokenVerifier(parse(CONFIG), Issuer().fetch, clock, monotonic=clock)
    proofs = ProofChecker(ProofPolicy.IF_BOUND, "the agent", clock=clock)
    return fake, Authenticator(api, verifier, proofs, token_mode=True, clock=clock)


def who(**info: object) -> bytes:
    return reply(201, json.dumps({"status": {"userInfo": info}}).encode())


def service_token(exp: object, **more: object) -> str:
    payload = base64.urlsafe_b64encode(json.dumps({"exp": exp, **more}).encode()).rstrip(b"=").decode()
    return f"aGVhZA.{payload}.c2ln"


async def test_oidc(made: Made) -> None:
    found = await made[1].authenticate(Auth(kind="oidc", token=token(claims())))
    assert (found.identity.username, found.token_mode) == ("oidc:alice", False)
    with pytest.raises(Unauthenticated):
        await made[1].authenticate(Auth(kind="oidc", token="nonsense"))
    assert made[0].requests == [], "an OIDC token is never shown to the API server"


async def test_bearer_is_judged_with_the_callers_own_token(made: Made) -> None:
    fake, judge = made
    fake.routes[REVIEW] = who(username="system:serviceaccount:a:b", uid="u", groups=["g"])
    text = service_token(1500)
    found = await judge.authenticate(Auth(kind="bearer", token=text))
    assert found.token_mode
    assert found.identity.username == "system:serviceaccount:a:b"
    assert found.identity.groups == ("g",)
    assert found.identity.expires_at == 1500.0
    assert fake.last.header("authorization") == [f"Bearer {text}".encode()]
    assert impersonation_of(fake.last) == {}


@pytest.mark.parametrize("text", ["opaque", service_token("x"), service_token(None), service_token(-1), "a.b.c.d"])
async def test_a_token_that_does_not_say_when_it_lapses(made: Made, text: str) -> None:
    made[0].routes[REVIEW] = who(username="x")
    found = await made[1].authenticate(Auth(kind="bearer", token=text))
    assert found.identity.expires_at == NOW + UNKNOWN_LIFE


@pytest.mark.parametrize("exp", [2**53 - 1, 1e15, NOW + 10 * 365 * 86400])
async def test_a_token_that_lapses_in_ages_is_reviewed_again_within_a_day(made: Made, exp: float) -> None:
    made[0].routes[REVIEW] = who(username="x")
    found = await made[1].authenticate(Auth(kind="bearer", token=service_token(exp)))
    assert found.identity.expires_at == NOW + MAX_LIFE


@pytest.mark.parametrize(
    ("iat", "expected"),
    [(900, 900.0), (NOW + LEEWAY, NOW + LEEWAY), (NOW + LEEWAY + 1, 0.0), (2**53, 0.0), (True, 0.0), ("900", 0.0)],
)
async def test_when_a_token_was_issued(made: Made, iat: object, expected: float) -> None:
    """A time that cannot be true says nothing; such a token counts as old (docs/threats.md#V12)."""
    made[0].routes[REVIEW] = who(username="x")
    found = await made[1].authenticate(Auth(kind="bearer", token=service_token(1500, iat=iat)))
    assert found.identity.issued_at == expected
    for text in ("opaque", service_token(1500)):
        found = await made[1].authenticate(Auth(kind="bearer", token=text))
        assert found.identity.issued_at == 0.0


@pytest.mark.parametrize("text", ["", "a b", "a\nb", "a\r\nX: y", "ä", "a.!.b", "=", "a=b"])
async def test_malformed_tokens_never_leave(made: Made, text: str) -> None:
    with pytest.raises(Unauthenticated):
        await made[1].authenticate(Auth(kind="bearer", token=text))
    assert made[0].requests == []


async def test_t31_a_jws_in_json_has_no_second_payload_that_this_agent_reads(made: Made) -> None:
    """Older API servers take the JSON serialisation of a JWS and pass over `x`, which has two dots."""
    fake, judge = made
    fake.routes[REVIEW] = who(username="x")
    forged = base64.urlsafe_b64encode(json.dumps({"exp": 2**52, "iat": 999}).encode()).rstrip(b"=").decode()
    text = f'{{"x":"a.{forged}.b","payload":"p","protected":"h","signature":"s"}}'
    with pytest.raises(Unauthenticated, match="malformed"):
        await judge.authenticate(Auth(kind="bearer", token=text))
    with pytest.raises(Unauthenticated, match="malformed"):
        await judge.review_in_session(text, "")
    assert fake.requests == []


@pytest.mark.parametrize("payload", ["", "a", "bm9uc2Vuc2U", "W10", "eyJhIjoxfR", "eyJhIjoxLCJhIjoyfQ", "ey+", "e30="])
async def test_t31_a_jwt_whose_claims_cannot_be_read_does_not_pass_for_unbound(made: Made, payload: str) -> None:
    fake, judge = made
    fake.routes[REVIEW] = who(username="x")
    with pytest.raises(Unauthenticated):
        await judge.authenticate(Auth(kind="bearer", token=f"a.{payload}.b"))
    assert judge.proofs.taken["none"] == 0


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (reply(401, b"{}"), Unauthenticated),
        (reply(403, b"{}"), Unauthenticated),
        (who(username="system:anonymous"), Unauthenticated),
        (who(username=""), Unauthenticated),
        (who(), Unreachable),
        (reply(201, b"[]"), Unreachable),
        (reply(200, b"{}"), Unreachable),
        (reply(500, b"oops"), Unreachable),
    ],
    ids=range(8),
)
async def test_anything_else_is_no_identity(made: Made, answer: bytes, error: type[Exception]) -> None:
    made[0].routes[REVIEW] = answer
    with pytest.raises(error) as caught:
        await made[1].authenticate(Auth(kind="bearer", token="s3cret"))
    assert "s3cret" not in repr(caught.value)


async def test_an_api_server_that_is_down(made: Made) -> None:
    made[0].stop()
    with pytest.raises(Unreachable):
        await made[1].authenticate(Auth(kind="bearer", token="t"))


async def test_modes_that_are_switched_off(made: Made) -> None:
    closed = Authenticator(made[1].api, None, made[1].proofs, token_mode=False)
    for kind in ("oidc", "bearer"):
        with pytest.raises(PermissionRefused):
            await closed.authenticate(Auth(kind=kind, token="t"))
    with pytest.raises(Unauthenticated):
        await made[1].authenticate(Auth(kind="future", token="t"))


KEY, PEER = ProofKey.generate(), Peer(b"this agent", "sha256:" + "ab" * 32)


def proved(kind: str, text: str, *, key: ProofKey = KEY, peer: Peer = PEER) -> Auth:
    return Auth(kind=kind, token=text, proof=key.sign_proof(text, peer.spki, peer.pin, NOW))


@pytest.mark.parametrize(
    "bound",
    [{"cnf": {"jkt": KEY.thumbprint}}, {"nonce": KEY.nonce()}, {"aud": ["cluster", KEY.audience()]}],
    ids=["cnf", "nonce", "audience"],
)
async def test_t30_a_bound_token_counts_with_the_proof_of_its_key_alone(made: Made, bound: dict[str, object]) -> None:
    fake, judge = made
    fake.routes[REVIEW] = who(username="system:serviceaccount:a:b", uid="u")
    for kind, text in (("oidc", token(claims(**bound))), ("bearer", service_token(1500, **bound))):
        found = await judge.authenticate(proved(kind, text), PEER)
        assert found.proved_key == KEY.thumbprint
        for stolen in (
            Auth(kind=kind, token=text),
            proved(kind, text, key=ProofKey.generate()),
            proved(kind, text, peer=Peer(b"another agent", PEER.pin)),
            proved(kind, text, peer=Peer(PEER.spki, "sha256:" + "cd" * 32)),
        ):
            with pytest.raises(UnprovedToken) as caught:
                await judge.authenticate(stolen, PEER)
            assert caught.value.identity.username == found.identity.username
    assert judge.proofs.taken[found.identity.binding.kind] == 2
    assert sum(judge.proofs.refused.values()) == 8


async def test_t30_a_token_that_is_kept_in_memory_is_proved_each_time(made: Made) -> None:
    text = token(claims(nonce=KEY.nonce()))
    await made[1].authenticate(proved("oidc", text), PEER)
    with pytest.raises(UnprovedToken):
        await made[1].authenticate(Auth(kind="oidc", token=text), PEER)


async def test_t30_a_token_that_the_api_server_refuses_is_refused_for_that(made: Made) -> None:
    made[0].routes[REVIEW] = reply(401, b"{}")
    with pytest.raises(Unauthenticated) as caught:
        await made[1].authenticate(Auth(kind="bearer", token=service_token(1500, nonce=KEY.nonce())), PEER)
    assert not isinstance(caught.value, UnprovedToken)


async def test_t31_required_takes_no_bearer_tokens(made: Made) -> None:
    made[1].proofs = ProofChecker(ProofPolicy.REQUIRED, "the agent", clock=lambda: NOW)
    made[0].routes[REVIEW] = who(username="x")
    for kind, text in (("oidc", token(claims())), ("bearer", "opaque")):
        with pytest.raises(UnprovedToken, match="required"):
            await made[1].authenticate(proved(kind, text), PEER)


async def test_t30_a_request_s_own_token_is_bound_to_the_key_of_its_session(made: Made) -> None:
    fake, judge = made
    fake.routes[REVIEW] = who(username="x")
    bound, unbound = service_token(1500, aud=[KEY.audience()]), service_token(1500)
    assert (await judge.review_in_session(bound, KEY.thumbprint)).username == "x"
    assert (await judge.review_in_session(unbound, "")).username == "x"
    for proved_key in ("", ProofKey.generate().thumbprint):
        with pytest.raises(UnprovedToken, match="bound to another key") as caught:
            await judge.review_in_session(bound, proved_key)
        assert caught.value.identity.username == "x"


async def test_u6_restrictions_come_with_a_kind_that_older_agents_refuse(made: Made) -> None:
    authenticator, record = made[1], Restrictions(read_only=True).encode()
    found = await authenticator.authenticate(Auth("restricted-oidc", token(claims()), restrictions=record))
    assert (found.restrictions.words, found.token_mode) == (("read-only",), False)
    with pytest.raises(Unauthenticated, match="does not announce"):
        await authenticator.authenticate(Auth("oidc", token(claims()), restrictions=record))
    for wrong in (b"", record + b"\x06\x00\x00\x01\x01"):
        with pytest.raises(PermissionRefused):
            await authenticator.authenticate(Auth("restricted-oidc", token(claims()), restrictions=wrong))
    with pytest.raises(Unauthenticated, match="newer than the agent"):
        await authenticator.authenticate(Auth("restricted-restricted-oidc", token(claims()), restrictions=record))
    made[0].routes[REVIEW] = who(username="system:serviceaccount:a:b")
    found = await authenticator.authenticate(Auth("restricted-bearer", service_token(9e9), restrictions=record))
    assert (found.restrictions is not None, found.token_mode) == (True, True)
