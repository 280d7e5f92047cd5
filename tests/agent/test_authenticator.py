"""AUTH: OIDC here, service-account tokens at the API server."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from arcbridge.agent.authenticator import MAX_LIFE, REVIEW, UNKNOWN_LIFE, Authenticator
from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.config import KubernetesConfig
from arcbridge.errors import PermissionRefused, Unauthenticated, Unreachable
from arcbridge.identity.authentication import parse
from arcbridge.identity.verifier import LEEWAY, TokenVerifier
from arcbridge.wire.records import Auth
from tests.identity.issuer import CONFIG, Clock, Issuer, claims, token
from tests.support.fake_apiserver import FakeApiServer, impersonation_of, reply

NOW = 1000.0
Made = tuple[FakeApiServer, Authenticator]


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Made]:
    async with FakeApiServer.serving(tmp_path) as fake:
        config = KubernetesConfig(server=fake.url, ca_file=fake.ca_file, token_file=fake.token_file)
        api = ApiServer(endpoint_of(config, {}))
        clock = Clock(NOW)
        verifier = TokenVerifier(parse(CONFIG), Issuer().fetch, clock, monotonic=clock)
        yield fake, Authenticator(api, verifier, token_mode=True, clock=clock)
        await api.close()


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


@pytest.mark.parametrize("text", ["opaque", service_token("x"), service_token(None), service_token(-1), "a.!.b"])
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


@pytest.mark.parametrize("text", ["", "a b", "a\nb", "a\r\nX: y", "ä"])
async def test_malformed_tokens_never_leave(made: Made, text: str) -> None:
    with pytest.raises(Unauthenticated):
        await made[1].authenticate(Auth(kind="bearer", token=text))
    assert made[0].requests == []


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
    closed = Authenticator(made[1]._api, None, token_mode=False)
    for kind in ("oidc", "bearer"):
        with pytest.raises(PermissionRefused):
            await closed.authenticate(Auth(kind=kind, token="t"))
    with pytest.raises(Unauthenticated):
        await made[1].authenticate(Auth(kind="future", token="t"))
