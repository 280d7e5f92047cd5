from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import pytest

from arcbridge.errors import ConfigError, ConnectionLost, PinMismatch, Unreachable
from arcbridge.identity.proof import spki_of
from arcbridge.net.address import Address
from arcbridge.net.tls import (
    ALPN_CONTROL,
    ALPN_HTTP,
    ALPN_JOIN,
    ALPN_SESSION,
    RelayTrust,
    fetch_relay_cas,
    fetch_unverified_ca,
    inner_client_context,
    inner_server_context,
    outer_client_context,
    outer_server_contexts,
    untrusted,
)
from arcbridge.pki.authority import Authority
from tests.net.ends import authority, client_context, server_certificate, server_contexts


def talk(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a finished handshake, in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    return ends


def test_version_tickets_and_one_protocol_each() -> None:
    contexts = server_contexts()
    assert set(contexts) == {ALPN_CONTROL, ALPN_JOIN, ALPN_HTTP}
    assert contexts[ALPN_CONTROL].verify_mode == ssl.CERT_REQUIRED
    assert contexts[ALPN_JOIN].verify_mode == ssl.CERT_OPTIONAL
    for alpn, context in contexts.items():
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.num_tickets == 0
        if alpn != ALPN_CONTROL:
            near, far = talk(client_context(alpn), context, "relay.test")
            assert near.version() == far.version() == "TLSv1.3"
            assert near.selected_alpn_protocol() == far.selected_alpn_protocol() == alpn


def test_tls_1_2_is_refused() -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(cadata=authority().certificate_pem)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        talk(old, server_contexts()[ALPN_HTTP], "relay.test")


def test_the_dates_of_a_certificate_have_their_own_cure() -> None:
    error = ssl.SSLCertVerificationError()
    for code, cure in (
        (9, "set the clock of this machine"),
        (10, "ask the relay's operator"),
        (19, "check the relay's address"),
    ):
        error.verify_code, error.verify_message = code, "certificate is not yet valid"
        words = f"the relay's certificate is not trusted for relay.test: certificate is not yet valid; {cure}"
        assert untrusted("relay.test", error).message.startswith(words)


async def test_a_server_without_tls_is_named_as_such() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        with pytest.raises(ConnectionLost, match=r"makes no TLS connection \(.*\): is this an arcbridge relay\?"):
            await fetch_unverified_ca(address)


def test_no_session_can_be_resumed() -> None:
    """docs/threats.md#J14: no ticket ever leaves the server, so there is nothing to resume with."""
    near, far = talk(client_context(), server_contexts()[ALPN_JOIN], "relay.test")
    far.write(b"x")
    assert near.read(1) == b"x"
    assert not near.session.has_ticket


@pytest.mark.parametrize("label", ["CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE"])
def test_t32_the_key_that_a_server_names_as_its_own_is_the_one_that_it_shows(label: str) -> None:
    """OpenSSL reads a certificate behind each of these labels; behind it stands that of the CA."""
    ca = Authority.create("mine")
    issued = ca.issue_server(["mine.cluster.arcbridge"])
    leaf = issued.certificate_pem[: issued.certificate_pem.index("-----END CERTIFICATE-----")]
    leaf = f"{leaf}-----END CERTIFICATE-----\n".replace(" CERTIFICATE-", f" {label}-")
    for chain, key in (
        (leaf + ca.certificate_pem, issued.key_pem),
        (issued.key_pem + leaf + ca.certificate_pem, Authority.create("other").issue_server(["x"]).key_pem),
    ):
        server = inner_server_context(chain, key)
        near, _ = talk(inner_client_context(ca.certificate_pem), server, "mine.cluster.arcbridge")
        shown = near.getpeercert(binary_form=True)
        assert shown is not None
        assert server.spki == spki_of(shown)


def test_the_inner_ends_trust_one_cluster_only() -> None:
    mine, other = Authority.create("mine"), Authority.create("other")
    issued = mine.issue_server(["mine.cluster.arcbridge"])
    server = inner_server_context(issued.certificate_pem, issued.key_pem)
    near, _ = talk(inner_client_context(mine.certificate_pem), server, "mine.cluster.arcbridge")
    assert near.selected_alpn_protocol() == ALPN_SESSION
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(inner_client_context(other.certificate_pem), server, "mine.cluster.arcbridge")
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(inner_client_context(mine.certificate_pem), server, "other.cluster.arcbridge")


def test_bad_pems_are_settings_errors(tmp_path: Path) -> None:
    issued = server_certificate()
    other = authority().issue_server(["x.test"])
    for certificate, key in (("junk", "junk"), (issued.certificate_pem, other.key_pem), (issued.certificate_pem, "")):
        with pytest.raises(ConfigError, match="certificate and key"):
            inner_server_context(certificate, key)
    with pytest.raises(ConfigError, match="not a PEM certificate"):
        outer_server_contexts(issued.certificate_pem, issued.key_pem, "junk")
    (tmp_path / "c.pem").write_text(issued.certificate_pem)
    (tmp_path / "k.pem").write_text(issued.key_pem)
    outer_client_context(RelayTrust(), ALPN_HTTP, client_certificate=(tmp_path / "c.pem", tmp_path / "k.pem"))


class RelayApi:
    def __init__(self, body: str, status: str = "200 OK") -> None:
        self.answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        self.asked = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        writer.close()


@pytest.mark.parametrize("as_json", [False, True])
async def test_the_ca_is_taken_by_its_pin(as_json: bool) -> None:
    pem = authority().certificate_pem
    # What stands around a certificate is not what the pin vouches for.
    api = RelayApi(json.dumps({"ca": f"Subject: CN=other\n{pem}"}) if as_json else pem)
    server = await asyncio.start_server(api.serve, "127.0.0.1", 0, ssl=server_contexts()[ALPN_HTTP])
    async with server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        assert (await fetch_relay_cas(address, authority().pin, proxy="direct")).trusted == pem
        other = Authority.create("other").pin
        with pytest.raises(PinMismatch) as caught:
            await fetch_relay_cas(address, other, proxy="direct")
        assert other in caught.value.message
        assert authority().pin in caught.value.message
        with pytest.raises(ConfigError):
            await fetch_relay_cas(address, "sha256:short", proxy="direct")
    assert api.asked.startswith(b"GET /v1/ca HTTP/1.0\r\n")


@pytest.mark.parametrize(
    ("body", "status"), [("nothing here", "200 OK"), ("gone", "404 Not Found"), ("no HTTP", f"{4301 * '2'} OK")]
)
async def test_no_ca_to_give(body: str, status: str) -> None:
    api = RelayApi(body, status)
    server = await asyncio.start_server(api.serve, "127.0.0.1", 0, ssl=server_contexts()[ALPN_HTTP])
    async with server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        with pytest.raises(Unreachable, match="is this an arcbridge relay"):
            await fetch_relay_cas(address, authority().pin, proxy="direct")
