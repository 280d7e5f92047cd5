"""The end-to-end TLS under a session: aiofastnet's transport where it works, elsewhere our own.

Both run the same `ssl.SSLContext` over a joined socket and tell the same protocol; this module chooses, and hides what
differs. It verifies nothing itself: what is trusted is in the context. A failed or cancelled handshake leaves the
socket to the caller, who closes it, and the protocol has heard of no connection.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final, cast

from arcbridge.loop_shares import LoopTime
from arcbridge.mux.connection import MuxConnection
from arcbridge.net.fast_tls import FastTlsLoop, bound_key_updates, fast_tls
from arcbridge.net.tlstransport import accepted_tls, connect_tls

SHUTDOWN_DEADLINE: Final = 3.0
"""Seconds that an agent leaves for its last bytes and both sides' close_notify."""
JOIN_AND_HANDSHAKE: Final = 60.0
"""Seconds within which a handshake is over that waits for a join, too; each step has a shorter deadline of its own."""
INCOMING_BUFFER: Final = 16 * (16 * 1024 + 64)
"""Bytes of ciphertext that one read of the socket may bring: sixteen TLS records, as much as the receive buffer."""
OUTGOING_BUFFER: Final = 16 * (16 * 1024 + 64)
"""Bytes of ciphertext that are gathered for one write to the socket. No write-buffer limit counts them, and nothing can
overtake them; with a quarter of it bulk took 5 to 7 % more CPU (`aiofastnet` in
bench/results/2026-11-25-studies.json)."""


class SessionStart:
    """The client's end: `begin` sends the ClientHello and reads nothing, `finish` does the rest.

    In between the socket may still be read by another (`net.join.FirstFlight`), and `context` may be given its CAs.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_hostname: str) -> None:
        self.context = context
        self._sock = sock
        self._server_hostname = server_hostname
        self._protocol = _Successor()
        self._loop = asyncio.get_running_loop()
        self._held: FastTlsLoop | None = None
        self._handshake: asyncio.Task[tuple[asyncio.Transport, asyncio.BaseProtocol]] | None = None

    def begin(self, deadline: float = JOIN_AND_HANDSHAKE) -> None:
        """Send the ClientHello in the loop's next turn; our own transport sends it in `finish`."""
        aiofastnet = fast_tls()
        if aiofastnet is None:
            return
        bound_key_updates(self.context, aiofastnet)
        self._held = FastTlsLoop(self._loop, holds_reader=True)
        self._handshake = self._loop.create_task(
            aiofastnet.create_connection(
                self._held,
                lambda: self._protocol,
                sock=self._sock,
                ssl=self.context,
                server_hostname=self._server_hostname,
                ssl_handshake_timeout=deadline,
                ssl_incoming_bio_size=INCOMING_BUFFER,
                ssl_outgoing_bio_size=OUTGOING_BUFFER,
            )
        )

    async def finish(self, connection: MuxConnection, deadline: float) -> asyncio.Transport:
        """Make the TLS within `deadline` seconds; the session behind `connection` has begun when this returns.

        Raises ssl.SSLCertVerificationError, other OSError, TimeoutError.
        """
        async with asyncio.timeout(deadline):
            if self._handshake is None:
                self.begin(deadline)
            if self._handshake is None or self._held is None:
                # Not the loop's: uvloop closes the descriptor itself where the peer has reset the connection, and the
                # caller's close would then hit whichever connection has the number by then.
                return await connect_tls(self._sock, self.context, connection, self._server_hostname)
            self._protocol.connection = connection
            held, self._held = self._held, None
            held.release()
            try:
                transport, _ = await self._handshake
            except asyncio.CancelledError:
                held.cancel_timer()
                if not self._handshake.cancelled() and self._handshake.exception() is None:
                    self._handshake.result()[0].abort()  # made in this very turn; its caller has been cancelled
                raise
        connection.poll_for_errors()
        return transport

    def abandon(self) -> None:
        """Leave the socket alone from now on, where `finish` was not called: it is about to be closed."""
        if self._handshake is not None and self._held is not None:
            self._held.abandon(self._sock.fileno())
            self._held = None
            self._handshake.cancel()
            self._handshake.add_done_callback(_seen)


class _Successor(asyncio.Protocol):
    """In the place of a session's connection while there is none."""

    connection: MuxConnection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).set_protocol(self.connection)
        self.connection.connection_made(transport)


def _seen(handshake: asyncio.Task[object]) -> None:
    """Mark its error as seen: what it was for has failed before."""
    if not handshake.cancelled():
        handshake.exception()


async def accept_session(
    sock: socket.socket,
    context: ssl.SSLContext,
    connection: MuxConnection,
    payer: LoopTime | None = None,
    *,
    handshake_deadline: float,
) -> None:
    """Make TLS as the server over a joined socket; the session behind `connection` has begun when this returns.

    `payer`: pays for the handshake (docs/threats.md#L47). Raises OSError, TimeoutError.
    """
    aiofastnet = fast_tls()
    if aiofastnet is None:
        deadlines = {"deadline": handshake_deadline, "close_deadline": SHUTDOWN_DEADLINE}
        (await accepted_tls(sock, context, connection, payer=payer, **deadlines)).payer = None
        return
    bound_key_updates(context, aiofastnet)
    loop = FastTlsLoop(asyncio.get_running_loop(), payer)
    transport, _ = await aiofastnet.connect_accepted_socket(
        loop,
        lambda: connection,
        sock,
        ssl=context,
        ssl_handshake_timeout=handshake_deadline,
        ssl_shutdown_timeout=SHUTDOWN_DEADLINE,
        ssl_incoming_bio_size=INCOMING_BUFFER,
        ssl_outgoing_bio_size=OUTGOING_BUFFER,
    )
    connection.poll_for_errors()
    loop.payer = None
    if transport.is_reading():
        # Added anew, the reader is the transport's own again: bulk is to pay for no call more.
        transport.pause_reading()
        transport.resume_reading()
