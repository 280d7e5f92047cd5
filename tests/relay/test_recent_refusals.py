"""Who was refused lately: bounded for each user and in all."""

from __future__ import annotations

from arcbridge.relay.recent_refusals import MOST_REASON, MOST_USERS, OWN, RecentRefusals
from tests.support.clock import Clock


def test_equal_refusals_are_counted_and_the_newest_stay() -> None:
    clock = Clock()
    refusals = RecentRefusals(clock)
    for session in ("s1", "s2"):
        clock.now += 1
        refusals.note("ann", "shop-1", "FORBIDDEN", "policy.rule", "no rule", session)
    refusals.note("bob", "bank", "LIMIT", "", "too many", "s3")
    (row,) = refusals.rows(["shop-*"])
    assert (row["user"], row["times"], row["at"], row["session"]) == ("ann", 2, 1002.0, "s2")
    assert [one["user"] for one in refusals.rows(["*"])] == ["ann", "bob"]
    assert refusals.rows([]) == []


def test_k14_one_user_pushes_out_no_other_and_all_of_it_is_bounded() -> None:
    """docs/threats.md#K14."""
    refusals = RecentRefusals()
    refusals.note("ann", "shop-1", "FORBIDDEN", "", "no rule", "s")
    for number in range(10_000):
        refusals.note("mallory", f"made-up-{number}\n\x1b[2J" + "x" * 300, "FORBIDDEN", "", "y" * 9000, "s")
    rows = refusals.rows(["*"])
    assert len(rows) == OWN + 1
    assert any(row["user"] == "ann" for row in rows)
    assert all(len(row["cluster"].encode()) <= 253 and len(row["reason"]) <= MOST_REASON for row in rows)
    assert not any("\x1b" in row["cluster"] for row in rows)
    for number in range(10_000):
        refusals.note(f"user-{number}", "a", "FORBIDDEN", "", "", "s")
    assert len(refusals.rows(["*"])) == MOST_USERS
