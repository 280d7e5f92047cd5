"""The probes against real sockets of this machine."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path

import pytest
import trustme
import yaml

from arcbridge.client.doctor import probes
from arcbridge.client.doctor.access_judgement import ContextFacts
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig, render
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.state import StateDirectory
from arcbridge.net.address import Address
from arcbridge.net.proxy import Proxy
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN
from tests.support.world import fixed_port

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


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


async def test_names() -> None:
    assert (await probes.look_up(Address("127.0.0.1", 1), by_proxy=False)).literal
    assert (await probes.look_up(Address("x.invalid", 1), by_proxy=True)).by_proxy
    assert (await probes.look_up(Address("x.invalid", 1), by_proxy=False)).error
    assert (await probes.look_up(Address("localhost", 1), by_proxy=False)).addresses


async def test_ports() -> None:
    closed = await probes.reach(Address("127.0.0.1", fixed_port()), None)
    assert closed.refused
    assert closed.error
    async with listening(lambda writer: None) as port:
        assert (await probes.reach(Address("127.0.0.1", port), None)).error == ""


@pytest.mark.parametrize(
    ("answer", "refused", "asks"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", False, False),
        (b"HTTP/1.1 403 No\r\n\r\n", True, False),
        (b"HTTP/1.1 407 Who\r\n\r\n", True, True),
    ],
    ids=["200", "403", "407"],
)
async def test_proxies(answer: bytes, refused: bool, asks: bool) -> None:
    async with listening(lambda writer: writer.write(answer)) as port:
        found = await probes.through_proxy(Address("relay.invalid", 443), Proxy(Address("127.0.0.1", port)))
    assert (bool(found.refused), found.asks_for_credentials, found.unreachable) == (refused, asks, "")
    gone = await probes.through_proxy(Address("relay.invalid", 443), Proxy(Address("127.0.0.1", fixed_port())))
    assert gone.unreachable


async def test_what_a_server_is(authority: trustme.CA) -> None:
    async with listening(lambda writer: None, tls_of(authority, ALPN_JOIN)) as port:
        shown = await probes.shown_by(Address("127.0.0.1", port), None)
    assert (shown.tls.error, shown.relay.speaks_join) == ("", True)
    assert shown.certificate
    async with listening(lambda writer: None, tls_of(authority)) as port:
        assert not (await probes.shown_by(Address("127.0.0.1", port), None)).relay.speaks_join
    async with listening(lambda writer: writer.write(b"220 hello\r\n")) as port:
        assert (await probes.shown_by(Address("127.0.0.1", port), None)).tls.error


async def test_the_certificate(authority: trustme.CA, tmp_path: Path) -> None:
    other = trustme.CA()
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    async with listening(lambda writer: None, tls_of(authority, ALPN_JOIN)) as port:
        shown = await probes.shown_by(Address("127.0.0.1", port), None)
        for host, ca, code in (("127.0.0.1", "ca", 0), ("127.0.0.1", "other", 20), ("localhost", "ca", 62)):
            relay = RelayAccess(f"https://{host}:{port}", ca_file=tmp_path / f"{ca}.pem")
            found = await probes.verified(relay, shown, None, False, "ca.pem")
            assert set(found.subject_names) == {"127.0.0.1", "relay.example.org"}
            assert found.not_before < time.time() < found.not_after
            assert getattr(found.error, "verify_code", 0) == code
    missing = RelayAccess(f"https://127.0.0.1:{port}", ca_file=tmp_path / "no.pem")
    assert (await probes.verified(missing, shown, None, False, "no.pem")).error is not None
    assert probes._read_certificate(b"nothing") == ((), 0.0, 0.0)


@pytest.mark.parametrize("off", [0, -3600, 3600])
async def test_the_clock(authority: trustme.CA, tmp_path: Path, off: int) -> None:
    def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.0 200 OK\r\ndate: {formatdate(time.time() + off, usegmt=True)}\r\n\r\n".encode())

    async with listening(answer, tls_of(authority, ALPN_HTTP)) as port:
        relay = RelayAccess(f"https://127.0.0.1:{port}", ca_file=tmp_path / "ca.pem")
        ahead = await probes.clock_ahead(relay, None)
    assert ahead is not None
    assert abs(ahead + off) < 30


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n", b"HTTP/1.1 200\r\nDate: never\r\n\r\n"])
def test_no_date(head: bytes) -> None:
    assert probes.date_of(head) is None


async def test_contexts_and_ports(tmp_path: Path) -> None:
    state = StateDirectory.find(tmp_path / "state", {})
    certificates = state.certificates("prod", "https://relay.example.org:443", time.time())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = tmp_path / "server.pem"
    pem.write_text(certificates.server_certificate_pem + certificates.server_key_pem)
    context.load_cert_chain(pem)
    dead = fixed_port()
    async with listening(lambda writer: None, context) as ours, listening(lambda writer: None) as foreign:
        entries = {"prod": ours, "taken": foreign, "dead": dead}
        document: dict[str, list[object]] = {"clusters": [], "users": [], "contexts": []}
        for name, port in entries.items():
            text = render(Entry(name, name, f"https://127.0.0.1:{port}", "CA", "CERT", "KEY"))
            for section, items in document.items():
                items += yaml.safe_load(text)[section]
        document["contexts"].append({"name": "foreign", "context": {"cluster": "prod", "user": "me"}})
        file = tmp_path / "config"
        file.write_text(yaml.safe_dump({**document, "current-context": "dead"}))
        before = file.read_bytes()
        found = {one.name: one for one in await probes.contexts(Kubeconfig([file]), state)}
        assert found == {
            "prod": ContextFacts("prod", "prod", ours, listening=True, ours=True),
            "taken": found["taken"],
            "dead": ContextFacts("dead", "dead", dead, current=True),
        }
        assert (found["taken"].listening, found["taken"].ours) == (True, False)
        assert file.read_bytes() == before
        (state.path / "ports.json").write_text(json.dumps({"prod at r:443": foreign}))
        kept = await probes.kept_port(state, ("r:443",), "prod")
        assert kept is not None
        assert (kept.port, kept.listening, kept.ours) == (foreign, True, False)
        assert await probes.kept_port(state, ("r:443",), "other") is None


def test_where_a_kubeconfig_is(tmp_path: Path) -> None:
    environment = {"KUBECONFIG": str(tmp_path / "config")}
    assert [file.path for file in probes.find_kubeconfig("-", environment).files] == [tmp_path / "config"]
    assert [file.path for file in probes.find_kubeconfig("/x", environment).files] == [Path("/x")]
