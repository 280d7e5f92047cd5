"""Who may use the relay now: the policy, revoked clusters, revoked logins."""

from __future__ import annotations

import pytest

from arcbridge.identity.claims import Identity
from arcbridge.identity.verifier import LEEWAY
from arcbridge.relay.access import FORBIDDEN, Access
from arcbridge.relay.counters import LOSSES
from arcbridge.relay.registry.base import RegistryUnavailable, UserRevocation
from tests.relay.station import StubPolicy

T = 1_800_000_000
SUBJECT = "https://issuer.test#alice"


def alice(issued_at: float = T - 60.0) -> Identity:
    return Identity("alice", "", (), SUBJECT, "https://issuer.test", T + 600.0, issued_at=issued_at)


def access(*revoked: UserRevocation) -> Access:
    made = Access(StubPolicy())
    assert made.learn_users({one.user: one for one in revoked})
    return made


def test_what_the_policy_gives() -> None:
    assert access().loss(alice(), "prod") is None
    loss = access().loss(alice(), "elsewhere")
    assert (loss.kind, loss.message) == ("policy", FORBIDDEN)


def test_a_revoked_cluster_is_lost_for_all_and_a_session_without_an_identity_with_it() -> None:
    made = access()
    made.clusters = frozenset({"prod"})
    for identity in (alice(), None):
        loss = made.loss(identity, "prod")
        assert (loss.kind, loss.message) == ("cluster", FORBIDDEN)
    assert made.loss(alice(), "other") is None
    assert made.loss(None, "other") is None


@pytest.mark.parametrize("user", ["alice", SUBJECT])
def test_a_user_is_revoked_by_name_or_by_subject(user: str) -> None:
    made = access(UserRevocation(user, T, "left the company"))
    loss = made.loss(alice(), "prod")
    assert loss.kind == "user"
    assert loss.message == (
        "your logins from before 2027-01-15T08:00:00Z were revoked (left the company): log in again, or ask the "
        "relay's operator"
    )
    assert not made.allows(alice(), "prod")


def test_every_reason_has_its_counter() -> None:
    made = access(UserRevocation("alice", T))
    made.clusters = frozenset({"prod"})
    found = {made.loss(alice(), "prod"), made.loss(None, "prod"), made.loss(alice(T + LEEWAY), "elsewhere")}
    assert {loss.kind for loss in found if loss is not None} == set(LOSSES)


@pytest.mark.parametrize(
    ("issued_at", "refused"), [(T - 1, True), (T + LEEWAY - 0.5, True), (T + LEEWAY, False), (0.0, True)]
)
def test_tokens_issued_before_the_time_count_no_more(issued_at: float, refused: bool) -> None:
    """A token that does not say when it was issued counts as old, and so does one that differing clocks may hide."""
    made = access(UserRevocation("alice", T))
    assert (made.loss(alice(issued_at), "prod") is not None) is refused
    assert made.allows(alice(issued_at), "prod") is not refused


def test_neither_the_bare_subject_nor_part_of_a_name_revokes_another_user() -> None:
    assert access(UserRevocation("ali", T), UserRevocation("alice2", T)).loss(alice(), "prod") is None
    other = Identity("bob", "", (), "https://other.test#alice", "https://other.test", T + 600.0, issued_at=T - 60.0)
    assert access(UserRevocation(SUBJECT, T)).loss(other, "prod") is None


def test_before_it_is_known_who_is_revoked_no_user_may_come_and_what_runs_runs_on() -> None:
    made = Access(StubPolicy())
    with pytest.raises(RegistryUnavailable):
        made.refusal(alice())
    assert made.loss(alice(), "prod") is None
    made.learn_users({})
    assert made.refusal(alice()) is None


def test_the_version_changes_with_all_that_decides() -> None:
    policy = StubPolicy()
    made = Access(policy)
    versions = [made.version]

    def changed() -> bool:
        versions.append(made.version)
        return versions[-1] != versions[-2]

    assert not changed()
    policy.allowed.discard(("alice", "prod"))
    assert changed()
    made.clusters = frozenset({"prod"})
    assert changed()
    made.learn_users({})
    assert changed()
    made.learn_users({"alice": UserRevocation("alice", T)})
    assert changed()
    known = made.users
    made.learn_users({"alice": UserRevocation("alice", T)})
    assert not changed()
    assert made.users is known
    made.learn_users({"alice": UserRevocation("alice", T + 1)})
    assert changed()
