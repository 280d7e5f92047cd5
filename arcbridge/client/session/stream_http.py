"""HTTP with a cluster's API server, straight over streams of a session.

For what the client asks itself (`doctor`, `forward`): no local endpoint and no other program is in between. aiohttp
speaks, over connections that are streams. Invariant: a body that was cut is an error and never shorter without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from arcbridge.client.session.session_manager import TARGET
from arcbridge.errors import ConnectionLost, RemoteProtocolError
from arcbridge.mux.session import MuxSession

ANSWER_DEADLINE = 300.0
"""Seconds for one answer with its body."""


class _StreamConnector(aiohttp.BaseConnector):
    """Opens a stream where another connector connects."""

    def __init__(self, session: MuxSession) -> None:
        super().__init__()
        self._session = session

    async def _create_connection(self, *_: Any) -> ResponseHandler:
        protocol = ResponseHandler(asyncio.get_running_loop())
        self._session.open(TARGET, protocol)
        return protocol


@asynccontextmanager
async def api_client(session: MuxSession) -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client for paths of the API server; what is not answered whole within it raises ArcbridgeError."""
    headers = {"Accept": "application/json", "User-Agent": "arcbridge"}
    try:
        async with aiohttp.ClientSession(
            "http://kubernetes",
            connector=_StreamConnector(session),
            headers=headers,
            skip_auto_headers=("Accept-Encoding",),
            timeout=aiohttp.ClientTimeout(ANSWER_DEADLINE),
        ) as http:
            yield http
    except aiohttp.ClientResponseError as error:
        raise RemoteProtocolError(
            "the other end of the stream does not speak HTTP, or the head of its answer is too long"
        ) from error
    except TimeoutError as error:
        raise ConnectionLost(f"the answer was not whole within {ANSWER_DEADLINE:.0f} s") from error
    except aiohttp.ClientError as error:
        raise ConnectionLost("the stream ended before its answer was whole") from error
