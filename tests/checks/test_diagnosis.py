"""The order of hops decides which failure is the cause; what is wrong with issuers and directories has a code."""

from __future__ import annotations

import pytest

from arcbridge.checks.diagnosis import Finding, FindingState, directory_finding, first_failure, key_finding
from arcbridge.errors import ArcbridgeError, Unreachable, UntrustedCertificate, WrongDocument


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


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (UntrustedCertificate("login: its certificate is not trusted"), "issuer_ca"),
        (WrongDocument("jwt[0]: the discovery document is for another issuer"), "issuer_document"),
        (Unreachable("login: Connection refused"), "issuer_unreachable"),
    ],
    ids=["ca", "document", "unreachable"],
)
@pytest.mark.parametrize("usable", [True, False])
def test_faults(failure: ArcbridgeError, code: str, usable: bool) -> None:
    found = key_finding("jwt[0]", "https://login", usable, failure)
    assert (found.state, found.code) == (FindingState.WARNING if usable else FindingState.FAILED, code)
    assert failure.message in found.detail
    assert found.remedy


def test_nothing_wrong() -> None:
    assert key_finding("jwt[0]", "https://login", True, None).state is FindingState.OK
    assert key_finding("jwt[0]", "https://login", False, None).state is FindingState.SKIPPED


@pytest.mark.parametrize(
    ("usable", "code", "state"),
    [
        (True, "", FindingState.OK),
        (False, "graph_credential", FindingState.FAILED),
        (False, "graph_unreachable", FindingState.FAILED),
        (True, "graph_credential", FindingState.WARNING),
        (True, "graph_permission", FindingState.WARNING),
    ],
)
def test_a_directory_that_can_still_be_asked_is_a_warning(usable: bool, code: str, state: FindingState) -> None:
    found = directory_finding("graph.example", usable, code, "why it is so" if code else "")
    assert (found.hop, found.state, found.code) == ("groups by graph.example", state, code)
    assert bool(found.remedy) is bool(code)
    assert not code or found.detail == "why it is so"
