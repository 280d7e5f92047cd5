"""The gateway's HTTPS server: the path names the cluster, refusals are Statuses, and connections are bounded."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from arcbridge.client.serving.endpoint import https_context
from arcbridge.client.serving.gateway import server as module
from arcbridge.client.serving.gateway.server import UnknownPath, target_of
from arcbridge.errors import ConfigError
from arcbridge.net.join import JoinCode
from arcbridge.wire.records import JoinReply
from tests.client.far_side import CLUSTER
from tests.client.serving.gateway.station import GATEWAY_CA, REFUSED, headers, station
from tests.support.eventually import until


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/clusters/berlin", ("berlin", "/")),
        ("/clusters/berlin/", ("berlin", "/")),
        ("/clusters/berlin?x=/y", ("berlin", "/?x=/y")),
        ("/clusters/berlin/api/v1/pods?watch=1&a=b?c", ("berlin", "/api/v1/pods?watch=1&a=b?c")),
        ("/clusters/berlin//api/%2e%2e/x", ("berlin", "//api/%2e%2e/x")),
        ("/clusters/berlin/a/../../munich", ("berlin", "/a/../../munich")),
    ],
)
def test_the_path_names_the_cluster_and_the_rest_stays_as_it_is(path: str, found: tuple[str, str]) -> None:
    assert target_of(path) == found


@pytest.mark.parametrize(
    "path",
    ["", "*", "/", "/clusters", "/clusters/", "/clusters//api", "/clusters/../x", "/clusters/Berlin/", "/clusters/a%2f",
     "/api/v1", "/clusters/a#b", "https://127.0.0.1/clusters/berlin/", "127.0.0.1:443", "/clusters/" + 64 * "a"],
)  # fmt: skip
def test_any_other_path_is_unknown(path: str) -> None:
    with pytest.raises(UnknownPath, match="begins with /clusters/NAME/"):
        target_of(path)


async def status(client: aiohttp.ClientSession, url: str | URL, **options: Any) -> tuple[int, dict[str, Any], Any]:
    async with client.get(url, **options) as answer:
        return answer.status, await answer.json(), answer.headers


async def test_refusals_are_statuses(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, client):
        code, body, got = await status(client, place.path())
        assert (code, body["kind"], body["reason"]) == (401, "Status", "Unauthorized")
        assert got["WWW-Authenticate"] == "Bearer"
        assert "Authorization: Bearer TOKEN" in body["message"]
        code, body, _ = await status(client, place.url + "/api/v1/pods", headers=headers("t"))
        assert (code, body["reason"]) == (404, "NotFound")
        code, body, _ = await status(client, place.path(), headers=headers(REFUSED))
        assert (code, body["reason"]) == (401, "Unauthorized")
        assert "does not accept the token" in body["message"]
        place.far.reply = JoinReply(code=JoinCode.FORBIDDEN)
        code, body, _ = await status(client, place.path(), headers=headers("t"))
        assert (code, body["reason"]) == (403, "Forbidden")
        assert "does not exist or you may not reach it" in body["message"]
        place.far.reply = JoinReply(code=JoinCode.NO_AGENT, retry_after=1)
        code, body, got = await status(client, place.path(), headers=headers("u"))
        assert (code, body["reason"], got["Retry-After"]) == (503, "ServiceUnavailable", "1")
        assert "has no connected agent" in body["message"]
        assert place.server.requests == {"refused": 5}


async def test_health_needs_no_token(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, client):
        for path in ("/livez", "/readyz"):
            async with client.get(place.url + path) as answer:
                assert (answer.status, await answer.text()) == (200, "ok\n")
        assert not place.far.requests


async def test_requests_of_two_callers_on_one_connection(tmp_path: Path) -> None:
    """A tool in front pools its connections: one that has carried one caller's request carries another's next."""
    async with station(tmp_path) as (place, _):
        reader, writer = await place.connect()
        order = ["alice", "bob", "bob", "alice", "carol"]
        for caller in order:  # all at once: pipelined
            writer.write(
                f"POST /clusters/{CLUSTER}/for/{caller} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {caller}\r\n"
                f"Content-Length: {len(caller)}\r\n\r\n{caller}".encode()
            )
        for caller in order:
            body = json.loads(await read_answer(reader))
            assert (body["caller"], body["path"], body["body"]) == (caller, f"/for/{caller}", caller)
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
    return await reader.readexactly(int(fields["content-length"]))


@pytest.mark.parametrize(("deadline", "lines"), [(0.05, b""), (3600.0, (b"a: " + b"b" * 60_000 + b"\r\n") * 3)])
async def test_a_head_is_bounded_in_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadline: float, lines: bytes
) -> None:
    monkeypatch.setattr(module, "HEAD_DEADLINE", deadline)
    async with station(tmp_path) as (place, _):
        reader, writer = await place.connect()
        writer.write(b"GET /livez HTTP/1.1\r\n" + lines)
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b""
        assert b" 200 " not in answer
        writer.close()
        await until(lambda: not place.server.open)


@pytest.mark.parametrize("size", [1_000, 10_000, 100_000])
async def test_a_head_within_its_bound_is_taken(tmp_path: Path, size: int) -> None:
    async with station(tmp_path) as (place, _):
        reader, writer = await place.connect()
        line = b"x: " + b"y" * 1000 + b"\r\n"
        writer.write(b"GET /livez HTTP/1.1\r\nHost: g\r\n" + line * (size // len(line)) + b"\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_failure_behind_the_head_of_an_answer_is_a_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second head inside the body would be taken for the cluster's bytes."""

    async def failing(request: web.BaseRequest, *_: object) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "10000"})
        await response.prepare(request)
        await response.write(b"the beginning")
        raise RuntimeError

    monkeypatch.setattr(module, "exchange", failing)
    async with station(tmp_path) as (place, _):
        reader, writer = await place.connect()
        writer.write(f"GET /clusters/{CLUSTER}/x HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer t\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_what_is_no_http_gets_a_status_that_quotes_nothing(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        for sent in (
            b"GET /secret-path HTTP/1.1\r\nsecret header\r\n\r\n",
            b"\x00secret\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        ):
            reader, writer = await place.connect()
            writer.write(sent)
            answer = await reader.read()
            assert b" 400 " in answer[:13], answer
            assert b"well-formed" in answer
            assert b"secret" not in answer
            writer.close()


async def test_the_connection_that_has_idled_longest_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECTIONS", 2)
    async with station(tmp_path) as (place, _):
        held = [await place.connect() for _ in range(2)]
        await until(lambda: len(place.server.open) == 2)
        for reader, writer in reversed(held):
            writer.write(b"GET /livez HTTP/1.1\r\nHost: g\r\n\r\n")
            await reader.readuntil(b"ok\n")
        newest, writing = await place.connect()
        assert await held[1][0].read() == b""
        writing.write(b"GET /livez HTTP/1.1\r\nHost: g\r\n\r\n")
        assert (await newest.readline()).startswith(b"HTTP/1.1 200 ")
        for _, writer in [*held, (newest, writing)]:
            writer.close()


async def test_requests_that_wait_for_a_session_keep_no_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No relay answers: what made-up tokens ask for must not keep out the probes by which the gateway is restarted."""
    monkeypatch.setattr(module, "CONNECTIONS", 2)
    async with station(tmp_path) as (place, _):
        place.far.answers.clear()
        held = [await place.connect() for _ in range(2)]
        for n, (_, writer) in enumerate(held):
            writer.write(f"GET /clusters/{CLUSTER}/x HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {n}\r\n\r\n".encode())
        await until(lambda: place.sessions.requests == 2)
        reader, probe = await place.connect()
        probe.write(b"GET /livez HTTP/1.1\r\nHost: g\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        await until(lambda: place.sessions.requests == 1)
        place.far.answers.set()
        for _, writer in [*held, (reader, probe)]:
            writer.close()


async def test_a_slow_caller_costs_another_one_nothing(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, client):
        _, writer = await place.connect()
        writer.write(
            f"POST /clusters/{CLUSTER}/slow HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer slow\r\n"
            "Content-Length: 1000000\r\n\r\nbegin".encode()
        )
        await until(lambda: place.sessions.requests == 1)
        for _ in range(20):
            async with client.get(place.path(), headers=headers("quick")) as answer:
                assert (await answer.json())["caller"] == "quick"
        writer.close()
        await until(lambda: place.sessions.requests == 0)


async def test_a_connection_is_probed_for_a_caller_that_has_died(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        _, writer = await place.connect()
        await until(lambda: any(one.transport is not None for one in place.server.open))
        sock = next(iter(place.server.open.values())).get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        writer.close()


async def test_a_caller_that_goes_away_ends_its_request(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        _, writer = await place.connect()
        writer.write(f"POST /clusters/{CLUSTER}/x HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer t\r\n".encode())
        writer.write(b"Content-Length: 10\r\n\r\n12345")
        await until(lambda: place.far.streams)
        writer.transport.abort()
        await until(lambda: place.sessions.requests == 0 and place.far.streams[0].is_closing())


def test_certificates_that_do_not_belong_together_are_refused() -> None:
    one, other = (GATEWAY_CA.issue_server(["localhost"]) for _ in range(2))
    with pytest.raises(ConfigError, match="do not belong together"):
        https_context(one.certificate_pem, other.key_pem)


async def test_a_younger_certificate_is_shown_to_new_connections(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        shown = []
        for _ in range(2):
            _, writer = await place.connect()
            shown.append(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
            writer.close()
            issued = GATEWAY_CA.issue_server(["127.0.0.1"])
            place.server.context = https_context(issued.certificate_pem, issued.key_pem)
        assert shown[0] != shown[1]
