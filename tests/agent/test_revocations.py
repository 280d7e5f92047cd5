"""Who is revoked: one list per relay and the denylist, joined; no list gives back what another has taken
(docs/threats.md#V11, docs/threats.md#V12, docs/threats.md#V14).
"""

from __future__ import annotations

import math

import pytest

from arcbridge.agent import revocations as module
from arcbridge.agent.revocations import CLOCK_SKEW, CLUSTER, AccessRevoked, Revocation, Revocations
from arcbridge.errors import PermissionRefused
from arcbridge.identity.claims import Identity
from arcbridge.wire.records import Revoke

NOW = 2000.0


def alice(issued: float = 1000.0) -> Identity:
    return Identity("oidc:alice", "", (), "https://issuer#alice", "https://issuer", 9000.0, issued_at=issued)


def made() -> Revocations:
    return Revocations(clock=lambda: NOW)


@pytest.mark.parametrize("name", ["oidc:alice", "https://issuer#alice"])
def test_a_user_is_found_by_username_and_by_subject(name: str) -> None:
    lists = made()
    lists.check(alice())
    lists.hear("r1", Revoke(name, 1500))
    with pytest.raises(AccessRevoked):
        lists.check(alice())
    lists.hear("r1", Revoke(name, 0))
    lists.check(alice())
    lists.deny({name: Revocation(name)})
    with pytest.raises(PermissionRefused):
        lists.check(alice(NOW))


@pytest.mark.parametrize("name", ["alice", "oidc:Alice", "oidc:alice ", "oidc:alicea", ""])
def test_no_other_user_is_revoked(name: str) -> None:
    lists = made()
    lists.hear("r1", Revoke(name, 1500))
    assert lists.find(alice()) is None


@pytest.mark.parametrize(
    ("issued", "revoked"),
    [(0.0, True), (1499.0, True), (1500.0 + CLOCK_SKEW - 0.5, True), (1500.0 + CLOCK_SKEW, False), (1999.0, False)],
)
def test_v12_by_when_the_token_was_issued(issued: float, revoked: bool) -> None:
    """A token that does not say is old, and one so shortly after the time may have been issued before it."""
    lists = made()
    lists.hear("r1", Revoke("oidc:alice", 1500))
    assert (lists.find(alice(issued)) is not None) is revoked


def test_v14_a_relay_gives_back_only_what_it_took() -> None:
    lists = made()
    lists.deny({"oidc:alice": Revocation("oidc:alice")})
    for relay in ("r1", "r2"):
        lists.hear(relay, Revoke("oidc:alice", 1500, True))
    assert len(lists) == 3
    lists.hear("r1", Revoke("oidc:alice", 0))
    lists.hear("r3", Revoke("oidc:alice", 0))
    lists.hear("r3", Revoke("", 0, True))
    assert lists.find(alice()) is not None
    lists.hear("r2", Revoke("", 0, True))  # its list is empty now
    assert lists.find(alice()) is not None, "the cluster's own operator has denied the user"
    lists.deny({})
    assert lists.find(alice()) is None
    assert len(lists) == 0


def test_a_connection_begins_the_relay_s_list_anew_and_no_other_s() -> None:
    lists = made()
    lists.hear("r1", Revoke("oidc:alice", 1500, True))
    lists.hear("r1", Revoke("oidc:bob", 1500))
    lists.hear("r2", Revoke("oidc:carol", 1500, True))
    lists.hear("r1", Revoke("oidc:bob", 1500, True))
    assert lists.find(alice()) is None
    assert len(lists) == 2


def test_of_several_the_one_of_longest_effect_is_told() -> None:
    lists = made()
    lists.hear("r1", Revoke("oidc:alice", 1500, True, "laptop stolen"))
    with pytest.raises(AccessRevoked, match="log in again"):
        lists.check(alice())
    lists.deny({"oidc:alice": Revocation("oidc:alice", reason="left")})
    with pytest.raises(AccessRevoked) as caught:
        lists.check(alice())
    words = "access was revoked: the cluster's operator says \"left\"; ask the cluster's operator for access"
    assert caught.value.message == words


def test_what_the_user_is_told() -> None:
    assert Revocation("a").sentence(NOW) == "access was revoked: ask the cluster's operator for access"
    moment = "access was revoked: logins from before 1970-01-01T00:25:00Z count no more: log in again"
    assert Revocation("a", 1500.0).sentence(NOW) == moment
    # A time that lies ahead refuses every token of now: to log in again would not help.
    assert (
        Revocation("a", NOW + 1e6, by="relay").sentence(NOW)
        == "access was revoked: ask the relay's operator for access"
    )
    assert (
        Revocation("a", float(2**64 - 1), by="relay").sentence(NOW)
        == "access was revoked: ask the relay's operator for access"
    )


def test_v14_a_relay_s_words_stay_short_and_on_one_line() -> None:
    lists = made()
    lists.hear("r1", Revoke("oidc:alice", 1500, True, "\x1b[2Jlog in at\nhttps://evil.example " + "x" * 3000))
    with pytest.raises(AccessRevoked) as caught:
        lists.check(alice())
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 350
    assert caught.value.message.startswith(
        "access was revoked: the relay's operator says \"\\x1b[2Jlog in at\\nhttps://evil.example"
    )


def test_the_news_are_told_once_and_name_every_user() -> None:
    lists = made()
    told: list[int] = []
    lists.on_news = lambda: told.append(1)
    lists.hear("r1", Revoke("", 0, True))
    lists.hear("r1", Revoke("oidc:alice", 0))
    assert told == []
    lists.hear("r1", Revoke("oidc:alice", 1500))
    lists.hear("r1", Revoke("oidc:alice", 1400))
    lists.hear("r1", Revoke("oidc:alice", 0))
    lists.deny({"oidc:bob": Revocation("oidc:bob")})
    assert len(told) == 3
    news = lists.take_news()
    assert {name: one.before for name, one in news.items()} == {"oidc:alice": 1500.0, "oidc:bob": math.inf}
    assert news["oidc:bob"].by == CLUSTER
    assert lists.take_news() == {}


def test_v14_a_relay_cannot_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LIST", 10 * module.ENTRY + 100)
    lists = made()
    for number in range(20):
        kept = lists.hear("r1", Revoke(f"user-{number:05}", 1500))
        assert kept is (number < 10)
    assert (len(lists), lists.left_out) == (10, 10)
    assert len(lists.take_news()) == 20, "the sessions of those who are left out end as well"
    assert lists.hear("r1", Revoke("user-00003", 1600, reason="" * 5)), "one that is there changes"
    assert lists.hear("r1", Revoke("user-00003", 0))
    assert lists.hear("r1", Revoke("user-00099", 1500)), "there is room again"
    assert lists.hear("r2", Revoke("user-00001", 1500)), "another relay has a list of its own"
    assert lists.hear("r1", Revoke("oidc:alice", 1500, True, "x" * 80))
    assert len(lists) == 2
