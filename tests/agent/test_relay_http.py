"""The agent's calls of the relay's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from arcbridge.agent.relay_http import post
from arcbridge.errors import EnrolmentRefused, Unreachable
from arcbridge.net.address import parse_address
from arcbridge.net.tls import ALPN_HTTP, RelayTrust, outer_server_contexts
from arcbridge.pki.authority import Authority

from .fake_relay import FakeRelay


@pytest.fixture
async def relay() -> AsyncIterator[FakeRelay]:
    async with FakeRelay.serving() as made:
        yield made


async def ask(relay: FakeRelay, answer: tuple[int, Any], trust: RelayTrust | None = None) -> dict[str, Any]:
    relay.answers["/v1/x"] = answer
    address = parse_address(relay.address)
    return await post(address, "/v1/x", {"a": 1}, trust or RelayTrust(relay.authority.certificate_pem))


async def test_there_and_back(relay: FakeRelay) -> None:
    assert await ask(relay, (200, {"b": 2})) == {"b": 2}
    assert relay.calls == [("/v1/x", {"a": 1})]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409])
async def test_a_refusal_is_in_the_relays_words(relay: FakeRelay, code: int) -> None:
    with pytest.raises(EnrolmentRefused, match="because of this"):
        await ask(relay, (code, {"error": {"message": "because of this"}}))


@pytest.mark.parametrize("code", [429, 500, 503])
async def test_what_may_be_better_later(relay: FakeRelay, code: int) -> None:
    with pytest.raises(Unreachable):
        await ask(relay, (code, {"error": {"message": "later"}}))


@pytest.mark.parametrize("words", ["a\x1b[2Jb", 7, None, {"x": 1}])
async def test_odd_words_are_not_repeated(relay: FakeRelay, words: Any) -> None:
    with pytest.raises(EnrolmentRefused, match="code 403"):
        await ask(relay, (403, {"error": {"message": words}}))


@pytest.mark.parametrize("answer", [[1], "x", None])
async def test_what_is_no_object(relay: FakeRelay, answer: Any) -> None:
    with pytest.raises(Unreachable, match="is this an arcbridge relay"):
        await ask(relay, (200, answer))


async def test_another_ca_is_told_nothing(relay: FakeRelay) -> None:
    with pytest.raises(Unreachable, match=r"not of the CA that is expected .*; check relay_ca_pin or relay_ca_file"):
        await ask(relay, (200, {}), RelayTrust(Authority.create("x").certificate_pem))
    assert relay.calls == []


async def test_no_listener() -> None:
    with pytest.raises(Unreachable, match=r"^[^:]*cannot reach 127\.0\.0\.1:1: [^:]*$"):
        await post(parse_address("127.0.0.1:1"), "/v1/x", {}, RelayTrust(Authority.create("x").certificate_pem))


@pytest.mark.parametrize(
    ("tls", "data", "words"),
    [
        (True, b"SSH-2.0-x\r\n", "does not speak HTTP: is this an arcbridge relay"),
        (True, b"", "ended the connection without an answer: is this an arcbridge relay"),
        (False, b"SSH-2.0-x\r\n", r"cannot be asked: TLS failed \([A-Z_]+\); is this an arcbridge relay"),
    ],
)
async def test_what_is_no_relay(tls: bool, data: bytes, words: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if tls:
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    authority = Authority.create("x")
    issued = authority.issue_server(["127.0.0.1"])
    contexts = outer_server_contexts(issued.certificate_pem, issued.key_pem, authority.certificate_pem)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=contexts[ALPN_HTTP] if tls else None)
    address = parse_address(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        with pytest.raises(Unreachable, match=f"^{address.url} {words}"):
            await post(address, "/v1/x", {}, RelayTrust(authority.certificate_pem))
    finally:
        server.close()
