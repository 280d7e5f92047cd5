"""One TLS TCP connection under a session: gives its buffer, hands over what was read, writes what it is told to.

It holds no rule of the protocol. Its transport decrypts straight into the buffer that `get_buffer` returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, cast

from arcbridge.mux import buffer
from arcbridge.mux.socket_error_poll import TransportErrorPoll
from arcbridge.wire.records import Auth

if TYPE_CHECKING:
    from arcbridge.mux.session import MuxSession

AuthMaker = Callable[[bytes], Auth]
"""Makes the AUTH for a connection from the certificate (DER) that the peer showed in it; may raise ArcbridgeError."""

WRITE_HIGH = 256 * 1024
"""Bytes that may wait in the transport before payload waits in its streams instead, where order is fair."""
WRITE_LOW = 64 * 1024


class MuxConnection(asyncio.BufferedProtocol):
    """The asyncio protocol of one connection; made by `MuxSession.protocol`."""

    __slots__ = ("_began", "_error_poll", "_session", "auth", "label", "resumes", "transport")

    def __init__(
        self, session: MuxSession, auth: Auth | AuthMaker | None = None, *, resumes: bool = False, label: str = ""
    ) -> None:
        self._session: MuxSession | None = session
        self.auth = auth
        """The AUTH of this connection, or what makes it once its TLS stands; None: the session has its own."""
        self.resumes = resumes
        """Whether the connection resumes the session."""
        self.label = label
        """The join id of a connection that resumes."""
        self.transport: asyncio.Transport | None = None
        self._error_poll: TransportErrorPoll | None = None
        """Told of each read; None for a transport that reads on until it finds the error itself."""
        self._began = 0.0
        """When the transport began to decrypt the bytes of the present read, monotonic seconds."""

    def poll_for_errors(self) -> None:
        """Poll the socket after reads, because its transport learns of readiness from `loop.add_reader` alone."""
        if self.transport is not None:
            self._error_poll = TransportErrorPoll(self.transport)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH, low=WRITE_LOW)
        if self._session is None:
            self.transport.abort()
        else:
            self._session.connection_made(self, self.transport)

    def make_auth(self) -> Auth | None:
        """Return the AUTH for this connection, once its TLS stands. Raises what its maker raises."""
        auth, self.auth = self.auth, None
        if auth is None or isinstance(auth, Auth):
            return auth
        return auth(peer_certificate(self.transport))

    def get_buffer(self, sizehint: int) -> memoryview:
        self._began = monotonic()
        return buffer.VIEW  # not BUFFER: asyncio's TLS slices what it gets, and a slice of a bytearray is a copy

    def buffer_updated(self, nbytes: int) -> None:
        session = self._session
        if session is not None:
            payer = session.payer
            if payer is None:
                session.data_received(buffer.VIEW[:nbytes])
            else:
                before = payer.shares.total
                session.data_received(buffer.VIEW[:nbytes])
                payer.charge(monotonic(), self._began, before)
        if buffer.POISON:
            buffer.poison(nbytes)
        if self._error_poll is not None:
            self._error_poll.was_read()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        if self._session is not None:
            self._session.set_writable(False)

    def resume_writing(self) -> None:
        if self._session is not None:
            self._session.set_writable(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self._error_poll is not None:
            self._error_poll.stop()
            self._error_poll = None
        if self._session is not None:
            self._session.connection_lost(self, exc)

    def move_to(self, session: MuxSession) -> None:
        """Give what comes on this connection to another session from now on."""
        self._session = session

    def drop(self) -> None:
        """Leave the session: what still comes is not read, and the socket is closed without a frame."""
        self._session = None
        if self.transport is not None:
            self.transport.abort()


def peer_certificate(transport: asyncio.Transport | None) -> bytes:
    """Return the certificate (DER) that the peer showed in a TLS connection; empty where there is none."""
    tls = None if transport is None else transport.get_extra_info("ssl_object")
    found: bytes | None = None if tls is None else tls.getpeercert(True)
    return found or b""
