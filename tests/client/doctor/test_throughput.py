"""What is read to measure the rate, and what is said where nothing can be; tests/e2e/test_doctor.py reads really."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.client.doctor.throughput import LARGE, measure
from arcbridge.errors import ConnectionLost


async def measured(documents: dict[str, int], asked: list[str], monkeypatch: pytest.MonkeyPatch) -> Finding:
    """Measure at an API server with documents of these sizes; 0: it redirects, -1: the session ends instead."""

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path == "/elsewhere":
            return web.Response(body=b"x" * LARGE)
        size = documents.get(request.path)
        if size == 0:
            raise web.HTTPFound("/elsewhere")
        return web.Response(status=404 if size is None else 200, body=b"x" * (size or 10))

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)

    @asynccontextmanager
    async def api_client(session: object) -> AsyncIterator[aiohttp.ClientSession]:
        if -1 in documents.values():
            raise ConnectionLost("the session is gone")
        async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as http:
            yield http

    monkeypatch.setattr("arcbridge.client.doctor.throughput.api_client", api_client)
    return await measure(None, 0.001)


async def test_the_first_large_document_is_read_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    found = await measured({"/openapi/v2": LARGE - 1, "/openapi/v3": LARGE}, asked, monkeypatch)
    assert found.state is FindingState.OK
    assert "a second from the cluster (/openapi/v3, " in found.detail
    assert asked[:2] == ["/openapi/v2", "/openapi/v3"]
    assert len(asked) > 2


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ({}, "the largest document that you may read has 0 bytes"),
        ({"/openapi/v2": 0}, "the largest document that you may read has 0 bytes"),
        ({"/openapi/v2": 2048}, "the largest document that you may read has 2 KiB"),
        ({"/openapi/v2": -1}, "the session is gone"),
    ],
    ids=["none", "redirected", "small", "lost"],
)
async def test_what_cannot_be_measured_is_said(
    documents: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await measured(documents, [], monkeypatch)
    assert (found.state, found.detail) == (FindingState.SKIPPED, f"not measured: {said}")
