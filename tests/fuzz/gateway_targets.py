"""Targets for what a caller of the gateway sends. They keep the rules of `tests.fuzz.targets`."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from aiohttp import web

from arcbridge.client.serving.gateway.server import MAX_HEAD, GatewayConnection, UnknownPath, target_of
from tests.fuzz.caller_targets import feed

_LOOP = asyncio.new_event_loop()
Found = tuple[str, str, tuple[tuple[bytes, bytes], ...]]


class _Server(web.Server):
    """Keeps which requests come."""

    def __init__(self, found: list[Found]) -> None:
        super().__init__(self._note)
        self._found = found

    async def _note(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(GatewayConnection, request.protocol)
        connection.begin(request)
        self._found.append((request.method, request.raw_path, tuple(request.raw_headers)))
        connection.request_over()
        return web.Response()


async def _requests(data: bytes, size: int) -> list[Found]:
    found: list[Found] = []
    server: Any = _Server(found)
    server.open, server.requests = {}, {"refused": 0}
    connection = GatewayConnection(server)

    def bounded() -> None:
        assert connection._head <= MAX_HEAD, "more than a connection may hold"

    await feed(connection, data, size, bounded)
    return found


def read_gateway_head(data: bytes, size: int = 16 * 1024) -> list[Found]:
    """Return the requests that a connection of the gateway takes up, from pieces of `size`."""
    return _LOOP.run_until_complete(_requests(data, size))


def gateway_head(data: bytes) -> None:
    """The first request does not depend on the segments; its path is a cluster and a target, or neither."""
    whole, cut = read_gateway_head(data, len(data) or 1), read_gateway_head(data, max(1, len(data) // 40))
    if whole and len(data) <= MAX_HEAD:
        assert cut[:1] == whole[:1], "a request that depends on the segments"
    for _, path, _ in whole:
        try:
            cluster, target = target_of(path)
        except UnknownPath:
            continue
        assert path in (f"/clusters/{cluster}{target}", f"/clusters/{cluster}{target[1:]}")
