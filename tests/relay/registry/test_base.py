import ssl

import pytest

from arcbridge.errors import EnrolmentRefused
from arcbridge.identity.verifier import LEEWAY, MAX_LIFETIME
from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay.registry.base import (
    KEEP_REVOKED,
    MAX_REASON,
    MAX_USER,
    ClusterRecord,
    Recovery,
    admit,
    cluster_state,
    recovery_of,
)
from arcbridge.wire.frames import FRAMES, FrameType
from arcbridge.wire.records import Revoke

NOW = 1_800_000_000.0


def test_a_revocation_is_kept_until_the_longest_token_has_lapsed() -> None:
    """A token issued just before its time lasts for the longest life, and the clocks may differ at both ends of it."""
    assert KEEP_REVOKED >= MAX_LIFETIME + 2 * LEEWAY


def test_every_revocation_fits_into_its_frame() -> None:
    longest = Revoke("ü" * (MAX_USER // 2), (1 << 53) - 1, True, "\U0001f600" * MAX_REASON)
    assert len(longest.encode()) <= FRAMES[FrameType.REVOKE].largest


def record(*, revoked: float = 0.0, valid_since: float = 0.0) -> ClusterRecord:
    return ClusterRecord("prod", "", "", NOW, revoked=revoked, valid_since=valid_since)


def test_a_certificate_that_states_another_cluster_ca_may_not() -> None:
    ca, ours, theirs = Authority.create("relay CA"), Authority.create("ours"), Authority.create("theirs")
    known = ClusterRecord("prod", ours.certificate_pem, ours.pin, NOW)
    for pin, fine in ((ours.pin, True), ("", True), (theirs.pin, False)):
        pem = ca.sign_agent(make_csr(make_key()), "prod", life=600, cluster_ca_pin=pin)
        certificate = ssl.PEM_cert_to_DER_cert(pem)
        if fine:
            assert admit(known, certificate) is known
            continue
        with pytest.raises(EnrolmentRefused, match="--rebind") as caught:
            admit(known, certificate)
        assert ours.pin in caught.value.message
        assert theirs.pin in caught.value.message


def test_which_certificates_may_act_for_a_cluster() -> None:
    ca = Authority.create("relay CA", clock=lambda: NOW)
    certificate = ssl.PEM_cert_to_DER_cert(ca.sign_agent(make_csr(make_key()), "prod", life=7 * 86400))
    for fine in (record(), record(valid_since=NOW - 10), record(valid_since=NOW)):
        assert admit(fine, certificate) is fine
    for refused, why in (
        (None, "not enrolled"),
        (record(revoked=NOW), "revoked"),
        (record(valid_since=NOW + 10), "another cluster CA"),
    ):
        with pytest.raises(EnrolmentRefused, match=why):
            admit(refused, certificate)


@pytest.mark.parametrize(
    ("agents", "seen", "expires", "revoked", "state"),
    [
        (1, 0.0, 0.0, 0.0, "Connected"),
        (1, 50.0, 90.0, 0.0, "Connected"),
        (0, 0.0, 0.0, 0.0, "Connecting"),
        (0, 0.0, 200.0, 0.0, "Connecting"),
        (0, 50.0, 200.0, 0.0, "Offline"),
        (0, 50.0, 100.0, 0.0, "Expired"),
        (0, 0.0, 99.0, 0.0, "Expired"),
        (0, 0.0, 200.0, 10.0, "Offline"),
    ],
)
def test_states(agents: int, seen: float, expires: float, revoked: float, state: str) -> None:
    record = ClusterRecord("c", "", "", 1.0, last_seen=seen, certificate_expires=expires, revoked=revoked)
    assert cluster_state(record, agents, 100.0) == state


def test_a_recovery_that_a_newer_relay_has_stored_is_read() -> None:
    assert recovery_of({"cause": "lost", "began": 5.0, "awaited": ["prod"], "more": 1}) == Recovery(
        "lost", 5.0, awaited=("prod",)
    )
