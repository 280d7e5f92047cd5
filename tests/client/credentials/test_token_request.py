"""One request for a token: its bounds."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from aiohttp import web

from arcbridge.client.credentials import token_request
from arcbridge.client.credentials.token_request import _tls_failure, request
from arcbridge.errors import ConfigError, Unreachable


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[str]:
    """A service whose answer is its path's last word."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def answer(request: web.Request) -> web.Response:
        match request.path:
            case "/long":
                return web.Response(body=b"x" * (token_request._LIMIT + 1))
            case "/elsewhere":
                raise web.HTTPFound("/token")
            case "/text":
                return web.Response(text="[1]")
            case _:
                return web.json_response({"got": request.headers["Authorization"], "with": request.headers.get("X-A")})

    app = web.Application()
    app.add_routes([web.route("*", "/{path}", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_an_answer(service: str, tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    found = await request("POST", f"{service}/token", "Bearer x", ca_file, None, {"X-A": "b"})
    assert found == (200, {"got": "Bearer x", "with": "b"})
    assert await request("GET", f"{service}/text", "Bearer x", ca_file, None) == (200, {})


async def answered_with(context: ssl.SSLContext | None, ca_file: Path) -> str:
    """What the user is told where a server of this context answers."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable) as caught:
            await request("GET", f"https://127.0.0.1:{port}/token", "Bearer SECRET", ca_file, None)
    assert "SECRET" not in str(caught.value)
    return caught.value.message


async def test_a_ca_is_blamed_only_where_it_is_the_ca(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    trusted = tmp_path / "ca.pem"
    ended = datetime.now(UTC) - timedelta(days=1)
    for certificate, words in (
        (authority.issue_cert("127.0.0.1", not_after=ended), "is not good: certificate has expired"),
        (authority.issue_cert("127.0.0.2"), "is not good: IP address mismatch, certificate is not valid for"),
        (trustme.CA().issue_cert("127.0.0.1"), f"is not of the CA in {trusted}"),
    ):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        said = await answered_with(context, trusted)
        assert said.startswith(f"the certificate of 127.0.0.1 {words}")
    said = await answered_with(None, trusted)  # it speaks no TLS
    assert re.fullmatch(r"127\.0\.0\.1 cannot be reached for a token: TLS failed \([A-Z_]+\)", said)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (ssl.SSLCertVerificationError("Peer sent no certificates to verify"), "is not of a CA that is trusted"),
        (ssl.SSLError("errSSLInternal"), "TLS failed (errSSLInternal)"),
        (OSError("reset"), "TLS failed (OSError)"),
        (None, "TLS failed (NoneType)"),
    ],
)
def test_errors_of_the_system_s_own_verifier_need_no_codes_of_openssl(cause: BaseException | None, words: str) -> None:
    assert words in _tls_failure("issuer.example", cause, None)


def test_a_code_of_the_system_is_none_of_openssl() -> None:
    cause = ssl.SSLCertVerificationError("“issuer.example” certificate is not trusted")
    cause.verify_code, cause.verify_message = -67843, "certificate is not trusted"
    assert "have this system trust the right one" in _tls_failure("issuer.example", cause, None)


async def test_an_end_without_an_answer_is_told_in_words() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable) as caught:
            await request("GET", f"http://127.0.0.1:{port}/token", "Bearer SECRET", None, None)
    expected = "127.0.0.1 cannot be reached for a token: it ended the connection without an answer"
    assert caught.value.message == expected


async def test_a_redirect_is_not_followed(service: str, tmp_path: Path) -> None:
    status, _ = await request("GET", f"{service}/elsewhere", "Bearer x", tmp_path / "ca.pem", None)
    assert status == 302


async def test_what_cannot_be_used(service: str, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="more than"):
        await request("GET", f"{service}/long", "Bearer SECRET", tmp_path / "ca.pem", None)
    with pytest.raises(Unreachable, match="is not of a CA that is trusted for tokens") as caught:
        await request("GET", f"{service}/token", "Bearer SECRET", None, None)
    assert "SECRET" not in str(caught.value)
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="holds no PEM"):
        await request("GET", f"{service}/token", "Bearer SECRET", tmp_path / "bad.pem", None)
