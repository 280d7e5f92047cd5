"""The asyncio face of a session or control connection: one machine, one timer, one flush per loop turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import assert_never

from arcbridge.errors import ArcbridgeError, ConnectionLost, SessionEnded
from arcbridge.loop_shares import LoopTime
from arcbridge.mux import memory
from arcbridge.mux.alteration import alteration
from arcbridge.mux.connection import AuthMaker, Migration, MuxConnection
from arcbridge.mux.pacing import AHEAD_FREE, AHEAD_PAUSE, PACED, Pacing
from arcbridge.mux.socket_error_poll import socket_error_poll
from arcbridge.mux.stream import StreamTransport
from arcbridge.mux.streams import SessionStreams
from arcbridge.refusals import NO_REFUSAL, Refusal
from arcbridge.wire import events as ev
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk, CaSuccession, Dial, Goaway, Hello, Ledger, Move, Revoke, Status
from arcbridge.wire.session import UNNAMED, Introduction, Kind, Session, Side, State
from arcbridge.wire.state import STATE_CLOSED, STATES_OF_OPENING

FLUSH_LIMIT = 512 * 1024
"""Bytes asked of the machine at a time; between two portions the socket says whether it takes more."""

CLOSE_TIMEOUT = 3.0
"""Seconds for the last bytes and TLS's close_notify; then the socket is closed without them."""


class BaseHandler:
    """The events that a role gets; each method does nothing until overridden. All are called from the event loop.

    An exception in one of them ends that session, not the process.
    """

    def established(self, session: MuxSession) -> None:
        """HELLO was exchanged (control connection), or AUTH was accepted for the first time (session)."""

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        """Acceptor: verify, then `accept_auth` or `close`. Comes again at each renewal."""

    def auth_accepted(self, session: MuxSession, ok: AuthOk) -> None:
        """Initiator: the token was taken, first or again."""

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        """The peer opened a stream: `stream.attach(protocol)` now, or `stream.abort(code)`."""

    def dial_received(self, session: MuxSession, dial: Dial) -> None:
        """Agent: a dial request came on a control connection."""

    def status_received(self, session: MuxSession, status: Status) -> None:
        """Relay: an agent's status came on a control connection."""

    def revoke_received(self, session: MuxSession, revoke: Revoke) -> None:
        """Agent: a relay's revocation of one user came on a control connection."""

    def ledger_received(self, session: MuxSession, ledger: Ledger) -> None:
        """Entries of a relay's ledger came on a control connection, or a question about them."""

    def succession_received(self, session: MuxSession, succession: CaSuccession) -> None:
        """The CAs of the peer came on a control connection."""

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        """The peer accepts nothing new. `session_ended` follows when the session is over."""

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        """The session is over: exactly once, and last.

        Every stream got its end before, but for those that are complete and wait for a reader who paused.
        """

    def detached(self, session: MuxSession, error: ArcbridgeError) -> None:
        """The connection is lost; streams wait. Initiator: `session.migration.start` for another connection."""

    def resumed(self, session: MuxSession) -> None:
        """The session goes on over another connection."""

    def move_requested(self, session: MuxSession) -> None:
        """Initiator: the present connection goes away soon: `session.migration.start` for another one."""


class MuxSession:
    """One session or control connection over one TLS connection at a time."""

    def __init__(
        self,
        side: Side,
        kind: Kind,
        handler: BaseHandler,
        *,
        limits: Limits = DEFAULT,
        label: str = "",
        introduction: Introduction = UNNAMED,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.error_poll = socket_error_poll()
        """What polls the sockets that the session's streams are joined to."""
        self._machine = Session(
            side,
            kind,
            monotonic(),
            limits=limits,
            introduction=introduction,
            join_id=label if kind is Kind.SESSION and side is Side.INITIATOR else "",
            budget=memory.budget,
            backlog=memory.backlog,
        )
        self._sender = self._machine.sender
        self._handler = handler
        self.stats = self._machine.stats
        """Counters; plain integers."""
        self.resumption = self._machine.resumption
        """What the session is to its other end when it changes its connection: to be read; `migration` commands it."""
        self.backlog = self._machine.backlog
        """Bytes that wait towards the peer; `move` makes them a part of another backlog than the process's."""
        self.ahead = self._machine.ahead
        """Bytes of the peer that no reader has taken yet. `move` makes them a part of another backlog; while that is
        full, and this session holds `AHEAD_FREE` bytes of it, nothing is read."""
        self.streams = SessionStreams(self._machine, self.act)
        self.pacing = Pacing(self._machine, self.wake)
        self.migration = Migration(self, self._machine)
        self.connection: MuxConnection | None = None
        """The connection that carries the session, and its transport; None: none does."""
        self.transport: asyncio.Transport | None = None
        self._flush_handle: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._acting = False
        self.finished: list[StreamTransport] = []
        """Streams whose ends came: they are delivered behind the other events of a read."""
        self._rearming = False
        """Whether the deadline may have come closer."""
        self._close_timer: asyncio.TimerHandle | None = None
        self._unwritten = 0
        """Bytes that count in the backlog because the transport could not write them."""
        self.payer: LoopTime | None = None
        """To whom the loop's work for the session is charged; None: to no payer."""
        self._established: asyncio.Future[None] = self.loop.create_future()
        self._end_waiters: list[asyncio.Future[ArcbridgeError]] = []
        self._end_told: ArcbridgeError | None = None
        """Why the session is over; None: its handler was not told yet."""
        self.label = label
        """The join id: the `session` of every log line."""
        self._arm_timer()

    def __repr__(self) -> str:
        return f"<MuxSession {self.label} {self._machine!r}>"

    # -- look -----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The machine's state."""
        return self._machine.state

    @property
    def closed(self) -> bool:
        """Whether the session is over."""
        return self._machine.lifecycle.state is STATE_CLOSED

    @property
    def usable(self) -> bool:
        """Whether a new stream may be opened now."""
        return self._machine.lifecycle.state in STATES_OF_OPENING

    @property
    def peer_hello(self) -> Hello | None:
        """The peer's HELLO, once it came."""
        return self._machine.receiver.peer_hello

    def forget_cluster_ca(self) -> None:
        """Keep the peer's HELLO without the CA in it, which is most of it."""
        receiver = self._machine.receiver
        if receiver.peer_hello is not None:
            receiver.peer_hello = replace(receiver.peer_hello, cluster_ca="")

    @property
    def round_trip(self) -> float:
        """Smallest recent round trip, seconds; 0 while unknown."""
        keepalive = self._machine.lifecycle.keepalive
        return keepalive.round_trip if keepalive is not None else 0.0

    async def wait_established(self) -> None:
        """Wait until `established`; raises what ended the session if that comes first. Cancelling changes nothing."""
        await asyncio.shield(self._established)

    async def wait_ended(self) -> ArcbridgeError:
        """Wait until the session is over; return the reason. Cancelling changes nothing."""
        if self._end_told is not None:
            return self._end_told
        waiter: asyncio.Future[ArcbridgeError] = self.loop.create_future()
        self._end_waiters.append(waiter)
        try:
            return await waiter
        finally:
            self._end_waiters.remove(waiter)

    # -- command --------------------------------------------------------------------------------------------------

    def protocol(self, auth: AuthMaker | None = None) -> MuxConnection:
        """Return a protocol for `create_connection` or `connect_accepted_socket` (TLS).

        `auth`: initiator: makes the AUTH of the first flight, once the TLS stands; None: `authenticate` gives it.
        """
        return MuxConnection(self, auth)

    def authenticate(self, auth: Auth) -> None:
        """Send the token: in the first flight when called before the connection is made; later it renews."""
        self._machine.authenticate(auth)
        self.wake()

    def accept_auth(self, ok: AuthOk) -> None:
        """Accept the token (acceptor)."""
        first = not self._established.done()
        self._machine.accept_auth(ok)
        if first and not self.closed:
            self._established.set_result(None)
            self._call(self._handler.established, self)
        self.act()

    def open(self, target: str, protocol: asyncio.BaseProtocol) -> StreamTransport:
        """Open a stream and attach `protocol` to it; what is written now travels in OPEN's flight.

        Raises SessionEnded when nothing new is accepted.
        """
        try:
            stream = StreamTransport(self, self._machine, self._machine.open_stream(target))
        except SessionEnded:
            self.act()  # one that has used all ids drains from now on
            raise
        self.wake()
        stream.attach(protocol)
        return stream

    def send(self, record: Dial | Status | Revoke | Ledger | CaSuccession) -> None:
        """Control connection: send a relay's DIAL or REVOKE, an agent's STATUS, LEDGER, or SUCCESSION."""
        self._machine.send(record)
        self.wake()

    def goaway(self, code: GoawayCode, message: str = "", retry_after: int = 0) -> None:
        """Drain: nothing new; what runs may finish within the drain deadline, then the connection closes."""
        self._machine.goaway(code, message, retry_after)
        self.act()

    def close(
        self, code: GoawayCode = GoawayCode.DONE, message: str = "", retry_after: int = 0, refusal: Refusal = NO_REFUSAL
    ) -> None:
        """End now and send the reason, behind what can leave at once; every stream ends with SessionEnded. An acceptor
        refuses a token so."""
        if self._flush_handle is not None:
            self._flush()
        self._machine.close(code, message or "the session was closed", retry_after, refusal)
        self.act()

    def abort(self, error: ArcbridgeError | None = None) -> None:
        """End now, without a frame."""
        self._machine.give_up(monotonic(), error or ConnectionLost("the connection was aborted"))
        if self.transport is not None:
            self.transport.abort()
        self.act()

    # -- called by the connection ---------------------------------------------------------------------------------

    def connection_made(self, connection: MuxConnection, transport: asyncio.Transport) -> None:
        """The TLS handshake is done."""
        if self.closed:
            transport.abort()
            return
        try:
            auth = connection.make_auth()
        except ArcbridgeError as error:
            transport.abort()
            if connection.resumes:
                self.migration.settle(error)
            else:
                self.abort(error)
            return
        if connection.resumes:
            if not self.resumption.possible or auth is None:
                transport.abort()
                return
            self.drop_connection()
            self.resumption.begin(auth, monotonic(), connection.label)
            self.label = connection.label or self.label
            self._arm_timer()
        elif auth is not None:
            self._machine.authenticate(auth)
        self.set_connection(connection)
        self._flush()

    def data_received(self, view: memoryview, now: float) -> None:
        """Take bytes of the peer, valid during the call only, that came `now` (monotonic seconds)."""
        machine = self._machine
        machine.receive_data(view, now)
        pacing, ahead = self.pacing, self.ahead
        if pacing.pacer is not None and self.stats.bytes_received - pacing.received >= PACED:
            pacing.count_received(pacing.pacer, now)
        if ahead.held >= AHEAD_FREE and ahead.spent:
            pacing.hold_reading(AHEAD_PAUSE)
        if machine.events:
            self._react()
        elif self._flush_handle is None:
            self.wake()

    def set_writable(self, writable: bool) -> None:
        """Note that the transport's buffer filled up or drained."""
        self._sender.set_writable(writable)
        self._count_unwritten(0 if writable or self.transport is None else self.transport.get_write_buffer_size())
        if writable:
            self._flush()

    def connection_lost(self, connection: MuxConnection, exc: Exception | None) -> None:
        """The socket is gone."""
        if connection is not self.connection:
            return
        self.set_connection(None)
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        if self.closed:
            return
        # One that has no number is the transport's: FIN came without TLS's close_notify, as when a process has died.
        if exc is None or (isinstance(exc, ConnectionAbortedError) and exc.errno is None):
            error: ArcbridgeError = ConnectionLost("the other end closed the connection")
        else:
            error = alteration(exc) or ConnectionLost(f"the connection was lost ({type(exc).__name__})")
        error.__cause__ = exc
        self._machine.connection_lost(monotonic(), error)
        self.act()

    # -- called by the streams ------------------------------------------------------------------------------------

    def charge(self, work: Callable[[], None]) -> None:
        """Do `work`, for which the loop has just called, and charge it."""
        payer = self.payer
        if payer is None:
            work()
        else:
            began, before = monotonic(), payer.shares.total
            work()
            payer.charge(monotonic(), began, before)

    def wake(self) -> None:
        """Write what is ready, if anything is, at the end of this loop turn."""
        sender = self._sender
        if self._flush_handle is None and (sender.out or sender.has_output):
            self._flush_handle = self.loop.call_soon(self._flush)

    def act(self) -> None:
        """Act after a command: events in order, then output, then the timer."""
        self._rearming = True
        self._react()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _react(self) -> None:
        """Act on what has happened: events in order, then output; the timer, if its deadline may have come closer."""
        if self._acting:
            return  # called by what an event caused: its turn comes after those that happened before
        self._acting = True
        waiting = self._machine.events
        try:
            while waiting or self.finished:
                for event in waiting:  # one that is caused meanwhile comes behind them
                    self._dispatch(event)
                waiting.clear()
                if self.finished:
                    self.finished.pop(0).drain_inbox()
        finally:
            waiting.clear()
            self._acting = False
        if self._rearming:
            self._rearming = False
            self._arm_timer()
        if self._flush_handle is None:
            self.wake()

    def _dispatch(self, event: ev.Event) -> None:
        handler = self._handler
        if isinstance(event, ev.StreamFinished):
            if event.stream.owner is not None:
                event.stream.owner.finish_received()
            return
        if isinstance(event, ev.StreamOpened):
            stream = StreamTransport(self, self._machine, event.stream)
            self._call(handler.stream_opened, self, stream, event.target)
            return
        self._rearming = True
        if isinstance(event, ev.StreamWasReset):
            if event.stream.owner is not None:
                event.stream.owner.reset_received(event.code)
        elif isinstance(event, ev.Ended):
            self._end(event.error)
        elif isinstance(event, Auth):
            self._call(handler.auth_received, self, event)
        elif isinstance(event, AuthOk):
            if not self._established.done():
                self._established.set_result(None)
                self._call(handler.established, self)
            self._call(handler.auth_accepted, self, event)
        elif isinstance(event, Goaway):
            self._call(handler.goaway_received, self, event)
        elif isinstance(event, Dial):
            self._call(handler.dial_received, self, event)
        elif isinstance(event, ev.Detached):
            self.drop_connection()
            self._call(handler.detached, self, event.error)
        elif isinstance(event, ev.ResumeFailed):
            self.drop_connection()
            self.migration.settle(event.error)
        elif isinstance(event, ev.Resumed):
            self.migration.settle(None)
            self._call(handler.resumed, self)
        elif isinstance(event, Move):
            if event.join_id == self.label:
                self._call(handler.move_requested, self)
        elif isinstance(event, Status):
            self._call(handler.status_received, self, event)
        elif isinstance(event, Revoke):
            self._call(handler.revoke_received, self, event)
        elif isinstance(event, Ledger):
            self._call(handler.ledger_received, self, event)
        elif isinstance(event, CaSuccession):
            self._call(handler.succession_received, self, event)
        elif isinstance(event, Hello):
            if self._machine.kind is Kind.CONTROL and not self._established.done():
                self._established.set_result(None)
                self._call(handler.established, self)
        else:
            assert_never(event)

    def _call(self, method: Callable[..., None], *args: object) -> None:
        try:
            method(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # a handler's bug must not kill the loop or other sessions
            self.loop.call_exception_handler(
                {"message": f"the handler of session {self.label} failed", "exception": error}
            )
            self._machine.close(GoawayCode.INTERNAL, "an internal error; the log of this end has its cause")

    def _end(self, error: ArcbridgeError) -> None:
        self.streams.session_ended(error)
        self._flush()
        self.pacing.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.transport is not None:
            self._await_close(self.transport)
            self.transport.close()
        if not self._established.done():
            self._established.set_exception(error)
            self._established.exception()  # retrieved, so that asyncio logs nothing where no caller waits
        self.migration.settle(error)
        self.loop.call_soon(self._tell_end, error)  # behind every `connection_lost` of its streams

    def _count_unwritten(self, count: int) -> None:
        """Count `count` bytes of the transport's buffer in the backlog: all of one that is full, none of another."""
        more, self._unwritten = count - self._unwritten, count
        self._machine.backlog.add(more)

    def set_connection(self, connection: MuxConnection | None) -> None:
        """Carry the session over another connection, or over none."""
        self._count_unwritten(0)
        self.connection = connection
        self.transport = connection.transport if connection is not None else None
        self.pacing.connection_changed(self.transport)

    def drop_connection(self) -> None:
        """Leave the connection, if there is one, unread and without a frame."""
        connection = self.connection
        self.set_connection(None)
        if connection is not None:
            connection.drop()

    def _tell_end(self, error: ArcbridgeError) -> None:
        self._end_told = error
        for waiter in self._end_waiters:
            if not waiter.done():
                waiter.set_result(error)
        self._call(self._handler.session_ended, self, error)

    def _await_close(self, transport: asyncio.Transport, waiting: int | None = None) -> None:
        """Close without the peer's consent once nothing has moved for CLOSE_TIMEOUT: last bytes may need longer."""
        left = transport.get_write_buffer_size()
        if waiting is not None and (left == 0 or left >= waiting):
            self._close_timer = None
            transport.abort()
            return
        self._close_timer = self.loop.call_later(CLOSE_TIMEOUT, self._await_close, transport, left)

    def _flush(self) -> None:
        """Write what is ready, as far as the transport takes it, and charge it: `charge` in place, for each turn."""
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        sender, transport = self._sender, self.transport
        if transport is None:
            return
        payer, began = self.payer, monotonic()
        before = 0.0 if payer is None else payer.shares.total
        now = began
        while parts := sender.data_to_send(FLUSH_LIMIT, now):
            if len(parts) == 1:
                transport.write(parts[0])
            else:
                transport.writelines(parts)
            # Mostly the first portion was everything: looking is cheaper than being given an empty one.
            if not (sender.out or sender.control or sender.resend or (sender.scheduler.ready and not sender.blocked)):
                break
            if not sender.socket_writable and not sender.closed:
                break
            now = monotonic()
        pacing = self.pacing
        if pacing.pacer is not None and self.stats.bytes_sent - pacing.sent >= PACED:
            pacing.count_sent(pacing.pacer, now)
        if sender.unblocked:
            for stream in sender.take_unblocked():
                if stream.owner is not None:
                    stream.owner.resume_writer()
        if self._machine.events:
            self.loop.call_soon(self.charge, self.act)
        if payer is not None:
            payer.charge(monotonic(), began, before)

    def _arm_timer(self) -> None:
        """Move the one timer only when the deadline came closer; a wake-up too early is harmless.

        Called at the start, by the timer, and by `_react` where `_rearming` is set, but not by a flush. A deadline
        comes closer only by what sets that: the handshake's end (an event), a drain (`goaway`), a PING (sent then, or
        by the timer). Bytes that arrive move it away, which the timer finds out when it fires.
        """
        deadline = self._machine.next_deadline()
        if deadline is None or (self._timer is not None and self._timer_at <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self.loop.call_later(max(0.0, deadline - monotonic()), self.charge, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        machine = self._machine
        machine.handle_timer(monotonic())
        if machine.events or self._sender.has_output:
            self.act()
        else:
            self._arm_timer()  # too early, as mostly: bytes that came meanwhile moved the deadline


__all__ = ["BaseHandler", "MuxSession", "SessionEnded"]
