"""What is remembered of users who joined, and how much."""

from __future__ import annotations

from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import KnownGroups
from arcbridge.pki.authority import Authority
from arcbridge.relay.recent_users import MOST_GROUPS, MOST_USERS, RecentUsers


def identity(name: str, missing: str = "") -> Identity:
    return Identity(name, "", (), f"i#{name}", "i", 0.0, missing_groups_claim=missing)


def test_the_last_token_counts() -> None:
    recent = RecentUsers(clock=lambda: 7.0)
    recent.note(identity("anna"), KnownGroups(("a",), 1))
    recent.note(identity("anna", "roles"), KnownGroups((), 2, "abc"))
    assert recent.rows("anna") == [
        {"from": "join", "at": 7.0, "groups": (), "more": 2, "missing_claim": "roles", "policy": "abc", "cut": 0}
    ]
    assert recent.rows("bob") == []


def test_neither_users_nor_groups_make_it_grow() -> None:
    """docs/threats.md#V23."""
    recent = RecentUsers()
    for n in range(2 * MOST_USERS):
        recent.note(identity(f"user-{n}"), KnownGroups(("g",) * (MOST_GROUPS + n), n))
        recent.note(identity("user-0"), KnownGroups((), 0))
    known = [n for n in range(2 * MOST_USERS) if recent.rows(f"user-{n}")]
    assert known == [0, *range(MOST_USERS + 1, 2 * MOST_USERS)], "the one who came last stays"
    (newest,) = recent.rows(f"user-{known[-1]}")
    assert (len(newest["groups"]), newest["more"]) == (MOST_GROUPS, 2 * known[-1])


def test_e15_what_clients_keep_of_the_relay_s_cas_is_bounded_and_their_own_word() -> None:
    """docs/threats.md#E15."""
    recent, pin = RecentUsers(clock=lambda: 7.0), Authority.create("x").pin
    for said in (pin, "sha256:short", "x" * 60_000, ""):
        recent.note(identity("anna"), KnownGroups((), 0), said)
        assert recent.followers() == [{"user": "anna", "at": 7.0, "relay_ca": pin if said == pin else ""}]
    for n in range(2 * MOST_USERS):
        recent.note(identity(f"user-{n}"), KnownGroups((), 0), pin)
    assert len(recent.followers()) == MOST_USERS == len(recent._cas)
