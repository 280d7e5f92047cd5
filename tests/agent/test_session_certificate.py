"""The certificate that clients see."""

from __future__ import annotations

import contextlib
import ssl

from arcbridge.agent.session_certificate import LIFE, SessionCertificate
from arcbridge.identity.proof import Peer, spki_of
from arcbridge.net.tls import inner_client_context
from arcbridge.pki.authority import Authority
from arcbridge.pki.credentials import AgentCredential
from arcbridge.pki.names import cluster_server_name


def credential(ca: Authority, cluster: str = "one") -> AgentCredential:
    return AgentCredential(cluster, "", "", "", ca.certificate_pem, ca.key_pem)


def handshake(server_context: ssl.SSLContext, client_context: ssl.SSLContext, name: str) -> None:
    """A TLS handshake in memory; raises what the client finds wrong."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass


def test_clients_that_pin_the_ca_accept_it() -> None:
    ca = Authority.create("test")
    context = SessionCertificate().tls(credential(ca)).context
    handshake(context, inner_client_context(ca.certificate_pem), cluster_server_name("one"))


def test_what_it_shows_is_what_proofs_name() -> None:
    ca = Authority.create("test")
    certificate = SessionCertificate()
    context, peer = certificate.tls(credential(ca))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = inner_client_context(ca.certificate_pem).wrap_bio(
        to_client, to_server, server_hostname=cluster_server_name("one")
    )
    for _ in range(2):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    shown = client.getpeercert(binary_form=True)
    assert shown is not None
    assert peer == Peer(spki_of(shown), ca.pin)
    assert certificate.tls(credential(ca, "two")).peer.spki != peer.spki, "a key of its own for each certificate"


def test_it_is_kept_and_issued_again_in_time() -> None:
    import time

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
