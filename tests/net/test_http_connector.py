"""aiohttp over the dialer: TLS and its errors, both families, and the proxies of the environment."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from arcbridge.errors import Unreachable
from arcbridge.net import dialer, http_connector
from arcbridge.net.http_connector import DialingConnector
from tests.mux.ends import LOOPS, run
from tests.net.ends import authority, server_certificate
from tests.net.tlsends import Watched, watched_and_reset
from tests.support.eventually import until
from tests.support.proxies import PROXIES


def server_context(tmp_path: Path) -> ssl.SSLContext:
    issued = server_certificate()
    file = tmp_path / "pair.pem"
    file.write_text(issued.certificate_pem + issued.key_pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    return context


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority().certificate_pem)


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """The port of an HTTPS server that says `yes`."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="yes")

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, host, 0, ssl_context=server_context(tmp_path))
    await site.start()
    try:
        yield site._server.sockets[0].getsockname()[1]
    finally:
        await runner.cleanup()


async def ask(url: str, context: ssl.SSLContext | None = None) -> str:
    connector = DialingConnector(1 << 20, ssl=context or trusting())
    async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as answer:
        return await answer.text()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_both_families(host: str, tmp_path: Path) -> None:
    async with serving(tmp_path, host) as port:
        assert await ask(f"https://{f'[{host}]' if ':' in host else host}:{port}/") == "yes"


@pytest.mark.parametrize("alive", ["127.0.0.1", "::1"])
async def test_a_name_whose_other_family_is_dead(alive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 8305: the address that refuses holds the other one up by nothing."""

    def both(host: str, port: int) -> list[dialer.Candidate]:
        found: list[dialer.Candidate] = [(socket.AF_INET6, ("::1", port, 0, 0)), (socket.AF_INET, ("127.0.0.1", port))]
        return found if alive == "127.0.0.1" else found[::-1]

    monkeypatch.setattr(dialer, "_look_up", both)
    async with serving(tmp_path, alive) as port:
        assert await ask(f"https://relay.test:{port}/") == "yes"


async def test_a_certificate_of_another_ca_is_an_error_of_aiohttp(tmp_path: Path) -> None:
    async with serving(tmp_path) as port:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await ask(f"https://127.0.0.1:{port}/", ssl.create_default_context())


@pytest.mark.skipif(sys.platform == "win32", reason="a descriptor of Windows has no status, and uvloop is not there")
@pytest.mark.parametrize("loop", sorted(LOOPS))
def test_a_server_that_resets_at_once_has_its_descriptor_closed_once(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    socks: list[Watched] = []

    async def connected(*_: object, **__: object) -> Watched:
        socks.append(watched_and_reset())
        return socks[-1]

    monkeypatch.setattr(http_connector, "connect", connected)

    async def main() -> None:
        for _ in range(5):
            with pytest.raises(aiohttp.ClientConnectorError):
                await ask("https://issuer.test/")

    run(loop, main)
    assert socks
    assert not any(sock.closed_twice for sock in socks)


async def test_no_listener_is_named() -> None:
    with pytest.raises(Unreachable, match=r"cannot reach 127\.0\.0\.1:1: connection refused"):
        await ask("https://127.0.0.1:1/")


@pytest.mark.parametrize("scheme", ["http", "socks5"])
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "all_proxy"])
async def test_through_a_real_proxy(
    scheme: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PROXIES[scheme](tmp_path / "proxy") as proxy:
        monkeypatch.setenv(variable, proxy.url())
        async with serving(tmp_path) as port:
            assert await ask(f"https://127.0.0.1:{port}/") == "yes"
            await until(lambda: proxy.carried(port))  # from its log
            assert proxy.carried(port) == 1
            monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
            assert await ask(f"https://127.0.0.1:{port}/") == "yes"
            assert proxy.carried(port) == 1


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("http", "the proxy refused with status|closed the connection"), ("socks5", "the proxy refused")],
)
async def test_a_proxy_that_cannot_reach_the_server(
    scheme: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PROXIES[scheme](tmp_path / "proxy") as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url())
        with pytest.raises(Unreachable, match=f"through the proxy 127.0.0.1:{proxy.port}: the proxy refused"):
            await ask("https://127.0.0.1:1/")


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_wrong_credentials(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PROXIES[scheme](tmp_path / "proxy") as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url(password="s0mething-else"))
        with pytest.raises(Unreachable, match="credentials") as caught:
            await ask("https://127.0.0.1:1/")
        assert "s0mething-else" not in caught.value.message


async def test_a_proxy_that_speaks_no_socks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(3)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        monkeypatch.setenv("ALL_PROXY", f"socks5://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(Unreachable, match="does not speak SOCKS 5"):
            await ask("https://127.0.0.1:1/")
