"""The listener to which the browser comes back: which answers give a code."""

from __future__ import annotations

import asyncio
from urllib.parse import urlencode

import pytest

from arcbridge.client.login_callback import LoginCallback

ISSUER = "https://login.example.org"


async def status_of(callback: LoginCallback, target: str) -> int:
    """Come back as a browser does, and return the status of the answer."""
    server = await asyncio.start_server(callback.serve, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
    return int(answer.split()[1])


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, 200), ({"state": "other"}, 400), ({"iss": "https://login.example.net"}, 400), ({"iss": ISSUER}, 200)],
    ids=str,
)
async def test_which_answers_give_a_code(change: dict[str, str], status: int) -> None:
    callback = LoginCallback("state", ISSUER)
    query = urlencode({"code": "code", "state": "state", **change})
    assert await status_of(callback, f"/?{query}") == status
    assert callback.code.done() == (status == 200)
    await callback.finish()
