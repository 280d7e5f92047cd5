"""The certificate that clients see."""

from __future__ import annotations

import ssl

from arcbridge.agent.session_certificate import LIFE, SessionCertificate
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
    context = SessionCertificate().context(credential(ca))
    handshake(context, inner_client_context(ca.certificate_pem), cluster_server_name("one"))


def test_it_is_kept_and_issued_again_in_time() -> None:
    import time

    now = time.time()
    ca = Authority.create("test")
    certificate = SessionCertificate(clock=lambda: now)
    first = certificate.context(credential(ca))
    assert certificate.context(credential(ca)) is first
    now += LIFE * 0.6
    assert certificate.context(credential(ca)) is first
    now += LIFE * 0.1
    assert certificate.context(credential(ca)) is not first
    second = certificate.context(credential(ca))
    assert certificate.context(credential(ca, "two")) is not second
