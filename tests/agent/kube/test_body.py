"""A request's body: streamed, counted, and known to be over or not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, web

from arcbridge.agent.kube import body as module
from arcbridge.agent.kube.body import RequestBody
from tests.support.eventually import until

from .bench import Bench, running


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[RequestBody]:
    made: list[RequestBody] = []

    class Kept(RequestBody):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr("arcbridge.agent.kube.proxy.RequestBody", Kept)
    assert module.RequestBody is RequestBody
    return made


async def test_a_whole_body_is_counted_and_finished(bench: Bench, bodies: list[RequestBody]) -> None:
    await bench.ask("POST /api/v1/pods HTTP/1.1\nHost: k\nContent-Length: 5", b"hello", method="POST")
    (body,) = bodies
    assert (body.count, body.finished, body.error) == (5, True, None)


async def test_a_broken_body_is_not(bench: Bench, bodies: list[RequestBody]) -> None:
    wire = bench.stream()
    await wire.send(b"POST /api/v1/pods HTTP/1.1\r\nHost: k\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    await until(lambda: bodies and bodies[0].count >= 5)
    await wire.send(b"zz\r\n")
    await wire.answer()
    assert not bodies[0].finished
    assert bodies[0].error is not None


@pytest.mark.parametrize(
    ("expect", "version", "answered", "written"),
    [
        ("100-continue", HttpVersion11, False, [b"HTTP/1.1 100 Continue\r\n\r\n"]),
        ("100-continue", HttpVersion11, True, []),
        ("100-continue", HttpVersion10, False, []),
        ("", HttpVersion11, False, []),
    ],
    ids=["expected", "the answer has begun", "HTTP/1.0", "not expected"],
)
async def test_100_continue_is_said_once_and_never_within_an_answer(
    expect: str, version: HttpVersion, answered: bool, written: list[bytes]
) -> None:
    said: list[bytes] = []
    protocol = SimpleNamespace(transport=SimpleNamespace(write=said.append))
    content = SimpleNamespace(readany=_nothing, at_eof=lambda: True)
    request = SimpleNamespace(content=content, protocol=protocol, headers={"Expect": expect}, version=version)
    body = RequestBody(cast(web.BaseRequest, request))
    assert [chunk async for chunk in body.chunks(answered=answered)] == []
    assert said == written


async def _nothing() -> bytes:
    return b""
