"""Whose request it is: by the texts of its tokens alone, and what is asked of a caller."""

from __future__ import annotations

import base64

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from arcbridge.client.credentials.tokens import OneToken
from arcbridge.client.serving.gateway.caller_tokens import (
    RELAY_HEADER,
    CallerTokens,
    GivenTokens,
    caller_tokens,
    other_subprotocols,
)
from arcbridge.errors import Unauthenticated
from arcbridge.http_fields import TOKEN_PROTOCOL
from arcbridge.settings.config import LoginConfig
from tests.client.session.test_session_manager import jwt_like

SECRET = "a-secret-token"
WEBSOCKET = ("Upgrade", "websocket")


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


def subprotocol(token: str) -> str:
    return TOKEN_PROTOCOL + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


def test_the_tokens_of_a_request() -> None:
    both = headers(("Authorization", "Bearer of-cluster"), (RELAY_HEADER, "bearer of-relay"))
    assert caller_tokens(both, one_token=False) == CallerTokens("of-relay", "of-cluster")
    assert caller_tokens(headers(("authorization", "Bearer one")), one_token=True) == CallerTokens("one", "one")


@pytest.mark.parametrize("token", ["t", "to", "tok", SECRET])
def test_a_browser_sends_its_token_as_a_subprotocol(token: str) -> None:
    found = headers(WEBSOCKET, ("Sec-WebSocket-Protocol", f"{subprotocol(token)}, v5.channel.k8s.io"))
    assert caller_tokens(found, one_token=True).cluster == token
    assert other_subprotocols(found) == ["v5.channel.k8s.io"]


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([], "send your token for the cluster"),
        ([("Authorization", f"Basic {SECRET}")], "form `Bearer TOKEN`"),
        ([("Authorization", "Bearer")], "is empty"),
        ([("Authorization", f"Bearer {SECRET} {SECRET}")], "not hold one token"),
        ([("Authorization", f"Bearer {SECRET}é")], "form `Bearer TOKEN`"),
        ([("Authorization", f"Bearer {SECRET}")] * 2, "more than one token"),
        (
            [WEBSOCKET, ("Authorization", f"Bearer {SECRET}"), ("Sec-WebSocket-Protocol", subprotocol(SECRET))],
            "more than one",
        ),
        ([("Sec-WebSocket-Protocol", subprotocol(SECRET))], "send your token"),
        ([WEBSOCKET, ("Sec-WebSocket-Protocol", f"{TOKEN_PROTOCOL}*")], "is empty"),
        ([WEBSOCKET, ("Sec-WebSocket-Protocol", f"{TOKEN_PROTOCOL}abcde")], "not base64url"),
        ([("Authorization", "Bearer c"), (RELAY_HEADER, "Bearer a"), (RELAY_HEADER, "Bearer b")], "more than once"),
        ([("Authorization", f"Bearer {'x' * 70_000}")], "more than 64 KiB"),
        ([("Authorization", f"Bearer {SECRET}")], "relay and cluster would get the same token"),
        ([("Authorization", f"Bearer {SECRET}"), (RELAY_HEADER, f"Bearer {SECRET}")], "would get the same token"),
    ],
)
def test_what_is_refused_quotes_no_token(pairs: list[tuple[str, str]], says: str) -> None:
    with pytest.raises(Unauthenticated, match=says) as refused:
        caller_tokens(headers(*pairs), one_token=False)
    assert SECRET not in refused.value.message


def test_tokens_are_not_shown() -> None:
    assert SECRET not in repr(CallerTokens(SECRET, SECRET))


async def test_a_session_gets_the_given_tokens_and_no_others() -> None:
    tokens = GivenTokens(CallerTokens("of-relay", "of-cluster"), LoginConfig())
    tokens.refused()
    assert await tokens.access() == "of-relay"
    assert (await tokens.cluster()).text == tokens.cluster_at_hand() == "of-cluster"
    assert (await tokens.for_cluster("other").cluster()).text == "of-cluster"


async def test_a_relays_token_that_is_good_in_a_cluster_is_refused() -> None:
    """Such as two tokens that a tool has swapped, or two of one audience: their texts differ."""
    given = CallerTokens(jwt_like(600, aud=["arcbridge-relay", "arcbridge-berlin"]), "of-cluster")
    with pytest.raises(OneToken, match=r"audience of a cluster as well \(arcbridge-berlin\)"):
        await GivenTokens(given, LoginConfig(cluster_audience="arcbridge-{cluster}")).access()
    for login in (LoginConfig(), LoginConfig(cluster_audience="arcbridge-{cluster}", one_token=True)):
        assert await GivenTokens(given, login).access() == given.relay
