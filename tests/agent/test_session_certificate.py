"""The certificate that clients see."""

from __future__ import annotations

import time
from dataclasses import replace

from arcbridge.agent.session_certificate import LIFE, SessionCertificate
from arcbridge.identity.proof import Peer, spki_of
from arcbridge.net.tls import inner_client_context
from arcbridge.pki.authority import Authority
from arcbridge.pki.credentials import AgentCredential
from arcbridge.pki.names import cluster_server_name
from arcbridge.pki.rotation import Rotation
from tests.pki.handshake import handshake


def credential(ca: Authority, cluster: str = "one") -> AgentCredential:
    return AgentCredential(cluster, "", "", "", ca.certificate_pem, ca.key_pem)


def test_clients_that_pin_the_ca_see_what_proofs_name() -> None:
    ca, certificate = Authority.create("test"), SessionCertificate()
    context, peer, oldest = certificate.tls(credential(ca))
    assert not oldest
    shown, _ = handshake(inner_client_context(ca.certificate_pem), context, cluster_server_name("one"))
    assert peer == Peer(spki_of(shown), ca.pin)
    assert certificate.tls(credential(ca, "two")).peer.spki != peer.spki, "a key of its own for each certificate"


def test_a_ca_that_is_rotated_is_shown_with_the_way_back_to_the_former_one() -> None:
    ca, certificate = Authority.create("test"), SessionCertificate()
    state = Rotation(ca.certificate_pem, ca.key_pem).take("next", time.time()).take("activate", time.time())
    rotated = replace(credential(state.authority()), cluster_rotation=state.encode().decode())
    context, peer, oldest = certificate.tls(rotated)
    assert (oldest, peer.pin, peer.other_pins) == (ca.certificate_pem, state.list.pins[1], state.list.pins)
    for known in (ca.certificate_pem, state.certificate, state.list.cas[1]):
        handshake(inner_client_context(known), context, cluster_server_name("one"))
    assert certificate.tls(rotated).peer is peer


def test_it_is_kept_and_issued_again_in_time() -> None:
    now = time.time()
    ca = Authority.create("test")
    certificate = SessionCertificate(clock=lambda: now)
    first = certificate.tls(credential(ca))
    assert certificate.tls(credential(ca)) is first
    now += LIFE * 0.6
    assert certificate.tls(credential(ca)) is first
    now += LIFE * 0.1
    assert certificate.tls(credential(ca)) is not first
    second = certificate.tls(credential(ca))
    assert certificate.tls(credential(ca, "two")) is not second


def test_it_is_issued_again_where_the_clock_was_set_back() -> None:
    """A machine that starts before it knows the time: clients would refuse the certificate until then."""
    now = time.time()
    ca = Authority.create("test")
    certificate = SessionCertificate(clock=lambda: now)
    first = certificate.tls(credential(ca))
    now -= 2 * 86400
    assert certificate.tls(credential(ca)) is not first
