"""The rest of an answer whose caller is gone: it is read and dropped, so that the connection serves the next request.

Closing the connection in its place would cost each abandoned request a TCP and TLS handshake at the agent and at the
API server, and a caller who opens streams and ends them at once would take from the others, one after the other, the
connections that they had idle. The request keeps the user's seat until its answer is there, so that a caller who does
not wait cannot make the API server work on more. What is not there soon, or is long, ends its connection after all.

Only answers to requests that may be repeated and are not long-running come here (`exchange`).
"""

from __future__ import annotations

import asyncio
import time

from arcbridge.agent.accounts import Account
from arcbridge.agent.kube.response import ResponseHead
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upstream_pool import UpstreamConnection

LONGEST = 1.0
"""Seconds for which the rest of an answer is waited for."""
MOST = 256 * 1024
"""Bytes of a body that are read and dropped: a millisecond of the event loop."""


class AbandonedAnswer:
    """Reads what is left of an answer (`upstream_pool.ResponseHandler`), and then gives the seat back."""

    __slots__ = ("_account", "_connection", "_left", "_timer")

    def __init__(self, connection: UpstreamConnection, account: Account) -> None:
        """`account`: of the user who has the seat."""
        self._connection = connection
        self._account = account
        self._left = MOST
        self._timer = asyncio.get_running_loop().call_later(LONGEST, self._give_up)
        connection.abandon(self, account.waiting)

    def response_begins(self, head: ResponseHead) -> bytes:
        return b""

    def response_data(self, data: bytes | memoryview, payload: int) -> None:
        if self._left < 0:
            return  # the trailers of what was given up
        self._left -= len(data)
        if self._left < 0:
            self._give_up()

    def response_complete(self) -> None:
        self._end()

    def response_failed(self, refusal: RequestRefusal | None) -> None:
        self._end()

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        raise AssertionError("a request that asked for no upgrade was given one")

    def _give_up(self) -> None:
        self._account.ended_connections.take(time.monotonic())
        self._connection.drop()
        self._end()

    def _end(self) -> None:
        self._timer.cancel()
        self._account.seats.leave()
