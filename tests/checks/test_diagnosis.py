"""The order of hops decides which failure is the cause."""

from __future__ import annotations

from arcbridge.checks.diagnosis import Finding, FindingState, first_failure


def test_the_first_failure_is_the_cause() -> None:
    fine, late = (
        Finding("DNS", FindingState.OK, "192.0.2.1"),
        Finding("session", FindingState.FAILED, "no agent", "start it", "agent"),
    )
    cause = Finding("relay certificate", FindingState.FAILED, "expired", "renew it", "relay_certificate")
    skipped = Finding("policy", FindingState.SKIPPED, "the relay was not reached")
    warned = Finding("clock", FindingState.WARNING, "40 s slow", "set the clock", "clock")
    assert first_failure([fine, warned, cause, skipped, late]) is cause
    assert first_failure([fine, warned, skipped]) is None
    assert first_failure([]) is None
