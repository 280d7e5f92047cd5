"""Serves connections that asked for `http/1.1`: TLS, a check of what was negotiated, then the HTTP API's protocol.

It reads no HTTP and sets no deadline but that of the handshake: both are the protocol's (`relay.http.server`).
Invariant: where another protocol than HTTP was negotiated, no byte of the peer is read.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import cast

import structlog

from arcbridge.net.sockets import reset
from arcbridge.net.tls import ALPN_HTTP, accept_tls
from arcbridge.net.tlspipe import CLOSE_DEADLINE, HANDSHAKE_DEADLINE
from arcbridge.relay.admission import Ticket
from arcbridge.relay.counters import Counters

log = structlog.get_logger("arcbridge.relay")


class HttpHandler:
    """The listener's handler of the HTTP API; the listener calls `serve`.

    Connecting authenticates no peer, so the connection holds its ticket until it ends: the places for unauthenticated
    peers bound the API's connections, too. The protocol gets the ticket, because it decides when to end the connection.
    """

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        protocol: Callable[[Ticket], asyncio.Protocol],
        counters: Counters,
    ) -> None:
        self._context = context
        self._protocol = protocol
        self._counters = counters

    async def serve(self, sock: socket.socket, ticket: Ticket) -> None:
        """Serve one connection until it is over; the socket is closed then."""
        connection = _AlpnGate(partial(self._protocol, ticket))
        try:
            await accept_tls(
                lambda: connection,
                sock,
                self._context(),
                ticket.loop_time,
                handshake_deadline=HANDSHAKE_DEADLINE,
                shutdown_deadline=CLOSE_DEADLINE,
            )
        except (OSError, TimeoutError) as error:
            self._counters.rejected["handshake"] += 1
            log.debug("http connection refused", source=ticket.address, reason=type(error).__name__)
            sock.close()
            return
        except BaseException:
            reset(sock)
            raise
        try:
            await connection.over
        finally:
            connection.abort()


class _AlpnGate(asyncio.Protocol):
    """Stands before the API's protocol: lets it begin only where HTTP was negotiated, and tells when it is over."""

    def __init__(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._make = protocol
        self._inner: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the connection is lost."""

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is None or tls.selected_alpn_protocol() not in (None, ALPN_HTTP):
            # The client offered HTTP and then negotiated another protocol (docs/threats.md#J13): not a byte is read.
            self._transport.abort()
            return
        self._inner = self._make()
        for name in ("data_received", "eof_received", "pause_writing", "resume_writing"):
            setattr(self, name, getattr(self._inner, name))
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._inner is not None:
            self._inner.connection_lost(exc)
        if not self.over.done():
            self.over.set_result(None)
