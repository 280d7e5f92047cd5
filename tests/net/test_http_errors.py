"""Why a request got no answer, in words; the errors are those of real connections."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import pytest

from arcbridge.net.http_errors import reason


async def failure(url: str) -> str:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError) as caught:
            await session.get(url)
    return reason(caught.value)


async def test_no_process_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        assert await failure(f"http://127.0.0.1:{sock.getsockname()[1]}/") == "connection refused"


async def test_a_connection_that_ends() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await failure(f"http://127.0.0.1:{port}/") == "it ended the connection without an answer"
    server.close()
    await server.wait_closed()


def test_names_and_the_rest() -> None:
    assert reason(socket.gaierror(-2, "Name or service not known")) == (
        "its name cannot be resolved: name or service not known"
    )
    assert reason(ValueError("secret")) == "ValueError"
