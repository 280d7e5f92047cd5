"""Who acts for the user of a token: RFC 8693 §4.1, clients of the settings, what is refused (docs/threats.md#T65)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.identity.actor import MAX_CHAIN, actor_of, admits
from arcbridge.identity.authentication import parse
from arcbridge.identity.claims import map_claims
from arcbridge.identity.names import MAX_NAME, is_plain
from arcbridge.identity.refusal import TokenRefused
from arcbridge.refusals import RefusalRule

from .issuer import CONFIG, URL, claims

BOT = {"sub": "bot"}
CLIENTS = frozenset({"bot", "ci"})


@pytest.mark.parametrize(
    ("found", "actor"),
    [
        ({}, ""),
        ({"act": BOT}, "bot"),
        ({"act": {"client_id": "bot"}}, "bot"),
        ({"act": {"sub": "bot", "client_id": "other"}}, "bot"),
        ({"act": {"sub": "bot", "iss": URL}}, "bot"),
        ({"act": {"sub": "bot", "iss": "https://other.example"}}, "https://other.example#bot"),
        # RFC 8693 §4.1, figure 6: the outermost is the present one, and those within it are history.
        ({"act": {"sub": "https://service16.example", "act": {"sub": "https://service77.example"}}},
         "https://service16.example"),
        ({"act": {**BOT, "act": {}}}, "bot"),
        ({"act": BOT, "azp": "ci"}, "bot"),
        ({"azp": "ci"}, "ci"),
        # An id token without `azp`: its audience is its client.
        ({"aud": "bot"}, "bot"),
        ({"aud": ["arcbridge", "bot"]}, "bot"),
        ({"aud": "bot", "azp": "kubectl"}, ""),
        ({"aud": [7, None]}, ""),
        ({"client_id": "bot", "azp": "kubectl"}, "bot"),
        ({"client_id": "kubectl", "azp": "bot"}, "bot"),
        ({"appid": "bot"}, "bot"),
        ({"cid": "bot"}, "bot"),
        ({"azp": "kubectl"}, ""),
        ({"azp": None, "cid": "CI"}, ""),
    ],
)  # fmt: skip
def test_the_actor_of_a_token(found: dict[str, Any], actor: str) -> None:
    assert actor_of({"sub": "alice", **found}, URL, CLIENTS) == actor


def chain(length: int) -> dict[str, Any]:
    act: dict[str, Any] = {"sub": "bot-0"}
    for number in range(1, length):
        act = {"sub": f"bot-{number}", "act": act}
    return act


MALFORMED = [
    None,
    "bot",
    ["bot"],
    True,
    [],
    {},
    {"sub": ""},
    {"sub": None},
    {"sub": ["bot"]},
    {"sub": 5, "client_id": "bot"},
    {"sub": "bot", "iss": 5},
    {"sub": "bot", "iss": None},
    {"sub": "bot\n"},
    {"sub": "bo\u200bt"},
    {"sub": "*"},
    {"sub": "x" * (MAX_NAME + 1)},
    {"sub": "bot", "act": None},
    {"sub": "bot", "act": "former"},
    {"sub": "bot", "act": {"sub": "former", "act": 1}},
    chain(MAX_CHAIN + 1),
]


@pytest.mark.parametrize("act", MALFORMED, ids=[repr(act)[:40] for act in MALFORMED])
def test_an_act_that_cannot_be_read_makes_no_user_without_an_actor(act: object) -> None:
    with pytest.raises(TokenRefused, match="who acts for its user; ask the operator of its issuer") as caught:
        map_claims(parse(CONFIG).issuers[0], {**claims(), "act": act})
    assert caught.value.rule is RefusalRule.CLAIMS_ACT
    assert caught.value.detail.startswith("claim 'act' ")
    assert len(caught.value.detail) < 200, "no value of the token is in it"


def test_the_longest_chain_that_is_read() -> None:
    assert actor_of({"act": chain(MAX_CHAIN)}, URL) == f"bot-{MAX_CHAIN - 1}"


def test_no_further_than_its_bound_is_read() -> None:
    """A chain of any length costs the same: it is followed, and not recursed into."""
    with pytest.raises(TokenRefused, match="who acts for its user"):
        actor_of({"act": chain(100_000)}, URL)


def test_a_client_that_cannot_be_compared_is_refused() -> None:
    assert actor_of({"azp": ["bot"]}, URL) == "", "no setting compares it"
    with pytest.raises(TokenRefused, match="names its client") as caught:
        actor_of({"azp": ["bot"]}, URL, CLIENTS)
    assert caught.value.rule is RefusalRule.CLAIMS_ACT


def test_what_names_no_actor_is_for_users_alone() -> None:
    assert admits((), "")
    assert not admits((), "bot")
    assert not admits(("bot",), "")
    assert not admits(("*",), "")
    assert admits(("bot",), "bot")
    assert admits(("*",), "bot")
    assert not admits(("bo*",), "bot")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["sub", "iss", "act", "x"]), inner),
)


@given(JSON, st.dictionaries(st.sampled_from(["azp", "client_id", "cid"]), JSON))
def test_any_claims_have_one_plain_actor_none_or_are_refused(act: Any, more: dict[str, Any]) -> None:
    try:
        actor = actor_of({"sub": "alice", "act": act, **more}, URL, CLIENTS)
    except TokenRefused:
        return
    assert is_plain(actor), "an `act` that is there never leaves the user alone"
    assert actor != "*"
