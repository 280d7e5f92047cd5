"""The end-to-end TLS under a session: aiofastnet's transport where it works, elsewhere our own.

Both run the same `ssl.SSLContext` over a joined socket and tell the same protocol; this module chooses, and hides what
differs. It verifies nothing itself: what is trusted is in the context. A failed or cancelled handshake leaves the
socket to the caller, who closes it, and the protocol has heard of no connection.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final

from arcbridge.loop_shares import LoopTime
from arcbridge.mux.connection import MuxConnection
from arcbridge.net.fast_tls import FastTlsLoop, bound_key_updates, fast_tls
from arcbridge.net.tlstransport import accepted_tls, connect_tls

SHUTDOWN_DEADLINE: Final = 3.0
"""Seconds that an agent leaves for its last bytes and both sides' close_notify."""
INCOMING_BUFFER: Final = 16 * (16 * 1024 + 64)
"""Bytes of ciphertext that one read of the socket may bring: sixteen TLS records, as much as the receive buffer."""
OUTGOING_BUFFER: Final = 16 * (16 * 1024 + 64)
"""Bytes of ciphertext that are gathered for one write to the socket. No write-buffer limit counts them, and nothing can
overtake them; with a quarter of it bulk took 5 to 7 % more CPU (`aiofastnet` in
bench/results/2026-11-25-studies.json)."""


async def connect_session(
    sock: socket.socket,
    context: ssl.SSLContext,
    connection: MuxConnection,
    server_hostname: str,
    *,
    handshake_deadline: float,
) -> asyncio.Transport:
    """Make TLS as the client over a joined socket; the session behind `connection` has begun when this returns.

    Raises ssl.SSLCertVerificationError, other OSError, TimeoutError.
    """
    aiofastnet = fast_tls()
    if aiofastnet is None:
        # Not the loop's: uvloop closes the descriptor itself where the peer has reset the connection, and the caller's
        # close would then hit whichever connection has the number by then.
        async with asyncio.timeout(handshake_deadline):
            return await connect_tls(sock, context, connection, server_hostname)
    bound_key_updates(context, aiofastnet)
    made: tuple[asyncio.Transport, MuxConnection] = await aiofastnet.create_connection(
        FastTlsLoop(asyncio.get_running_loop()),
        lambda: connection,
        sock=sock,
        ssl=context,
        server_hostname=server_hostname,
        ssl_handshake_timeout=handshake_deadline,
        ssl_incoming_bio_size=INCOMING_BUFFER,
        ssl_outgoing_bio_size=OUTGOING_BUFFER,
    )
    connection.poll_for_errors()
    return made[0]


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
