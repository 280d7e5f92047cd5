"""The end-to-end TLS under a session: aiofastnet's transport where it works, the event loop's own elsewhere.

Both run the same `ssl.SSLContext` over a joined socket and tell the same protocol; this module chooses, and hides what
differs. It verifies nothing itself: what is trusted is in the context. A failed or cancelled handshake leaves the
socket to the caller, who closes it, and the protocol has heard of no connection.

aiofastnet calls OpenSSL without Python's `ssl` in between (docs/decisions/0012-aiofastnet.md). It is passed over where
it is not installed, where this Python hides its OpenSSL (aiofastnet then works through `ssl`, slower than uvloop), and
on a client that can write no temporary file: aiofastnet decodes the server's certificate from one, and a handshake
that cannot be decoded never ends.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
import tempfile
from types import ModuleType
from typing import Any, Final

from arcbridge.mux.connection import MuxConnection

SHUTDOWN_DEADLINE: Final = 3.0
"""Seconds that an agent leaves for its last bytes and both sides' close_notify; a client waits 30, as asyncio does."""
INCOMING_BUFFER: Final = 16 * (16 * 1024 + 64)
"""Bytes of ciphertext that one read of the socket may bring: sixteen TLS records, as much as the receive buffer."""
OUTGOING_BUFFER: Final = 4 * (16 * 1024 + 64)
"""Bytes of ciphertext that are gathered for one write to the socket. No write-buffer limit counts them, and nothing can
overtake them."""

_log = logging.getLogger("arcbridge.net")


@functools.cache
def fast_tls() -> ModuleType | None:
    """aiofastnet, or None where the loop's TLS serves sessions; the log tells which, once, at debug."""
    try:
        import aiofastnet
    except ImportError as error:
        # Also raised by an aiofastnet that does not fit this Python's OpenSSL.
        _log.debug("sessions use the event loop's TLS: aiofastnet cannot be imported (%s)", error)
        return None
    if aiofastnet.OPENSSL_DYN_LIBS is None:
        _log.debug("sessions use the event loop's TLS: aiofastnet has no direct access to this Python's OpenSSL")
        return None
    _log.debug("sessions use the TLS of aiofastnet %s", aiofastnet.__version__)
    return aiofastnet


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
    loop = asyncio.get_running_loop()
    aiofastnet = fast_tls()
    if aiofastnet is None or not _temporary_file_possible():
        transport, _ = await loop.create_connection(
            lambda: connection,
            sock=sock,
            ssl=context,
            server_hostname=server_hostname,
            ssl_handshake_timeout=handshake_deadline,
        )
        return transport
    made: tuple[asyncio.Transport, MuxConnection] = await aiofastnet.create_connection(
        _LoopOfFastTls(loop),
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
    sock: socket.socket, context: ssl.SSLContext, connection: MuxConnection, *, handshake_deadline: float
) -> None:
    """Make TLS as the server over a joined socket; the session behind `connection` has begun when this returns.

    Raises OSError, TimeoutError.
    """
    loop = asyncio.get_running_loop()
    aiofastnet = fast_tls()
    if aiofastnet is None:
        await loop.connect_accepted_socket(
            lambda: connection,
            sock,
            ssl=context,
            ssl_handshake_timeout=handshake_deadline,
            ssl_shutdown_timeout=SHUTDOWN_DEADLINE,
        )
        return
    await aiofastnet.connect_accepted_socket(
        _LoopOfFastTls(loop),
        lambda: connection,
        sock,
        ssl=context,
        ssl_handshake_timeout=handshake_deadline,
        ssl_shutdown_timeout=SHUTDOWN_DEADLINE,
        ssl_incoming_bio_size=INCOMING_BUFFER,
        ssl_outgoing_bio_size=OUTGOING_BUFFER,
    )
    connection.poll_for_errors()


class _LoopOfFastTls:
    """The event loop as aiofastnet sees it: all of it, but one report that is none.

    aiofastnet 1.2.0 reports a peer that leaves within the handshake to the exception handler, with the class
    ConnectionResetError in place of an exception, which no handler expects. The caller gets that error in any case.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), type):
            self._loop.call_exception_handler(context)


def _temporary_file_possible() -> bool:
    """Whether a certificate can be decoded from a temporary file; asked at each connection, since a disk fills up."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(16 * 1024))
            file.flush()
    except OSError as error:
        _log.debug("this session uses the event loop's TLS: no temporary file can be written (%s)", error)
        return False
    return True
