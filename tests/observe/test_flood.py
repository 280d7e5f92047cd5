"""Sampling of floods: bounded lines, nothing uncounted (docs/threats.md#O4)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arcbridge.observe.flood import ALLOWANCE, MAX_KEYS, WINDOW, Flood


def test_a_flood_is_sampled_and_the_omitted_are_counted() -> None:
    flood = Flood()
    passed = [flood.admit("join.refused", "warning", "bad token", 100.0) for _ in range(10_000)]
    assert passed.count(0) == ALLOWANCE
    assert flood.omitted == 10_000 - ALLOWANCE
    assert flood.admit("join.refused", "warning", "bad token", 100.0 + WINDOW) == 10_000 - ALLOWANCE
    assert flood.admit("join.refused", "warning", "bad token", 100.0 + WINDOW) == 0


def test_one_reason_does_not_hide_another() -> None:
    flood = Flood(allowance=1)
    assert flood.admit("join.refused", "warning", "bad token", 0.0) == 0
    assert flood.admit("join.refused", "warning", "bad token", 0.0) is None
    assert flood.admit("join.refused", "warning", "policy", 0.0) == 0
    assert flood.admit("join.refused", "error", "bad token", 0.0) == 0


def test_reasons_that_a_stranger_invents_share_one_bucket() -> None:
    flood = Flood(allowance=1)
    passed = sum(flood.admit("x", "info", f"reason {n}", 0.0) is not None for n in range(100_000))
    assert passed <= MAX_KEYS + 1


def test_quiet_keys_make_room() -> None:
    flood = Flood(allowance=1)
    for n in range(MAX_KEYS):
        flood.admit(f"event {n}", "info", "", 0.0)
    assert flood.admit("late", "info", "", WINDOW) == 0
    assert flood.admit("later", "info", "", WINDOW) == 0, "each has a bucket of its own"


def test_what_invented_reasons_cost_is_counted_within_bounds() -> None:
    flood = Flood(allowance=1)
    passed = sum(flood.admit("x", "info", f"reason {n % 2000}", 0.0) is not None for n in range(10_000))
    outstanding = flood.outstanding()
    assert sum(outstanding.values()) == flood.omitted == 10_000 - passed
    assert set(outstanding) == {"x", "other"}


def test_debug_has_a_larger_allowance() -> None:
    flood = Flood(allowance=1, debug_allowance=3)
    assert [flood.admit("frame", "debug", "", 0.0) for _ in range(4)] == [0, 0, 0, None]


def test_what_was_never_reported_is_reported_at_the_end_once() -> None:
    flood = Flood(allowance=1)
    for _ in range(5):
        flood.admit("x", "info", "a", 0.0)
    assert flood.outstanding() == {"x": 4}
    assert flood.outstanding() == {}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 30)), max_size=300))
def test_every_event_passes_or_is_counted(steps: list[tuple[str, float]]) -> None:
    flood = Flood(allowance=3)
    now, passed, reported = 0.0, 0, 0
    for reason, pause in steps:
        now += pause
        before = flood.admit("event", "info", reason, now)
        if before is not None:
            passed += 1
            reported += before
    assert passed + flood.omitted == len(steps)
    assert reported + sum(flood.outstanding().values()) == flood.omitted
