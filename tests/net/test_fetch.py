"""Fetching the documents of an issuer: bounds, no redirects, the CA that was asked for."""

from __future__ import annotations

import asyncio
import ssl
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
import trustme

from arcbridge.errors import Unreachable, UntrustedCertificate
from arcbridge.net.fetch import KEPT, HttpFetcher, _refused_certificate
from arcbridge.net.system_trust import trusting_context
from tests.pki.handshake import plain_chain

CA = trustme.CA()
OTHER_CA = trustme.CA()
CA_PEM = CA.cert_pem.bytes().decode()


def answer(head: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {head}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@asynccontextmanager
async def serving(
    data: bytes, *, hold: bool = False, certificate: trustme.LeafCert | None = None
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A TLS server that records each request and answers `data`; with `hold` it then stays silent."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    (certificate or CA.issue_cert("localhost")).configure_cert(context)
    seen: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(data)
        if not hold:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"https://localhost:{port}/keys", seen
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


@pytest.fixture
async def fetch() -> AsyncIterator[HttpFetcher]:
    fetcher = HttpFetcher(deadline=30.0, limit=1000)
    yield fetcher
    await fetcher.close()


async def test_a_document(fetch: HttpFetcher) -> None:
    async with serving(answer("200 OK\r\nCache-Control: public, max-age=300", b"{}")) as (url, seen):
        document = await fetch(url, CA_PEM)
    assert document.body == b"{}"
    assert document.max_age == 300.0
    assert b"uthorization" not in seen[0]
    # Kubernetes' API server answers 406 for its key set where `Accept` does not name that media type.
    assert b"\r\nAccept: application/json, application/jwk-set+json\r\n" in seen[0]


@pytest.mark.parametrize(
    ("control", "age"), [("no-store", 0.0), ("max-age=0", 0.0), ("private", None), ("x-max-age=9", None)]
)
async def test_cache_control(fetch: HttpFetcher, control: str, age: float | None) -> None:
    async with serving(answer(f"200 OK\r\nCache-Control: {control}", b"{}")) as (url, _):
        assert (await fetch(url, CA_PEM)).max_age == age


@pytest.mark.parametrize(
    "data",
    [
        answer("404 Not Found"),
        answer("302 Found\r\nLocation: https://localhost/elsewhere"),
        answer("200 OK", b"x" * 1001),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"200\r\n"
        + b"x" * 512
        + b"\r\n200\r\n"
        + b"x" * 512,
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"SSH-2.0-x\r\n",
        b"",
    ],
    ids=["404", "redirect", "large", "large chunked", "cut short", "not HTTP", "nothing"],
)
async def test_anything_but_a_good_answer(fetch: HttpFetcher, data: bytes) -> None:
    async with serving(data) as (url, seen):
        words = "localhost" if data else "localhost: it ended the connection without an"
        with pytest.raises(Unreachable, match=words) as caught:
            await fetch(url, CA_PEM)
    assert "SSH" not in caught.value.message, "a library's sentence quotes what came"
    # aiohttp asks again, once, where a server closed without a word.
    assert len(seen) == (1 if data else 2), "neither repeated nor followed"


async def test_another_ca_is_refused_before_anything_is_sent(fetch: HttpFetcher) -> None:
    async with serving(answer("200 OK", b"{}")) as (url, seen):
        with pytest.raises(Unreachable, match="localhost"):
            await fetch(url, OTHER_CA.cert_pem.bytes().decode())
        with pytest.raises(Unreachable, match="localhost"):
            await fetch(url, None)
    assert seen == []


async def test_a_ca_is_blamed_only_where_it_is_the_ca(fetch: HttpFetcher) -> None:
    ended = datetime.now(UTC) - timedelta(days=1)
    for certificate, kind, words in (
        (CA.issue_cert("localhost", not_after=ended), Unreachable, "is not good: certificate has expired"),
        (CA.issue_cert("elsewhere"), Unreachable, "is not good: Hostname mismatch, certificate is not valid for"),
        (OTHER_CA.issue_cert("localhost"), UntrustedCertificate, "is not of the CA that is expected (unable to get"),
    ):
        async with serving(answer("200 OK", b"{}"), certificate=certificate) as (url, seen):
            with pytest.raises(Unreachable) as caught:
                await fetch(url, CA_PEM)
        assert (type(caught.value), seen) == (kind, [])
        assert caught.value.message.startswith(f"localhost: its certificate {words}")


async def test_an_intermediate_alone_is_another_ca(fetch: HttpFetcher) -> None:
    """Before Python 3.13, which takes an intermediate for a CA unless it is told not to."""
    intermediate = CA.create_child_ca()
    context = trusting_context(intermediate.cert_pem.bytes().decode())
    context.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    async with serving(answer("200 OK", b"{}"), certificate=intermediate.issue_cert("localhost")) as (url, seen):
        with pytest.raises(UntrustedCertificate, match="is not of the CA that is expected"):
            await fetch.ask("GET", url, context, headers={})
    assert seen == []


async def test_a_ca_made_anew_with_its_name_is_another_ca(fetch: HttpFetcher) -> None:
    """As `openssl req -x509` makes it again, with a server's certificate that names no key of its CA."""
    former, certificate = plain_chain("localhost")
    anew, _ = plain_chain("localhost")
    async with serving(answer("200 OK", b"{}"), certificate=certificate) as (url, seen):
        with pytest.raises(UntrustedCertificate) as caught:
            await fetch(url, trusting_context(anew))
        assert seen == []
        assert "(certificate signature failure)" in caught.value.message
        assert (await fetch(url, trusting_context(former))).body == b"{}"


@pytest.mark.parametrize("code", [2, 7, 18, 19, 20, 21, 24, 79])
def test_what_another_ca_would_mend(code: int) -> None:
    error = ssl.SSLCertVerificationError()
    error.verify_code, error.verify_message = code, "words"
    assert isinstance(_refused_certificate("localhost", error), UntrustedCertificate)


def test_the_system_s_own_verifier_has_no_codes_of_openssl() -> None:
    error = ssl.SSLCertVerificationError("Peer sent no certificates to verify")
    assert isinstance(_refused_certificate("localhost", error), UntrustedCertificate)
    error.verify_code, error.verify_message = -67843, "certificate is not trusted"
    assert isinstance(_refused_certificate("localhost", error), UntrustedCertificate)


@pytest.mark.parametrize(("kept", "wanted"), [(KEPT, 1), (-1.0, 3)], ids=["at once", "later"])
async def test_several_requests_may_share_one_connection(
    monkeypatch: pytest.MonkeyPatch, kept: float, wanted: int
) -> None:
    """Only within seconds: a server may close it at any later time, and a request on it would be lost."""
    assert KEPT < 5, "the pause between two polls of a login"
    monkeypatch.setattr("arcbridge.net.fetch.KEPT", kept)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert("localhost").configure_cert(context)
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while head := await reader.read(65536):
            assert b"\r\nConnection: close\r\n" not in head
            # docs/threats.md#J36: what the answers have beside their bodies is counted for each.
            writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 4000 + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        fetch = HttpFetcher(keep=True, limit=1000)
        for _ in range(3):
            assert (await fetch(f"https://localhost:{server.sockets[0].getsockname()[1]}/", CA_PEM)).body == b"{}"
        await fetch.close()
    assert connections == wanted


async def test_a_silent_server_is_a_server_that_is_down() -> None:
    fetcher = HttpFetcher(deadline=0.2)
    try:
        async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx", hold=True) as (url, _):
            with pytest.raises(Unreachable, match=r"no complete answer within 0\.2 seconds"):
                await fetcher(url, CA_PEM)
    finally:
        await fetcher.close()


async def test_a_question_has_an_answer_of_any_status(fetch: HttpFetcher) -> None:
    data = answer("429 Too Many Requests\r\nRetry-After: 7", b"later")
    async with serving(data) as (url, seen):
        reply = await fetch.ask("POST", url, CA_PEM, headers={"Authorization": "Bearer x"}, body=b"{}")
    assert (reply.status, reply.body, reply.retry_after) == (429, b"later", 7.0)
    head = seen[0].decode()
    assert head.startswith("POST /keys HTTP/1.1\r\n")
    assert "\r\nAuthorization: Bearer x\r\n" in head
    assert "\r\nContent-Length: 2\r\n" in head


@pytest.mark.parametrize(
    ("given", "seconds"), [("", None), ("soon", None), ("-1", None), ("Wed, 21 Oct", None), (" 3 ", 3.0)]
)
async def test_when_to_come_back(fetch: HttpFetcher, given: str, seconds: float | None) -> None:
    async with serving(answer(f"503 Service Unavailable\r\nRetry-After: {given}")) as (url, _):
        assert (await fetch.ask("GET", url, CA_PEM, headers={})).retry_after == seconds


async def test_a_question_is_not_sent_elsewhere(fetch: HttpFetcher) -> None:
    data = answer("307 Temporary Redirect\r\nLocation: https://localhost/elsewhere")
    async with serving(data) as (url, seen):
        assert (await fetch.ask("POST", url, CA_PEM, headers={}, body=b"secret")).status == 307
    assert len(seen) == 1
    with pytest.raises(Unreachable, match="only https"):
        await fetch("http://localhost/keys", None)


@pytest.mark.parametrize("url", ["https://localhost:port/keys", "https://localhost:99999/keys", "https://[::1/keys"])
async def test_an_address_that_an_issuer_has_written_wrongly_is_a_failure_as_any_other(
    fetch: HttpFetcher, url: str
) -> None:
    """Else the key set would neither say why it has no keys, nor wait before it asks the issuer again."""
    with pytest.raises(Unreachable, match="no well-formed URL"):
        await fetch(url, None)


async def test_t55_a_server_that_stalls_holds_up_no_other() -> None:
    fetch = HttpFetcher(deadline=60.0)
    async with serving(b"", hold=True) as (stalled, seen), serving(answer("200 OK", b"{}")) as (good, _):
        held_up = [asyncio.create_task(fetch.ask("GET", stalled, CA_PEM, headers={})) for _ in range(40)]
        async with asyncio.timeout(20):
            while len(seen) < 16:
                await asyncio.sleep(0.01)
        assert (await fetch(good, CA_PEM)).body == b"{}"
        assert not any(one.done() for one in held_up), "it waited for none of them"
        for one in held_up:
            one.cancel()
        await asyncio.gather(*held_up, return_exceptions=True)
    await fetch.close()


async def test_t57_what_is_compressed_is_bounded_by_what_it_becomes(fetch: HttpFetcher) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    async with serving(answer("200 OK\r\nContent-Encoding: gzip", body)) as (url, _):
        tracemalloc.start()
        try:
            with pytest.raises(Unreachable, match="larger than 1000 bytes"):
                await fetch.ask("GET", url, CA_PEM, headers={})
            assert tracemalloc.get_traced_memory()[1] < 16 << 20, "64 MiB were not unpacked to find that they are many"
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 500_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 500_000,
    ],
    ids=["interim answers", "extension of a chunk", "size of a chunk"],
)
async def test_j36_an_answer_without_end_ends(fetch: HttpFetcher, data: bytes) -> None:
    """docs/threats.md#J36: aiohttp counts none of these bytes."""
    async with serving(data, hold=True) as (url, _):
        with pytest.raises(Unreachable, match="localhost: ClientPayloadError"):
            await fetch(url, CA_PEM)
