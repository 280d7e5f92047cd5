"""One request and its answer: what goes on, what does not, and that a cut is never an end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from arcbridge.client.serving.gateway.exchange import reason
from arcbridge.errors import ConnectionLost, StreamReset
from arcbridge.http_fields import TOKEN_PROTOCOL
from arcbridge.wire.frames import ResetCode
from tests.client.far_side import CLUSTER
from tests.client.serving.gateway.station import headers, station
from tests.client.serving.gateway.test_server import status


async def test_a_request_goes_on_without_its_tokens_and_hop_headers(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, client):
        more = {
            "Connection": "X-Hop, keep-alive",
            "X-Hop": "1",
            "Proxy-Authorization": "Basic eA==",
            "TE": "trailers",
            "Impersonate-User": "carol",
            "Accept-Encoding": "gzip",
            "User-Agent": "tool/1",
        }
        url = URL(place.path("/api/v1/pods?limit=5&labelSelector=a%3Db%2Cc"), encoded=True)
        _, got, _ = await status(client, url, headers=headers("alice", "relay-alice") | more)
        assert (got["caller"], got["method"]) == ("alice", "GET")
        assert got["path"] == "/api/v1/pods?limit=5&labelSelector=a%3Db%2Cc"
        # What the agent decides about goes on as it came.
        assert got["headers"] == {
            "host": "kubernetes",
            "impersonate-user": "carol",
            "accept": "*/*",
            "accept-encoding": "gzip",
            "user-agent": "tool/1",
        }
        assert [request.token for request in place.far.requests] == ["relay-alice"]


async def test_the_token_of_a_browser_goes_on_with_no_request(tmp_path: Path) -> None:
    """A proxy in front may drop `Upgrade` and leave the subprotocols, of which one is the token for the cluster."""
    subprotocols = {"Sec-WebSocket-Protocol": f"{TOKEN_PROTOCOL}YWxpY2U, v5.channel.k8s.io"}
    async with station(tmp_path) as (place, client):
        _, got, _ = await status(client, place.path(), headers=headers("alice") | subprotocols)
        assert got["headers"]["sec-websocket-protocol"] == "v5.channel.k8s.io"
        code, _, _ = await status(client, place.path(), headers=subprotocols)
        assert code == 401


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_goes_on(tmp_path: Path, chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    data: Any = pieces() if chunked else b"x" * 100_000
    async with station(tmp_path) as (place, client):
        async with client.put(place.path("/x"), data=data, headers=headers("t") | {"Expect": "100-continue"}) as answer:
            got = await answer.json()
        assert (got["method"], got["body"]) == ("PUT", "x" * 100_000)
        assert "expect" not in got["headers"]
        assert ("content-length" in got["headers"]) is not chunked


@pytest.mark.parametrize("path", ["/a/../b", "/a/%2e%2e/b", "//x", "/a%2Fb?c=%20", "/%C3%A9?q=ü"])
async def test_a_path_goes_on_as_it_came(tmp_path: Path, path: str) -> None:
    async with station(tmp_path) as (place, _):
        reader, writer = await place.connect()
        writer.write(f"GET /clusters/{CLUSTER}{path} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer t\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 200 "):
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert json.loads(await reader.readexactly(length))["path"] == path
        else:
            assert b" 400 " in head
            assert not path.isascii()
        writer.close()


async def test_an_answer_that_is_cut_is_a_reset(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        place.far.cuts.add("/cut")
        reader, writer = await place.connect()
        writer.write(f"GET /clusters/{CLUSTER}/cut HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer t\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(10_000)
        writer.close()


async def test_redirects_are_the_callers_and_stay_at_the_gateway(tmp_path: Path) -> None:
    async with (
        station(tmp_path) as (place, client),
        client.get(place.path("/moved"), headers=headers("t"), allow_redirects=False) as answer,
    ):
        assert (answer.status, answer.headers["Location"]) == (301, f"/clusters/{CLUSTER}/api/v1/there")


async def test_a_request_whose_stream_is_refused_gets_a_status_and_no_second_stream(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, client):
        for code, expected in (
            (ResetCode.REFUSED, 503),
            (ResetCode.FORBIDDEN, 403),
            (ResetCode.LIMIT, 429),
            (ResetCode.CANCELLED, 502),
        ):
            place.far.resets.append(code)
            before = len(place.far.streams)
            async with client.put(place.path(), data=b"x", headers=headers("t")) as answer:
                assert (answer.status, (await answer.json())["kind"]) == (expected, "Status")
            assert len(place.far.streams) == before + 1


def test_reasons() -> None:
    assert "may have been done" in reason(None, "berlin").message
    assert reason(StreamReset(ResetCode.CONNECT_FAILED), "berlin").status_code == 503
    assert "berlin" in reason(ConnectionLost("cut"), "berlin").message


async def test_an_answer_before_the_end_of_the_body(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        reader, writer = await place.connect()
        writer.write(
            f"POST /clusters/{CLUSTER}/full HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer t\r\n"
            "Content-Length: 1000000\r\n\r\nbegin".encode()
        )
        assert (await reader.readuntil(b"too much")).startswith(b"HTTP/1.1 413 ")
        writer.write(b"x" * 999_995)
        writer.write(f"GET /clusters/{CLUSTER}/next HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer u\r\n\r\n".encode())
        rest = await reader.readuntil(b"}")
        assert b'"caller": "u"' in rest, "the rest of the body belongs to the first request"
        writer.close()
