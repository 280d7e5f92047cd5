"""Joins one TLS TCP connection to a session, and carries the session from its connection to another one.

A connection holds no rule of the protocol: its transport decrypts straight into the buffer that `get_buffer` returns.
Whether a session may change its connection is decided by `wire.resumption` and the roles. Invariant: a session has one
connection at a time, and the former one is not read any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, cast

from arcbridge.errors import ArcbridgeError, ConnectionLost, RemoteProtocolError
from arcbridge.mux import buffer
from arcbridge.mux.socket_error_poll import TransportErrorPoll
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Session, State

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
                session.data_received(buffer.VIEW[:nbytes], self._began)
            else:
                before = payer.shares.total
                session.data_received(buffer.VIEW[:nbytes], self._began)
                payer.charge(monotonic(), self._began, before)
        if self._error_poll is not None and not self._error_poll.included:
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


class Migration:
    """The changes of connection of one session: the initiator dials and waits, the acceptor takes one over."""

    __slots__ = ("_attached", "_machine", "_session")

    def __init__(self, session: MuxSession, machine: Session) -> None:
        self._session = session
        self._machine = machine
        self._attached: asyncio.Future[None] | None = None

    def start(self, auth: Auth | AuthMaker, label: str = "") -> MuxConnection:
        """Return a protocol (initiator) for `create_connection`; once its TLS stands it takes the session over.

        The connection that is attached until then, if any, goes on until that moment and is dropped unread. Then
        await `wait`. `label` is the new connection's join id.
        """
        self._attached = asyncio.get_running_loop().create_future()
        return MuxConnection(self._session, auth, resumes=True, label=label)

    async def wait(self) -> None:
        """Wait until the connection of the last `start` carries the session.

        Raises ConnectionLost or SessionEnded: the session waits for another try, unless it is `closed`. Cancelling
        gives the connection up.
        """
        waiting, session = self._attached, self._session
        if waiting is None:
            return
        try:
            await waiting
        except asyncio.CancelledError:
            if session.connection is not None and session.state is State.DETACHED:
                self._machine.connection_lost(monotonic(), ConnectionLost("given up"))
                session.act()
            raise

    def take_over(self, newcomer: MuxSession, ok: AuthOk) -> None:
        """Acceptor: go on over the connection of `newcomer`, whose right to this session was verified.

        `newcomer` ends; so does a connection that is still attached, unread. Raises LocalProtocolError when the
        newcomer's epoch is not higher or this session is over, RemoteProtocolError when the counts contradict each
        other: both sessions are over then.
        """
        session, hello, connection = self._session, newcomer.resumption.resuming, newcomer.connection
        if hello is None or connection is None or connection.transport is None:
            raise ConnectionLost("the connection that was to resume the session is gone")
        try:
            self._machine.resumption.take_over(hello, ok, monotonic())
        except RemoteProtocolError as error:
            newcomer.close(GoawayCode.PROTOCOL, error.message)
            session.drop_connection()
            session.act()
            raise
        session.drop_connection()
        newcomer.set_connection(None)
        newcomer.resumption.hand_over(monotonic())
        newcomer.act()
        connection.move_to(session)
        session.set_connection(connection)
        session.label = newcomer.label
        session.act()

    def ask(self) -> None:
        """Acceptor: ask the client for another connection, because this one goes away soon."""
        self._machine.resumption.ask_to_move(self._session.label)
        self._session.wake()

    def settle(self, error: ArcbridgeError | None) -> None:
        """Complete `wait`: the connection carries the session, or `error` says why it does not."""
        waiting = self._attached
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(error)
            waiting.exception()  # retrieved, so that asyncio logs nothing where no caller waits


def peer_certificate(transport: asyncio.Transport | None) -> bytes:
    """Return the certificate (DER) that the peer showed in a TLS connection; empty where there is none."""
    tls = None if transport is None else transport.get_extra_info("ssl_object")
    found: bytes | None = None if tls is None else tls.getpeercert(True)
    return found or b""
