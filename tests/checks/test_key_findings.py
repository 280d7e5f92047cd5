"""Three faults of an issuer, and older keys that are still good."""

from __future__ import annotations

import pytest

from arcbridge.checks.diagnosis import FindingState
from arcbridge.checks.key_findings import key_finding
from arcbridge.errors import ArcbridgeError, Unreachable, UntrustedCertificate, WrongDocument


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
