"""The listener says whether each cluster has a session, and why not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import aiohttp

from arcbridge.client.serving import observation
from arcbridge.errors import Unreachable
from arcbridge.observe.server import ObserveServer


async def test_none_without_an_address() -> None:
    assert await observation.observe("", []) is None


async def test_a_cluster_is_ready_while_it_has_a_session(monkeypatch: Any) -> None:
    started: list[str] = []
    start = ObserveServer.start

    async def noted(server: ObserveServer) -> str:
        started.append(await start(server))
        return started[0]

    monkeypatch.setattr(ObserveServer, "start", noted)
    up = SimpleNamespace(cluster="up", current=object(), failure=None)
    new = SimpleNamespace(cluster="new", current=None, failure=None)
    down = SimpleNamespace(cluster="down", current=None, failure=Unreachable("no relay"))
    server = await observation.observe("127.0.0.1:0", cast(Any, [up, new, down]))
    assert server is not None
    try:
        async with aiohttp.ClientSession() as client, client.get(f"http://{started[0]}/readyz?verbose") as answer:
            assert (await answer.text()).splitlines() == [
                "[+] session-up: ok",
                "[-] session-new: no session yet",
                "[-] session-down: no relay",
                "not ready",
            ]
    finally:
        await server.stop()
