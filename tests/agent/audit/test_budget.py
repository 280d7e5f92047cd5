"""Bytes of records of one user: what may be written, what is left out, and how it is counted."""

from __future__ import annotations

from arcbridge.agent.audit.budget import BURST, SEALED, AuditBudget

LINE = "x" * (1000 - SEALED)


def budget(rate: int = 1000) -> AuditBudget:
    made = AuditBudget("alice")
    made.change(0.0, rate)
    return made


def test_a27_what_only_reads_is_left_out_and_counted() -> None:
    found = budget()
    assert [found.admit(LINE, 0.0) for _ in range(BURST + 5)] == [True] * BURST + [False] * 5
    for _ in range(5):
        found.leave_out(LINE)
    assert found.take_left_out() == (5, 5000)
    assert found.take_left_out() == (0, 0)
    assert found.admit(LINE, 1.0), "a second later there is room for one more"
    assert not found.admit(LINE, 1.5)


def test_a27_what_is_written_in_any_case_is_owed() -> None:
    found = budget()
    assert not found.is_spent(0.0)
    for _ in range(BURST + 2):
        found.charge(LINE, 0.0)
    assert found.is_spent(2.0)
    assert not found.is_spent(2.1)


def test_bytes_are_counted_and_not_characters() -> None:
    found = budget()
    found.charge("\u20ac" * BURST * 1000, 0.0)
    assert found.is_spent(20.0)


def test_what_was_taken_before_is_used_before_more_is_taken() -> None:
    """A line that is not ASCII took a portion from the bucket each time, and the user had all of it later, at once."""
    found = budget(rate=100_000)
    for _ in range(100):
        assert found.admit("\u20ac" * 10, 0.0)
    assert not found.admit("x" * (BURST * 100_000 + 32 * 1024), 1e6), "more than the bucket and two portions"
    assert found.admit("x" * (BURST * 100_000 - SEALED), 1e6)


def test_no_limit() -> None:
    found = budget(0)
    assert all(found.admit(LINE, 0.0) for _ in range(10_000))
    found.charge(LINE, 0.0)
    assert not found.is_spent(0.0)


def test_another_limit_counts_from_now_on() -> None:
    found = budget()
    for _ in range(BURST):
        found.charge(LINE, 0.0)
    found.change(0.0, 2000)
    assert not found.is_spent(0.0), "what was spent stays spent, of a larger burst"
    found.change(0.0, 500)
    assert found.is_spent(0.0)
    found.change(0.0, 0)
    assert not found.is_spent(0.0)
