"""The way to the relay: each hop against real sockets, and what is made of a certificate and of a clock."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trustme

from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.client.doctor.relay_hops import CertificateText, RelayHops, judge_certificate, judge_clock
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.errors import ArcbridgeError, ConfigError, PinMismatch, Unreachable
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.settings.config import ClientConfig
from tests.support.world import fixed_port

NOW = 1_000_000_000.0


def verdict(finding: Finding) -> tuple[str, str]:
    """State and code; what failed says what to do."""
    if finding.state in (FindingState.FAILED, FindingState.WARNING):
        assert finding.remedy
    return str(finding.state), finding.code


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamWriter], None], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server on loopback that says something once a request's head is there, or at once without TLS."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if tls is not None:
                await reader.readuntil(b"\r\n\r\n")
            serve(writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority


def tls_of(authority: trustme.CA, *alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "relay.example.org").configure_cert(context)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def hops(port: int, host: str = "127.0.0.1", ca: Path | None = None, proxy: str = "") -> RelayHops:
    relay = RelayAccess(f"https://{host}:{port}", ca_file=ca)
    return RelayHops(relay, ClientConfig(relay_ca_file=ca), {"HTTPS_PROXY": proxy} if proxy else {})


@pytest.mark.parametrize(
    ("host", "proxy", "expected"),
    [
        ("127.0.0.1", "", ("ok", "")),
        ("localhost", "", ("ok", "")),
        ("x.invalid", "http://127.0.0.1:1", ("skipped", "")),
        ("x.invalid", "", ("failed", "relay_name")),
    ],
)
async def test_names(host: str, proxy: str, expected: tuple[str, str]) -> None:
    assert verdict(await hops(1, host, proxy=proxy).look_up("name")) == expected


async def test_ports() -> None:
    assert verdict(await hops(fixed_port()).reach("TCP")) == ("failed", "relay_port_closed")
    async with listening(lambda writer: None) as port:
        assert verdict(await hops(port).reach("TCP")) == ("ok", "")


@pytest.mark.parametrize(
    ("cause", "code"), [(TimeoutError(), "relay_silent"), (OSError("no route to host"), "relay_unreachable")]
)
async def test_a_port_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch, cause: Exception, code: str) -> None:
    async def connect(*_: object, **__: object) -> None:
        raise Unreachable("x") from cause

    monkeypatch.setattr("arcbridge.client.doctor.relay_hops.connect", connect)
    assert verdict(await hops(1).reach("TCP")) == ("failed", code)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ("ok", "")),
        (b"HTTP/1.1 403 No\r\n\r\n", ("failed", "proxy_refused")),
        (b"HTTP/1.1 407 Who\r\n\r\n", ("failed", "proxy_credentials")),
    ],
    ids=["200", "403", "407"],
)
async def test_proxies(answer: bytes, expected: tuple[str, str]) -> None:
    async with listening(lambda writer: writer.write(answer)) as port:
        found = await hops(443, "relay.invalid", proxy=f"http://127.0.0.1:{port}").tunnel("proxy")
    assert verdict(found) == expected


async def test_proxies_that_are_not_there() -> None:
    assert verdict(await hops(443).tunnel("proxy")) == ("skipped", "")
    assert verdict(await hops(443, proxy="nonsense://x").tunnel("proxy")) == ("failed", "proxy_settings")
    gone = hops(443, "relay.invalid", proxy=f"http://127.0.0.1:{fixed_port()}")
    assert verdict(await gone.tunnel("proxy")) == ("failed", "proxy_unreachable")


async def test_what_a_server_is(authority: trustme.CA) -> None:
    async with listening(lambda writer: None, tls_of(authority, ALPN_JOIN)) as port:
        relay = hops(port)
        assert verdict(await relay.shake_hands("TLS")) == ("ok", "")
    assert verdict(await relay.recognize("relay")) == ("ok", "")
    async with listening(lambda writer: None, tls_of(authority)) as port:
        other = hops(port)
        assert verdict(await other.shake_hands("TLS")) == ("ok", "")
    assert verdict(await other.recognize("relay")) == ("failed", "relay_other")
    async with listening(lambda writer: writer.write(b"220 hello\r\n")) as port:
        assert verdict(await hops(port).shake_hands("TLS")) == ("failed", "relay_tls")


@pytest.mark.parametrize(
    ("host", "ca", "expected"),
    [
        ("127.0.0.1", "ca.pem", ("warning", "relay_certificate_ends")),
        ("127.0.0.1", "other.pem", ("failed", "relay_ca")),
        ("127.0.0.1", "none.pem", ("failed", "relay_ca_file")),
        ("localhost", "ca.pem", ("failed", "relay_certificate_name")),
    ],
)
async def test_the_certificate(
    authority: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    ca: str,
    expected: tuple[str, str],
) -> None:
    monkeypatch.setattr("arcbridge.client.doctor.relay_hops.CERTIFICATE_ENDS_SOON", 1e11)
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    async with listening(lambda writer: None, tls_of(authority, ALPN_JOIN)) as port:
        relay = hops(port, host, tmp_path / ca)
        await relay.shake_hands("TLS")
        found = await relay.verify("certificate")
    assert verdict(found) == expected
    if host == "localhost":
        assert found.detail == "the certificate is for relay.example.org, 127.0.0.1, not for localhost"


def untrusted(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError()
    error.verify_code, error.verify_message = code, "words of OpenSSL"
    return error


@pytest.mark.parametrize(
    ("shown", "error", "expected"),
    [
        (CertificateText(("r",), 0.0, NOW + 1e7), None, ("ok", "")),
        (CertificateText(), None, ("ok", "")),
        (CertificateText(("r",), 0.0, NOW + 86400), None, ("warning", "relay_certificate_ends")),
        (CertificateText(("r",), 0.0, NOW - 1), untrusted(10), ("failed", "relay_certificate_expired")),
        # The CA's own end: the relay's certificate goes on.
        (CertificateText(("r",), 0.0, NOW + 1e7), untrusted(10), ("failed", "relay_certificate_expired")),
        (CertificateText(("r",), NOW + 9, NOW + 1e7), untrusted(9), ("failed", "relay_certificate_not_yet")),
        (CertificateText(("a\x1b[2Jb",), 0.0, NOW + 1e7), untrusted(62), ("failed", "relay_certificate_name")),
        (CertificateText((), 0.0, NOW + 1e7), untrusted(64), ("failed", "relay_certificate_name")),
        (CertificateText(("r",), 0.0, NOW + 1e7), untrusted(20), ("failed", "relay_ca")),
        (CertificateText(), PinMismatch("two pins"), ("failed", "relay_pin")),
        (CertificateText(), ConfigError("no PEM"), ("failed", "relay_ca_file")),
        (CertificateText(), Unreachable("no CA to give"), ("failed", "relay_other")),
    ],
)
def test_what_is_made_of_a_certificate(
    shown: CertificateText, error: ArcbridgeError | ssl.SSLCertVerificationError | None, expected: tuple[str, str]
) -> None:
    found = judge_certificate("certificate", "r", shown, error, "the pinned CA", NOW)
    assert verdict(found) == expected
    assert "\x1b" not in found.detail, "names of a certificate cannot steer a terminal"


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (None, ("skipped", "")),
        (0.0, ("ok", "")),
        (-29.0, ("ok", "")),
        (40.0, ("warning", "clock")),
        (-40.0, ("warning", "clock")),
        (120.0, ("failed", "clock")),
        (-1e9, ("failed", "clock")),
    ],
)
def test_what_is_made_of_a_clock(ahead: float | None, expected: tuple[str, str]) -> None:
    assert verdict(judge_clock("clock", ahead)) == expected


@pytest.mark.parametrize(
    ("off", "said"),
    [(0, "as the relay's"), (-3600, " ahead of "), (3600, " behind "), (None, "the relay did not say its time")],
)
async def test_the_clock(authority: trustme.CA, tmp_path: Path, off: int | None, said: str) -> None:
    def answer(writer: asyncio.StreamWriter) -> None:
        date = "never" if off is None else formatdate(time.time() + off, usegmt=True)
        writer.write(f"HTTP/1.0 200 OK\r\ndate: {date}\r\n\r\n".encode())

    async with listening(answer, tls_of(authority, ALPN_HTTP)) as port:
        found = await hops(port, ca=tmp_path / "ca.pem").compare_clocks("clock")
    assert said in found.detail
    assert found.code == ("clock" if off else "")


async def test_a_slow_handshake_hides_no_difference_of_clocks(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handshake, clock = TlsPipe.handshake, [NOW]

    async def slow(pipe: TlsPipe) -> None:
        await handshake(pipe)
        clock[0] += 9

    async def direct(*arguments: Any, proxy: object, **options: Any) -> Any:
        assert proxy is DIRECT, "as the hops before, whatever the environment of this process says"
        return await connect(*arguments, proxy=proxy, **options)

    def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.0 200 OK\r\ndate: {formatdate(NOW - 40, usegmt=True)}\r\n\r\n".encode())

    monkeypatch.setattr(TlsPipe, "handshake", slow)
    monkeypatch.setattr("arcbridge.net.tls.connect", direct)
    monkeypatch.setattr("arcbridge.client.doctor.relay_hops.time.time", lambda: clock[0])
    async with listening(answer, tls_of(authority, ALPN_HTTP)) as port:
        found = await hops(port, ca=tmp_path / "ca.pem").compare_clocks("clock")
    assert found.detail == "this machine is 48 s ahead of the relay"
