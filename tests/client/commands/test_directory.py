"""The relay's list of clusters, and what each failure is called."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from arcbridge.client.commands.directory import list_clusters
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.client.session import relay_http
from arcbridge.errors import PermissionRefused, Unauthenticated, Unreachable
from arcbridge.net.tls import ALPN_HTTP, outer_server_contexts
from tests.client.far_side import OTHER_CA, RELAY_CA
from tests.client.session.test_session_manager import login


class Cut(web.Response):
    """An answer whose connection ends before it."""

    async def prepare(self, request: web.BaseRequest) -> None:
        assert request.transport is not None
        request.transport.abort()


@contextlib.asynccontextmanager
async def serving(directory: Path, route: web.RouteDef) -> AsyncIterator[tuple[RelayAccess, Tokens]]:
    """Serve one path of a relay's API; what its user knows and has."""
    app = web.Application()
    app.add_routes([route])
    issued = RELAY_CA.issue_server(["127.0.0.1"])
    context = outer_server_contexts(issued.certificate_pem, issued.key_pem, RELAY_CA.certificate_pem)[ALPN_HTTP]
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    (directory / "ca").write_text(RELAY_CA.certificate_pem)
    try:
        access = RelayAccess(f"127.0.0.1:{runner.addresses[0][1]}", ca_file=directory / "ca")
        yield access, Tokens(login(directory), None)
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def relay(answer: web.Response, seen: list[str], place: Path) -> AsyncIterator[tuple[Relays, Tokens]]:
    async def clusters(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        return answer

    async with serving(place, web.get("/v1/clusters", clusters)) as (access, tokens):
        yield Relays([access]), tokens


async def test_sorted_rows(tmp_path: Path) -> None:
    seen: list[str] = []
    rows = [{"name": "b", "state": "Offline"}, {"name": "a", "state": "Connected"}]
    async with relay(web.json_response(rows), seen, tmp_path) as (access, tokens):
        assert [row["name"] for row in await list_clusters(access, tokens)] == ["a", "b"]
    assert seen == ["Bearer the-access-token"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"status": 401}, Unauthenticated),
        ({"status": 403}, PermissionRefused),
        ({"status": 500}, Unreachable),
        ({"status": 302, "headers": {"Location": "https://elsewhere"}}, Unreachable),
        ({"text": "no json"}, Unreachable),
        ({"text": "3"}, Unreachable),
        ({"text": 100000 * "["}, Unreachable),
        ({"text": '[{"no": "name"}]'}, Unreachable),
        ({"text": '[{"name": "good"}, {"name": "$(touch ran)"}]'}, Unreachable),
        ({"text": '[{"name": "a\\u001b[2J"}]'}, Unreachable),
        ({"text": '[{"name": ["a"]}]'}, Unreachable),
    ],
)
async def test_failures(tmp_path: Path, answer: dict[str, object], kind: type[Exception]) -> None:
    async with relay(web.Response(**answer), [], tmp_path) as (access, tokens):
        with pytest.raises(kind):
            await list_clusters(access, tokens)


async def test_an_answer_that_is_too_long_or_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_http, "_LIMIT", 1000)
    for answer, words in (
        (web.Response(text=" " * 1001), r"answered more than 1000 bytes: is this an arcbridge relay\?"),
        (
            Cut(),
            r"the relay https:.* cannot be reached \(it ended the connection .*\); check its address and this machine",
        ),
    ):
        async with relay(answer, [], tmp_path) as (access, tokens):
            with pytest.raises(Unreachable, match=words):
                await list_clusters(access, tokens)


async def test_no_token_for_an_unknown_relay(tmp_path: Path) -> None:
    seen: list[str] = []
    async with relay(web.json_response([]), seen, tmp_path) as (access, tokens):
        (tmp_path / "ca").write_text(OTHER_CA.certificate_pem)
        with pytest.raises(Unreachable, match="not trusted"):
            await list_clusters(access, tokens)
    assert seen == []


async def test_no_listener(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text(RELAY_CA.certificate_pem)
    relays = Relays([RelayAccess("127.0.0.1:1", ca_file=tmp_path / "ca")])
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 cannot be reached \(connection refused\)"):
        await list_clusters(relays, Tokens(login(tmp_path), None))


async def test_the_next_relay_answers(tmp_path: Path) -> None:
    async with relay(web.json_response([{"name": "a"}]), [], tmp_path) as (working, tokens):
        dead = RelayAccess("127.0.0.1:1", ca_file=tmp_path / "ca")
        relays = Relays([dead, *working.all], draw=lambda: 0.0)
        assert [row["name"] for row in await list_clusters(relays, tokens)] == ["a"]
        assert relays.in_use is working.all[0]
