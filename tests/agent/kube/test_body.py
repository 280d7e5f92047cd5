"""A request's body: streamed, counted, and known to be over or not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, web

from arcbridge.agent.kube.body import RequestBody


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
