"""The order of hops decides which failure is the cause."""

from __future__ import annotations

from arcbridge.checks.diagnosis import Finding, State, first_failure


def test_the_first_failure_is_the_cause() -> None:
    fine, late = (
        Finding("DNS", State.OK, "192.0.2.1"),
        Finding("session", State.FAILED, "no agent", "start it", "agent"),
    )
    cause = Finding("relay certificate", State.FAILED, "expired", "renew it", "relay_certificate")
    skipped = Finding("policy", State.SKIPPED, "the relay was not reached")
    warned = Finding("clock", State.WARNING, "40 s slow", "set the clock", "clock")
    assert first_failure([fine, warned, cause, skipped, late]) is cause
    assert first_failure([fine, warned, skipped]) is None
    assert first_failure([]) is None
