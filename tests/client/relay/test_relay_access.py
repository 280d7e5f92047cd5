"""How a relay is known: file, pin, both, or the system."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.errors import ConfigError, PinMismatch, StateError, Unreachable
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN, outer_server_contexts
from arcbridge.pki.authority import Authority
from arcbridge.pki.rotation import Rotation
from arcbridge.pki.succession import SuccessionStore
from tests.client.far_side import OTHER_CA, RELAY_CA


async def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text(RELAY_CA.certificate_pem)
    relay = RelayAccess("https://relay.example", ca_file=tmp_path / "ca")
    assert str(relay.address) == "relay.example:443"
    context = await relay.context(ALPN_JOIN)
    assert await relay.context(ALPN_JOIN) is context
    assert await relay.context(ALPN_HTTP) is not context


async def test_a_file_and_its_pin(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text(RELAY_CA.certificate_pem)
    await RelayAccess("r", ca_file=tmp_path / "ca", ca_pin=RELAY_CA.pin).context(ALPN_JOIN)
    with pytest.raises(PinMismatch):
        await RelayAccess("r", ca_file=tmp_path / "ca", ca_pin=OTHER_CA.pin).context(ALPN_JOIN)


async def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="relay_ca_file"):
        await RelayAccess("r", ca_file=tmp_path / "none").context(ALPN_JOIN)
    (tmp_path / "ca").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="relay_ca_file"):
        await RelayAccess("r", ca_file=tmp_path / "ca").context(ALPN_JOIN)


async def test_a_pin_is_fetched_once_and_checked() -> None:
    issued = RELAY_CA.issue_server(["127.0.0.1"])
    context = outer_server_contexts(issued.certificate_pem, issued.key_pem, RELAY_CA.certificate_pem)[ALPN_HTTP]
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + RELAY_CA.certificate_pem.encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        relay = RelayAccess(address, ca_pin=RELAY_CA.pin.upper().replace("SHA", "sha"))
        await relay.context(ALPN_JOIN)
        await relay.context(ALPN_HTTP)
        assert len(asked) == 1
        relay.forget()
        await relay.context(ALPN_JOIN)
        assert len(asked) == 2
        with pytest.raises(PinMismatch) as caught:
            await RelayAccess(address, ca_pin=OTHER_CA.pin).context(ALPN_JOIN)
        assert RELAY_CA.pin in caught.value.message
        assert b"Authorization" not in b"".join(asked)
    finally:
        server.close()
        await server.wait_closed()
    with pytest.raises(Unreachable):
        await RelayAccess(address, ca_pin=RELAY_CA.pin).context(ALPN_JOIN)


async def test_a_relay_s_cas_are_followed_and_kept(tmp_path: Path) -> None:
    """docs/threats.md#E14: as far as the CA that is known has signed them."""
    (tmp_path / "ca").write_text(RELAY_CA.certificate_pem)
    store, steps = SuccessionStore(tmp_path / "successions"), []
    state = Rotation(RELAY_CA.certificate_pem, RELAY_CA.key_pem)
    for step in ("next", "activate", "retire"):
        steps.append(state := state.take(step, time.time()))
    relay = RelayAccess("r", ca_file=tmp_path / "ca", successions=store)
    before = await relay.context(ALPN_JOIN)
    hostile = Rotation(OTHER_CA.certificate_pem, OTHER_CA.key_pem).take("next", time.time()).list.text
    for text in ("", hostile, steps[0].list.text.replace(steps[0].list.cas[1], OTHER_CA.certificate_pem), "x" * 99_999):
        relay.follow(text)
        assert await relay.context(ALPN_JOIN) is before
        assert store.known(RELAY_CA.pin).pins == (RELAY_CA.pin,)
    for one in steps:
        relay.follow(one.list.text)
    after = await relay.context(ALPN_JOIN)
    assert after is not before
    relay.follow(steps[0].list.text)  # a replay
    assert await relay.context(ALPN_JOIN) is after
    # Another process of this user, with the pin alone, asks no relay.
    trust = await RelayAccess("127.0.0.1:1", ca_pin=RELAY_CA.pin, successions=store).trust()
    assert trust.ca_pem == state.list.cas[1]


async def test_a_ca_that_was_replaced_is_named_beside_the_last_one_that_was_known(tmp_path: Path) -> None:
    """Also where a rotation was followed before, and where a login keeps the certificate of the first one."""
    store = SuccessionStore(tmp_path / "successions")
    state = Rotation(RELAY_CA.certificate_pem, RELAY_CA.key_pem).take("next", time.time())
    store.keep(RELAY_CA.pin, state.list)
    (tmp_path / "ca").write_text(RELAY_CA.certificate_pem)
    async with relay_over(OTHER_CA) as address:
        given: list[dict[str, Any]] = [{}, {"ca_file": tmp_path / "ca"}]
        for more in given:
            relay = RelayAccess(address, ca_pin=RELAY_CA.pin, successions=store, **more)
            await relay.context(ALPN_JOIN)
            relay.forget()
            with pytest.raises(PinMismatch) as caught:
                await relay.context(ALPN_JOIN)
            assert f"expected {state.list.pins[1]}, found {OTHER_CA.pin}" in caught.value.message
        # A file without a pin may be of another CA than the relay's own.
        relay = RelayAccess(address, ca_file=tmp_path / "ca")
        relay.forget()
        await relay.context(ALPN_JOIN)


@asynccontextmanager
async def relay_over(authority: Authority) -> AsyncIterator[str]:
    """What gives this CA to all that ask; yields its address."""
    issued = authority.issue_server(["127.0.0.1"])
    context = outer_server_contexts(issued.certificate_pem, issued.key_pem, authority.certificate_pem)[ALPN_HTTP]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + authority.certificate_pem.encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_settings() -> None:
    with pytest.raises(ConfigError, match="relay_ca_pin"):
        RelayAccess("r", ca_pin="sha256:12")
