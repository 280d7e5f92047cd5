"""The asyncio face of a session or control connection: one machine, one timer, one flush per loop turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Protocol, assert_never, cast

from arcbridge.errors import ArcbridgeError, ConnectionLost, RemoteProtocolError, SessionEnded
from arcbridge.limiters import TokenBucket
from arcbridge.loop_shares import LoopTime
from arcbridge.mux import memory
from arcbridge.mux.alteration import alteration
from arcbridge.mux.connection import AuthMaker, MuxConnection
from arcbridge.mux.stream import StreamTransport
from arcbridge.refusals import NO_REFUSAL, Refusal
from arcbridge.wire import events as ev
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk, Dial, Goaway, Hello, Revoke, Status
from arcbridge.wire.sender import gathered
from arcbridge.wire.session import Kind, Session, Side, State, Stats
from arcbridge.wire.stream import Stream

FLUSH_LIMIT = 512 * 1024
"""Bytes asked of the machine at a time; between two portions the socket says whether it takes more."""

CLOSE_TIMEOUT = 3.0
"""Seconds for the last bytes and TLS's close_notify; then the socket is closed without them."""

AHEAD_FREE = 256 * 1024
"""Bytes that a session may hold for readers that stopped, however much others hold: one first window."""

AHEAD_PAUSE = 0.1
"""Seconds between two looks whether there is room again for what a peer sends ahead of its readers."""


class BaseHandler:
    """What a role is told; each method does nothing until overridden. All are called from the event loop.

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

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        """The peer accepts nothing new. `session_ended` follows when the session is over."""

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        """The session is over: exactly once, and last.

        Every stream was told before, but for those that are complete and wait for a reader who paused.
        """

    def detached(self, session: MuxSession, error: ArcbridgeError) -> None:
        """The connection is lost; streams wait. Initiator: `session.resume` on another connection."""

    def resumed(self, session: MuxSession) -> None:
        """The session goes on over another connection."""

    def move_requested(self, session: MuxSession) -> None:
        """Initiator: the present connection goes away soon; `session.resume` on another one, which replaces it."""


class Pacer(Protocol):
    """Says how fast a session may move bytes; several sessions may share one."""

    def bytes_sent(self, count: int, now: float) -> float:
        """Count bytes that left; return the seconds for which payload waits. `now`: monotonic seconds."""

    def bytes_received(self, count: int, now: float) -> float:
        """Count bytes that came; return the seconds for which no more are read."""


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
        agent: str = "",
        software: str = "",
        cluster_ca: str = "",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._machine = Session(
            side,
            kind,
            monotonic(),
            limits=limits,
            agent=agent,
            software=software,
            cluster_ca=cluster_ca,
            join_id=label if kind is Kind.SESSION and side is Side.INITIATOR else "",
            budget=memory.budget,
            backlog=memory.backlog,
        )
        self._sender = self._machine.sender
        self._handler = handler
        self._connection: MuxConnection | None = None
        self._transport: asyncio.Transport | None = None
        self._flush_handle: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._acting = False
        self._close_timer: asyncio.TimerHandle | None = None
        self._unwritten = 0
        """Bytes that count in the backlog because the transport could not write them."""
        self.pacer: Pacer | None = None
        """What bounds the bytes a second; None: nothing does."""
        self.payer: LoopTime | None = None
        """To whom the loop's work for the session is charged; None: to nobody."""
        self._sending_held: asyncio.TimerHandle | None = None
        """Runs while payload waits for the pacer."""
        self._reading_held: asyncio.TimerHandle | None = None
        """Runs while nothing is read for the pacer."""
        self._established: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[ArcbridgeError] = self._loop.create_future()
        self._attached: asyncio.Future[None] | None = None
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
        return self._machine.state is State.CLOSED

    @property
    def usable(self) -> bool:
        """Whether a new stream may be opened now."""
        return self._machine.state in (State.OPEN, State.AUTH, State.HELLO)

    @property
    def stats(self) -> Stats:
        """Counters; plain integers."""
        return self._machine.stats

    @property
    def streams_open(self) -> int:
        """Streams that are not over."""
        return len(self._machine.streams)

    @property
    def peer_hello(self) -> Hello | None:
        """The peer's HELLO, once it came."""
        return self._machine.peer_hello

    @property
    def round_trip(self) -> float:
        """Smallest recent round trip, seconds; 0 while unknown."""
        return self._machine.round_trip

    @property
    def transport(self) -> asyncio.Transport | None:
        """The connection's transport, while there is one."""
        return self._transport

    @property
    def backlog(self) -> Backlog:
        """Bytes that wait towards the peer; `move` makes them a part of another backlog than the process's."""
        return self._machine.backlog

    @property
    def ahead(self) -> Backlog:
        """Bytes of the peer that no reader has taken yet. `move` makes them a part of another backlog; while that is
        full, and this session holds `AHEAD_FREE` bytes of it, nothing is read."""
        return self._machine.ahead

    def unread(self) -> list[Stream]:
        """Return the streams of which bytes wait for their readers, and count those bytes anew."""
        self._machine.session_window.count()
        return self._machine.unread()

    def share_growth(self, user: Backlog) -> None:
        """Let streams' windows grow within `user`, as other sessions do (docs/threats.md#M22)."""
        self._machine.share_growth(user)

    def share_churn(self, allowance: TokenBucket) -> None:
        """Draw on `allowance` for streams that end before their answers, as other sessions do (docs/threats.md#M7)."""
        self._machine.share_churn(allowance)

    @property
    def resumable(self) -> bool:
        """Whether the session outlives its connection."""
        return self._machine.resumable

    @property
    def session_id(self) -> bytes:
        """What names the session to its agent; empty where it cannot be resumed."""
        return self._machine.resumption.session_id

    @property
    def resume_secret(self) -> bytes:
        """What proves that a connection is its own. Never to be logged."""
        return self._machine.resumption.secret

    @property
    def epoch(self) -> int:
        """Of the attached connection; 0 for the first."""
        return self._machine.resumption.epoch

    @property
    def resuming(self) -> Hello | None:
        """Acceptor: the HELLO of a connection that asks to resume another session; None for an ordinary one."""
        return self._machine.resumption.resuming

    async def wait_established(self) -> None:
        """Wait until `established`; raises what ended the session if that comes first. Cancelling changes nothing."""
        await asyncio.shield(self._established)

    async def wait_ended(self) -> ArcbridgeError:
        """Wait until the session is over; return the reason. Cancelling changes nothing."""
        return await asyncio.shield(self._ended)

    def stalled(self, before: float) -> list[Stream]:
        """Return the streams of which nothing was taken since a moment before `before` (monotonic seconds), though
        bytes wait."""
        return self._machine.stalled(before)

    # -- command --------------------------------------------------------------------------------------------------

    def reset(self, stream: Stream, code: ResetCode) -> None:
        """Reset a stream, be it one whose application is done with it while bytes of it wait."""
        if stream.owner is not None:
            cast(StreamTransport, stream.owner).abort(code)
        else:
            self._machine.stream_table.reset(stream, code)
            self.act()

    def resume(self, auth: Auth | AuthMaker, label: str = "") -> MuxConnection:
        """Return a protocol (initiator) for `create_connection`; once its TLS stands it takes the session over.

        The connection that is attached until then, if any, goes on until that moment and is dropped unread. Then
        await `wait_attached`. `label` is the new connection's join id.
        """
        self._attached = self._loop.create_future()
        return MuxConnection(self, auth, resumes=True, label=label)

    async def wait_attached(self) -> None:
        """Wait until the connection of the last `resume` carries the session.

        Raises ConnectionLost or SessionEnded: the session waits for another try, unless it is `closed`. Cancelling
        gives the connection up.
        """
        waiting = self._attached
        if waiting is None:
            return
        try:
            await waiting
        except asyncio.CancelledError:
            if self._connection is not None and self.state is State.DETACHED:
                self._machine.connection_lost(monotonic(), ConnectionLost("given up"))
                self.act()
            raise

    def take_over(self, newcomer: MuxSession, ok: AuthOk) -> None:
        """Acceptor: go on over the connection of `newcomer`, whose right to this session was verified.

        `newcomer` ends; so does a connection that is still attached, unread. Raises LocalProtocolError when the
        newcomer's epoch is not higher or this session is over, RemoteProtocolError when the counts contradict each
        other: both sessions are over then.
        """
        hello, connection = newcomer.resuming, newcomer._connection
        if hello is None or connection is None or connection.transport is None:
            raise ConnectionLost("the connection that was to resume the session is gone")
        try:
            self._machine.resumption.take_over(hello, ok, monotonic())
        except RemoteProtocolError as error:
            newcomer.close(GoawayCode.PROTOCOL, error.message)
            self._drop_connection()
            self.act()
            raise
        self._drop_connection()
        newcomer._connection = newcomer._transport = None
        newcomer._machine.resumption.hand_over(monotonic())
        newcomer.act()
        connection.move_to(self)
        self._connection, self._transport = connection, connection.transport
        self.label = newcomer.label
        self.act()

    def ask_to_move(self) -> None:
        """Acceptor: ask the client for another connection, because this one goes away soon."""
        self._machine.resumption.ask_to_move(self.label)
        self.wake()

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
        stream = StreamTransport(self, self._machine, self._machine.open_stream(target))
        self.wake()
        stream.attach(protocol)
        return stream

    def send_dial(self, dial: Dial) -> None:
        """Relay: send a dial request."""
        self._machine.send_dial(dial)
        self.wake()

    def send_status(self, status: Status) -> None:
        """Agent: send a status."""
        self._machine.send_status(status)
        self.wake()

    def reset_streams(self, code: ResetCode) -> None:
        """End all streams with a RESET. The session goes on, unless these are more than may end so at once
        (docs/threats.md#M7)."""
        for stream in list(self._machine.streams.values()):
            self.reset(stream, code)

    def send_revoke(self, revoke: Revoke) -> None:
        """Relay: send one user's revocation."""
        self._machine.send_revoke(revoke)
        self.wake()

    def goaway(self, code: GoawayCode, message: str = "", retry_after: int = 0) -> None:
        """Drain: nothing new; what runs may finish within the drain deadline, then the connection closes."""
        self._machine.goaway(code, message, retry_after)
        self.act()

    def close(
        self,
        code: GoawayCode = GoawayCode.DONE,
        message: str = "",
        retry_after: int = 0,
        refusal: Refusal = NO_REFUSAL,
    ) -> None:
        """End now and send the reason; every stream ends with SessionEnded. An acceptor refuses a token so."""
        self._machine.close(code, message or "the session was closed", retry_after, refusal)
        self.act()

    def abort(self, error: ArcbridgeError | None = None) -> None:
        """End now without a word."""
        self._machine.give_up(monotonic(), error or ConnectionLost("the connection was aborted"))
        if self._transport is not None:
            self._transport.abort()
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
                self._tell_attached(error)
            else:
                self.abort(error)
            return
        if connection.resumes:
            if not self.resumable or auth is None:
                transport.abort()
                return
            self._drop_connection()
            self._machine.resumption.begin(auth, monotonic(), connection.label)
            self.label = connection.label or self.label
            self._arm_timer()
        elif auth is not None:
            self._machine.authenticate(auth)
        self._connection, self._transport = connection, transport
        self._flush()

    def data_received(self, view: memoryview) -> None:
        """Take bytes of the peer, valid during the call only."""
        machine, now = self._machine, monotonic()
        machine.receive_data(view, now)
        if self.pacer is not None and (wait := self.pacer.bytes_received(len(view), now)):
            self._hold_reading(wait)
        if machine.ahead.held >= AHEAD_FREE and machine.ahead.spent:
            self._hold_reading(AHEAD_PAUSE)
        if machine.events:
            self.act()
        elif self._sender.has_output and self._flush_handle is None:
            self._flush_handle = self._loop.call_soon(self.charge, self._flush)

    def set_writable(self, writable: bool) -> None:
        """Note that the transport's buffer filled up or drained."""
        self._sender.set_writable(writable)
        self._count_unwritten(0 if writable or self._transport is None else self._transport.get_write_buffer_size())
        if writable:
            self.charge(self._flush)

    def connection_lost(self, connection: MuxConnection, exc: Exception | None) -> None:
        """The socket is gone."""
        if connection is not self._connection:
            return
        self._count_unwritten(0)
        self._connection = None
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        self._transport = None
        if self.closed:
            return
        if exc is None:
            self._machine.receive_eof(monotonic())
        else:
            error = alteration(exc) or ConnectionLost(f"the connection was lost ({type(exc).__name__})")
            error.__cause__ = exc
            self._machine.connection_lost(monotonic(), error)
        self.act()

    # -- called by the streams ------------------------------------------------------------------------------------

    def charge(self, work: Callable[[], None]) -> None:
        """Do `work`, for which the loop has just called, and charge it."""
        if self.payer is None:
            work()
        else:
            self.payer.run(work)

    def wake(self) -> None:
        """Write what is ready at the end of this loop turn."""
        if self._flush_handle is None:
            self._flush_handle = self._loop.call_soon(self.charge, self._flush)

    def hold(self, seconds: float) -> None:
        """Move no payload for a while, in either direction; nothing is lost."""
        self._hold_reading(seconds)
        self._hold_sending(seconds)

    def act(self) -> None:
        """Act after a receive or command: events in order, then output, then the timer."""
        if self._acting:
            return  # called by what an event caused: its turn comes after those that happened before
        self._acting = True
        try:
            while events := self._machine.events_received():
                for event in events:
                    self._dispatch(event)
        finally:
            self._acting = False
        self._arm_timer()
        self.wake()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _dispatch(self, event: ev.Event) -> None:
        handler = self._handler
        if isinstance(event, ev.StreamFinished):
            if event.stream.owner is not None:
                cast(StreamTransport, event.stream.owner).finish_received()
        elif isinstance(event, ev.StreamWasReset):
            if event.stream.owner is not None:
                cast(StreamTransport, event.stream.owner).reset_received(event.code)
        elif isinstance(event, ev.StreamOpened):
            stream = StreamTransport(self, self._machine, event.stream)
            self._call(handler.stream_opened, self, stream, event.target)
        elif isinstance(event, ev.Ended):
            self._end(event.error)
        elif isinstance(event, ev.AuthReceived):
            self._call(handler.auth_received, self, event.auth)
        elif isinstance(event, ev.AuthAccepted):
            if not self._established.done():
                self._established.set_result(None)
                self._call(handler.established, self)
            self._call(handler.auth_accepted, self, event.ok)
        elif isinstance(event, ev.GoawayReceived):
            self._call(handler.goaway_received, self, event.goaway)
        elif isinstance(event, ev.DialReceived):
            self._call(handler.dial_received, self, event.dial)
        elif isinstance(event, ev.Detached):
            self._drop_connection()
            self._call(handler.detached, self, event.error)
        elif isinstance(event, ev.ResumeFailed):
            self._drop_connection()
            self._tell_attached(event.error)
        elif isinstance(event, ev.Resumed):
            self._tell_attached(None)
            self._call(handler.resumed, self)
        elif isinstance(event, ev.MoveRequested):
            if event.join_id == self.label:
                self._call(handler.move_requested, self)
        elif isinstance(event, ev.StatusReceived):
            self._call(handler.status_received, self, event.status)
        elif isinstance(event, ev.RevokeReceived):
            self._call(handler.revoke_received, self, event.revoke)
        elif isinstance(event, ev.HelloReceived):
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
            self._loop.call_exception_handler(
                {"message": f"the handler of session {self.label} failed", "exception": error}
            )
            self._machine.close(GoawayCode.INTERNAL, "an internal error; the log of this end has its cause")

    def _end(self, error: ArcbridgeError) -> None:
        for stream in list(self._machine.streams.values()):
            if stream.owner is not None:
                cast(StreamTransport, stream.owner).session_ended(error)
        self._machine.streams.clear()
        self._flush()
        self.pacer = None
        if self._reading_held is not None and self._transport is not None:
            self._transport.resume_reading()  # the peer's close_notify may have come already
        for timer in (self._timer, self._sending_held, self._reading_held):
            if timer is not None:
                timer.cancel()
        self._timer = self._sending_held = self._reading_held = None
        if self._transport is not None:
            self._await_close(self._transport)
            self._transport.close()
        if not self._established.done():
            self._established.set_exception(error)
            self._established.exception()  # retrieved, so that asyncio logs nothing where no caller waits
        self._tell_attached(error)
        self._loop.call_soon(self._tell_end, error)  # behind every `connection_lost` of its streams

    def _count_unwritten(self, count: int) -> None:
        """Count `count` bytes of the transport's buffer in the backlog: all of one that is full, none of another."""
        more, self._unwritten = count - self._unwritten, count
        self._machine.backlog.add(more)

    def _drop_connection(self) -> None:
        self._count_unwritten(0)
        connection, self._connection, self._transport = self._connection, None, None
        if connection is not None:
            connection.drop()

    def _tell_attached(self, error: ArcbridgeError | None) -> None:
        waiting = self._attached
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(error)
            waiting.exception()  # retrieved, so that asyncio logs nothing where no caller waits

    def _tell_end(self, error: ArcbridgeError) -> None:
        self._ended.set_result(error)
        self._call(self._handler.session_ended, self, error)

    def _await_close(self, transport: asyncio.Transport, waiting: int | None = None) -> None:
        """Close without the peer's consent once nothing has moved for CLOSE_TIMEOUT: last bytes may need longer."""
        left = transport.get_write_buffer_size()
        if waiting is not None and (left == 0 or left >= waiting):
            self._close_timer = None
            transport.abort()
            return
        self._close_timer = self._loop.call_later(CLOSE_TIMEOUT, self._await_close, transport, left)

    def _flush(self) -> None:
        """Write what is ready, as far as the transport takes it."""
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        sender, transport = self._sender, self._transport
        if transport is None:
            return
        before = self._machine.stats.bytes_sent
        while parts := sender.data_to_send(FLUSH_LIMIT, monotonic()):
            if len(parts) == 1:
                transport.write(parts[0])
            else:
                transport.writelines(gathered(parts))
            # Mostly the first portion was everything: asking is cheaper than being given an empty one.
            if not sender.has_output or (not sender.socket_writable and not sender.closed):
                break
        if self.pacer is not None:
            wait = self.pacer.bytes_sent(self._machine.stats.bytes_sent - before, monotonic())
            if wait:
                self._hold_sending(wait)
        for stream in sender.take_unblocked():
            if stream.owner is not None:
                cast(StreamTransport, stream.owner).resume_writer()
        if self._machine.events:
            self._loop.call_soon(self.charge, self.act)

    def _hold_sending(self, wait: float) -> None:
        """Send no payload for a while."""
        if self._sending_held is None and not self.closed:
            self._sender.set_paced(True)
            self._sending_held = self._loop.call_later(wait, self.charge, self._send_on)

    def _send_on(self) -> None:
        """Payload has waited for the pacer."""
        self._sending_held = None
        if self.pacer is not None and (wait := self.pacer.bytes_sent(0, monotonic())):
            self._sending_held = self._loop.call_later(wait, self.charge, self._send_on)
            return
        self._sender.set_paced(False)
        self._flush()

    def _hold_reading(self, wait: float) -> None:
        """Read nothing for a while: the peer's bytes wait in the path, and its sender adapts to that."""
        if self._reading_held is None and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._reading_held = self._loop.call_later(wait, self._read_on, self._transport)

    def _read_on(self, transport: asyncio.Transport) -> None:
        """Reading has waited for the pacer. It goes on whatever the pacer would say now: PINGs have to be answered. It
        does not while the session is too far ahead of its readers: there is no room for what would come.

        Another connection that carries the session by now was never held.
        """
        self._reading_held = None
        if transport is self._transport and not transport.is_closing():
            ahead = self._machine.ahead
            self._machine.session_window.count()
            if ahead.held >= AHEAD_FREE and ahead.spent:
                self._reading_held = self._loop.call_later(AHEAD_PAUSE, self._read_on, transport)
                return
            transport.resume_reading()

    def _arm_timer(self) -> None:
        """Move the one timer only when the deadline came closer; a wake-up too early is harmless.

        Called at the start, by `act` and, through it, by the timer, but not by a flush. A deadline comes closer only
        by what ends in one of these: the handshake's end (an event), a drain (`goaway`), a PING (sent then, or by the
        timer). Bytes that arrive move it away, which the timer finds out when it fires.
        """
        deadline = self._machine.next_deadline()
        if deadline is None or (self._timer is not None and self._timer_at <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_later(max(0.0, deadline - monotonic()), self.charge, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        machine = self._machine
        machine.handle_timer(monotonic())
        if machine.events or self._sender.has_output:
            self.act()
        else:
            self._arm_timer()  # too early, as mostly: bytes that came meanwhile moved the deadline

    def stream_dropped(self, stream: Stream) -> None:
        """A stream's transport is done with it."""
        stream.owner = None


__all__ = ["BaseHandler", "MuxSession", "SessionEnded"]
