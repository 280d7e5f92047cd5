"""TLS towards the API server: the fast transport for requests that may be repeated, the lossless one for all others.

Both stop reading when they are paused, so what a caller does not take stays at the API server. aiofastnet has taken
INCOMING_BUFFER bytes at most by then, and ends a connection as soon as a write fails, with what the API server had
answered before: such a request is one that the agent repeats, or whose caller does. Upgraded connections and requests
with a body go over `net.tlstransport`, which delivers every byte that came before the end. Where aiofastnet does not
work, or is a release that can no longer be asked for what it holds, all do.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from types import ModuleType
from typing import Final

from arcbridge.mux.socket_error_poll import TransportErrorPoll
from arcbridge.net.fast_tls import FastTlsLoop, bound_key_updates, fast_tls
from arcbridge.net.tlstransport import HANDSHAKE_DEADLINE, connect_tls

INCOMING_BUFFER: Final = 8 * (16 * 1024 + 64)
"""Bytes of ciphertext that one read may bring, eight TLS records: they are held while the caller takes nothing."""
OUTGOING_BUFFER: Final = 16 * 1024 + 64
"""Bytes of ciphertext gathered for one write: one record, more than any request head."""


async def connect_upstream(
    sock: socket.socket,
    context: ssl.SSLContext,
    protocol: asyncio.BufferedProtocol,
    server_hostname: str,
    *,
    repeatable: bool,
) -> TransportErrorPoll | None:
    """Make TLS on a connected socket; return the poll to which each read is reported, where one is needed.

    Raises ssl.SSLError, other OSError, TimeoutError. The caller closes the socket if it fails or is cancelled.
    """
    aiofastnet = fast_tls() if repeatable else None
    if aiofastnet is None or not _gives_what_it_holds(aiofastnet):
        await connect_tls(sock, context, protocol, server_hostname)
        return None
    bound_key_updates(context, aiofastnet)
    transport, _ = await aiofastnet.create_connection(
        FastTlsLoop(asyncio.get_running_loop()),
        lambda: protocol,
        sock=sock,
        ssl=context,
        server_hostname=server_hostname,
        ssl_handshake_timeout=HANDSHAKE_DEADLINE,
        ssl_incoming_bio_size=INCOMING_BUFFER,
        ssl_outgoing_bio_size=OUTGOING_BUFFER,
    )
    return TransportErrorPoll(transport)


def _gives_what_it_holds(aiofastnet: ModuleType) -> bool:
    """Return whether its transport has the method, no part of its API, that `UpstreamConnection` calls for that."""
    transports = getattr(aiofastnet, "ssl_transport", None)
    return hasattr(getattr(transports, "SSLTransportBase", None), "_do_read")
