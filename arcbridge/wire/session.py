"""The machine of one session, or of one control connection: bytes in, decisions out.

It knows no socket, no clock and no role beyond its side: `now` is monotonic seconds and an argument. `Session` joins
the parts that do the work and keeps none of their state: `Lifecycle` (states and deadlines, with their table),
`Sender`, `Receiver`, `StreamTable` and `Resumption`. The shell uses them directly for what moves bytes.

Order of calls. After each *receive* or *command* the shell must: act on `events`, in order, and clear them, resume
the writers of `sender.take_unblocked()`, write what `sender.data_to_send()` gives, and re-arm its one timer at
`next_deadline()`.

Whose mistake is whose: the caller's raises `LocalProtocolError` and changes nothing; the peer's against the session
becomes a GOAWAY and `Ended`; the peer's within one stream becomes a RESET; a race is settled, counted and dropped.

Everything after the handshake (HELLO and the first AUTH, or AUTH_OK) is one byte sequence per direction, counted
from 0: `sent` and `received` are those counts, told to the peer by ACK, PING and PONG.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from arcbridge.errors import ArcbridgeError, ConnectionLost, LocalProtocolError, RemoteProtocolError, SessionEnded
from arcbridge.refusals import NO_REFUSAL, Refusal
from arcbridge.wire import events as ev
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.congestion import CongestionWindow
from arcbridge.wire.context import SessionContext
from arcbridge.wire.decoder import Decoder
from arcbridge.wire.frame_handlers import FrameHandlers
from arcbridge.wire.frames import FRAMES, MAY_SEND, VERSION, FrameType, GoawayCode, frame, record_frame
from arcbridge.wire.lifecycle import Deadline, Lifecycle, Violation
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.receiver import Receiver
from arcbridge.wire.records import Auth, AuthOk, CaSuccession, Dial, Goaway, Hello, Ledger, Revoke, Status
from arcbridge.wire.replay import Budget, Replay
from arcbridge.wire.resumption import Resumption
from arcbridge.wire.sender import Sender
from arcbridge.wire.session_window import SessionWindow
from arcbridge.wire.state import STATE_CLOSED, STATE_DETACHED, STATES_OF_OPENING, Kind, Side, State, Stats
from arcbridge.wire.stream import Stream
from arcbridge.wire.stream_table import LAST_ID, StreamTable

MAX_MESSAGE = 900
"""Characters of a GOAWAY's sentence."""

_CONTROL_RECORDS = {
    Dial: FrameType.DIAL,
    Status: FrameType.STATUS,
    Revoke: FrameType.REVOKE,
    Ledger: FrameType.LEDGER,
    CaSuccession: FrameType.SUCCESSION,
}


@dataclass(frozen=True, slots=True)
class Introduction:
    """What an end says of itself in its HELLO; `records.Hello` has what the fields mean."""

    agent: str = ""
    software: str = ""
    cluster_ca: str = ""
    features: str = ""
    """Words besides those that the session has by itself."""


UNNAMED: Final = Introduction()


class Session:
    """One side of a session or control connection. See the module's docstring for the order of calls."""

    def __init__(
        self,
        side: Side,
        kind: Kind,
        now: float,
        *,
        limits: Limits = DEFAULT,
        introduction: Introduction = UNNAMED,
        join_id: str = "",
        budget: Budget | None = None,
        backlog: Backlog | None = None,
    ) -> None:
        """`budget` is what all sessions of the process may keep of what they sent; none: only this one's own limit.

        `backlog` is that of the process, in which what waits towards the peer counts.
        """
        budget = budget or Budget(2 * (limits.replay + limits.session_window))
        in_session = kind is Kind.SESSION
        resumable = in_session and bool(limits.replay)
        self.side = side
        self.kind = kind
        self.limits = limits
        self._context = context = SessionContext(self, side, kind, limits, now, backlog)
        self.stats = context.stats
        self.events = context.events
        """What happened since the shell asked last."""
        self.backlog = context.backlog
        """Bytes that wait towards the peer: in its streams, and sent but not confirmed."""
        self.ahead = context.ahead
        """Bytes of the peer that no reader has taken yet, as of the latest count (`SessionWindow.count`)."""
        self.streams = context.streams
        """Streams that are not over, by id."""
        self.lifecycle = Lifecycle(kind, limits, now)
        self.sender = Sender(
            context,
            history=Replay(limits.replay, budget, context.backlog) if resumable else None,
            congestion=CongestionWindow(limits.under_way, now=now) if in_session and limits.under_way else None,
            handshake_done=side is Side.INITIATOR,
        )
        decoder = Decoder()
        self.session_window = SessionWindow(context, self.sender, budget)
        self.stream_table = StreamTable(context, self.lifecycle, self.sender, decoder, self.session_window, budget)
        self.receiver = Receiver(context, self.lifecycle, self.sender, decoder, self.session_window, self.stream_table)
        hello = Hello(
            VERSION,
            VERSION,
            " ".join([*(["resume"] if resumable else ()), *introduction.features.split()]),
            limits.stream_window,
            limits.max_streams,
            introduction.agent,
            introduction.software,
            cluster_ca=introduction.cluster_ca,
            join_id=join_id,
        )
        self.resumption = Resumption(context, self.lifecycle, self.sender, self.receiver, hello)
        self.receiver.handlers = FrameHandlers(
            context, self.lifecycle, self.sender, self.receiver, self.stream_table, self.resumption
        )
        self._hello = record_frame(FrameType.HELLO, hello)
        self._hello_sent = False
        if side is Side.INITIATOR:
            self.say_hello()

    def __repr__(self) -> str:
        sender, received = self.sender, self.receiver.received
        return (
            f"<Session {self.kind.value} {self.side.name.lower()} {self.state.value} streams={len(self.streams)} "
            f"sent={sender.sent} received={received} credit={sender.credit} blocked={sender.blocked_by!r}>"
        )

    # -- receive: called by the socket and the timer ----------------------------------------------------------------

    def receive_data(self, data: memoryview, now: float) -> None:
        """Take bytes of the peer; `data` is valid during the call only.

        Payload goes straight to its stream's sink; everything else becomes events. Never raises for what the peer
        sent: a violation closes the machine.
        """
        lifecycle, receiver, resumption = self.lifecycle, self.receiver, self.resumption
        if lifecycle.state is STATE_CLOSED:
            return
        self._context.now = now
        self.stats.bytes_received += len(data)
        if lifecycle.keepalive is not None:
            lifecycle.keepalive.last_received = now
        try:
            if resumption.handshake is not None:
                data = resumption.greet(data)
            elif lifecycle.state is STATE_DETACHED:
                return  # of a connection that was given up
            receiver.decoder.feed(data, receiver)
            if resumption.resuming is not None and receiver.received:
                raise Violation(GoawayCode.PROTOCOL, "bytes of the session before it was resumed")
        except Violation as violation:
            self.fail(violation.code, violation.message)
        except RemoteProtocolError as error:
            self.fail(GoawayCode.PROTOCOL, error.message)
        else:
            unreported = receiver.decoder.position - receiver.reported_position
            if unreported >= self.limits.ack_every and lifecycle.authenticated:
                receiver.acknowledge()

    def connection_lost(self, now: float, error: ArcbridgeError) -> None:
        """Wait for another connection, or end the session where that is not possible: this one is gone.

        Without a GOAWAY before it that is a loss, never an end in order, also where the peer closed the connection.
        """
        self._context.now = now
        self.resumption.connection_lost(error)

    def give_up(self, now: float, error: ArcbridgeError) -> None:
        """End without a word, whatever the connection: nothing is resumed."""
        self._context.now = now
        self.end(error)

    def handle_timer(self, now: float) -> None:
        """Act on every deadline that has passed; a call too early changes nothing."""
        lifecycle, limits = self.lifecycle, self.limits
        if lifecycle.state is STATE_CLOSED:
            return
        self._context.now = now
        deadline = lifecycle.due(now)
        if deadline is Deadline.RESUMPTION:
            waited = f"{limits.detached_timeout:.0f} s"
            self.end(SessionEnded(GoawayCode.GONE, f"the connection was lost and not resumed within {waited}"))
        elif deadline is Deadline.HANDSHAKE and self.resumption.handshake is not None:
            self.resumption.failed(ConnectionLost(f"no answer within {limits.handshake_timeout:.0f} s"))
        elif deadline is Deadline.HANDSHAKE:
            waiting_for = "HELLO" if lifecycle.state is State.HELLO else "authentication"
            self.fail(GoawayCode.TIMEOUT, f"no {waiting_for} within {limits.handshake_timeout:.0f} s")
        elif deadline is Deadline.DRAIN:
            self.stream_table.cancel_all()
            self._finish_drain()
        elif lifecycle.keepalive is not None and lifecycle.state is not STATE_DETACHED:
            reason = lifecycle.keepalive.dead(now, answers=self.receiver.received >= self.receiver.answers_from)
            if reason is not None:
                self.resumption.connection_lost(ConnectionLost(f"the connection is dead: {reason}"))
            elif lifecycle.keepalive.ping_due(now):
                self.send_ping()

    # -- command: called by the owner of the session or of a stream -------------------------------------------------

    def authenticate(self, auth: Auth) -> None:
        """Initiator: send the token, first or again. The first goes out with HELLO, before anything else."""
        self._require(self.kind is Kind.SESSION and self.side is Side.INITIATOR, "only the initiator authenticates")
        if self.state is STATE_CLOSED:
            return
        body = record_frame(FrameType.AUTH, auth)
        if self.lifecycle.auth_sent:
            self.sender.queue_control(body)
            return
        self.lifecycle.auth_sent = True
        self.sender.prelude.append(body)
        self.session_window.open()

    def accept_auth(self, ok: AuthOk) -> None:
        """Acceptor: accept the token. Streams opened meanwhile become visible now."""
        if self.state is STATE_CLOSED:
            return
        self._require(self.side is Side.ACCEPTOR and self.lifecycle.auth_sent, "no AUTH is waiting for an answer")
        self._require(self.resumption.resuming is None, "a connection that resumes is taken over, not accepted")
        body = record_frame(FrameType.AUTH_OK, ok)
        if self.lifecycle.authenticated:
            self.sender.queue_control(body)
            return
        self.resumption.learn_secret(ok, self.receiver.peer_hello)
        self.sender.prelude.append(body)
        self.session_window.open()
        self.establish()
        self.stream_table.tell_early()

    def open_stream(self, target: str) -> Stream:
        """Open a stream; its DATA may follow at once. Raises SessionEnded when nothing new is accepted."""
        if self.kind is not Kind.SESSION:
            raise LocalProtocolError("a control connection has no streams")
        lifecycle = self.lifecycle
        if lifecycle.state not in STATES_OF_OPENING:
            if lifecycle.state is STATE_CLOSED:
                raise SessionEnded(GoawayCode.DONE, "the session is over")
            if lifecycle.state is STATE_DETACHED:
                raise SessionEnded(GoawayCode.UNAVAILABLE, "the session has no connection now")
            raise SessionEnded(GoawayCode.DRAINING, "the session accepts no new streams")
        if not (lifecycle.auth_sent or lifecycle.authenticated):
            raise LocalProtocolError("a stream before authentication")
        if self.stream_table.next_id > LAST_ID:  # the next stream needs another session (RFC 9113 §5.1.1)
            self.goaway(GoawayCode.DONE, "the session has used all ids of streams")
        peer = self.receiver.peer_hello
        return self.stream_table.open(target, peer.max_streams if peer is not None else None)

    def send(self, record: Dial | Status | Revoke | Ledger | CaSuccession) -> None:
        """Control connection: send a relay's DIAL or REVOKE, an agent's STATUS, LEDGER, or the CAs of either.

        REVOKE and a LEDGER with entries wait behind the frames that are finished and not among the bounded control
        frames: a whole list leaves at once, and the list bounds it. The question for a ledger goes before a STATUS.
        """
        kind = _CONTROL_RECORDS[type(record)]
        sender = FRAMES[kind].sender
        self._require((self.kind, self.side) in MAY_SEND[sender], f"{kind.name} is sent by the {sender.value}")
        asks = isinstance(record, Ledger) and (record.wanted or record.digest)
        queue = self.sender.queue if isinstance(record, Revoke | Ledger) and not asks else self.sender.queue_control
        queue(record_frame(kind, record))

    def goaway(self, code: GoawayCode, message: str = "", retry_after: int = 0) -> None:
        """Drain: nothing new is accepted, what runs may finish within the drain deadline."""
        if self.state is STATE_CLOSED or self.lifecycle.goaway_sent:
            return
        # Behind the OPENs that are queued: a peer that has no stream yet would end the session before they come.
        self._say_goaway(code, message, retry_after, in_turn=True, final=False)
        self.lifecycle.drain()
        if self.kind is Kind.SESSION:
            self.lifecycle.await_streams(self._context.now)
            self.finish_drain_if_idle()

    def close(self, code: GoawayCode, message: str, retry_after: int = 0, refusal: Refusal = NO_REFUSAL) -> None:
        """End the session now: GOAWAY, and every stream ends with its reason."""
        if self.state is STATE_CLOSED:
            return
        self._say_goaway(code, message, retry_after, refusal)
        self.end(SessionEnded(code, message, retry_after=retry_after or None, refusal=refusal))

    # -- collect: called by the shell after any of the above --------------------------------------------------------

    def next_deadline(self) -> float | None:
        """Return when `handle_timer` is needed next; None when closed."""
        return self.lifecycle.next_deadline()

    # -- look: no effect --------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state; `wire.lifecycle` has the table."""
        return self.lifecycle.state

    # -- called by the parts (`wire.context.Owner`) -------------------------------------------------------------------

    def say_hello(self) -> None:
        """Queue HELLO, once."""
        if not self._hello_sent:
            self._hello_sent = True
            self.sender.prelude.append(self._hello)

    def establish(self) -> None:
        """Open the session: the handshake is complete."""
        self.lifecycle.establish(self._context.now)
        self.sender.handshake_done = True
        self.send_ping()  # at once: windows grow by the round trip, so it must be known early

    def send_ping(self) -> None:
        """Queue a PING; before the handshake is complete it changes nothing.

        It confirms what has arrived, too: an idle session needs no ACK.
        """
        if self.lifecycle.keepalive is not None:
            self.sender.ping(self.lifecycle.keepalive.ping(self._context.now), self.receiver.report())

    def acknowledged(self, received: int) -> None:
        """Note that the peer has `received` bytes of this end's sequence."""
        sender, keepalive = self.sender, self.lifecycle.keepalive
        if received > sender.sent:
            raise Violation(GoawayCode.PROTOCOL, "the other end confirms bytes that were never sent")
        if received > sender.peer_received:
            trip = sender.confirmed(received)
            if keepalive is not None:
                keepalive.last_progress = self._context.now
                if trip:
                    keepalive.sample(trip, self._context.now)
            if self.lifecycle.draining:
                self.finish_drain_if_idle()

    def stream_sent(self, stream: Stream) -> None:
        """Settle a finishing stream whose last bytes leave, with FIN behind them."""
        self.stream_table.forget_if_over(stream)

    def stream_cut(self, stream: Stream) -> None:
        """Settle a stream that was cut and whose last bytes leave, with RESET behind them."""
        self.stream_table.was_cut(stream)

    def fail(self, code: GoawayCode, message: str) -> None:
        """End the session with a GOAWAY, because the peer broke the protocol or a limit."""
        if self.state is STATE_CLOSED:
            return
        self._say_goaway(code, message, 0)
        error: ArcbridgeError = RemoteProtocolError(f"the other end broke the protocol: {message}")
        if code is GoawayCode.TIMEOUT:
            error = SessionEnded(code, message)
        self.end(error)

    def finish_drain_if_idle(self) -> None:
        """End a draining session whose last stream is over."""
        lifecycle = self.lifecycle
        if not lifecycle.draining or self.streams or self.kind is not Kind.SESSION:
            return
        if (
            lifecycle.state is STATE_DETACHED
            or self.side is Side.INITIATOR
            or lifecycle.peer_goaway is not None
            or self._all_confirmed
        ):
            self._finish_drain()

    def end(self, error: ArcbridgeError) -> None:
        """End the session, once. The streams stay in `streams` for the shell to end; payload that waits is dropped."""
        lifecycle = self.lifecycle
        if lifecycle.state is STATE_CLOSED:
            return
        detached = lifecycle.state is STATE_DETACHED
        lifecycle.close(error)
        if lifecycle.goaway_sent:
            self.say_hello()  # a peer that sent no HELLO is answered with one, so that it can read why
        self.resumption.abandon_handshake()
        drained = isinstance(error, SessionEnded) and error.code == GoawayCode.DRAINING
        self.sender.close(keep_frames=drained and not detached)
        if detached:  # an acceptor that goes on already would read a frame as the rest of one that the loss has cut
            self.sender.prelude.clear()
            self.sender.control.clear()
        self.stream_table.close()
        for stream in self.streams.values():
            self._context.backlog.remove(stream.held)
            stream.held = 0
        self._context.backlog.move(None)
        self.events.append(ev.Ended(error))

    # -- inside -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _require(condition: bool, message: str) -> None:
        if not condition:
            raise LocalProtocolError(message)

    @property
    def _all_confirmed(self) -> bool:
        """Whether the peer has everything, so that no cut can take the end of a stream with it."""
        sender = self.sender
        return not self.resumption.possible or (sender.peer_received >= sender.sent and not sender.has_output)

    def _finish_drain(self) -> None:
        if self.state is STATE_CLOSED:
            return
        if not self.lifecycle.goaway_sent:
            self._say_goaway(GoawayCode.DONE, "", 0, in_turn=True)  # behind the last FIN
        self.end(SessionEnded(GoawayCode.DRAINING, "the session was drained"))

    def _say_goaway(
        self,
        code: GoawayCode,
        message: str,
        retry_after: int,
        refusal: Refusal = NO_REFUSAL,
        *,
        in_turn: bool = False,
        final: bool = True,
    ) -> None:
        """In turn: behind the frames that are queued. Not final: what runs may finish."""
        self.lifecycle.goaway_sent = True
        goaway = Goaway(
            self.stream_table.last_peer_id,
            code,
            message[:MAX_MESSAGE],
            retry_after,
            final,
            refusal.rule,
            refusal.wanted,
        )
        body = frame(FrameType.GOAWAY, 0, goaway.encode())
        if in_turn:
            self.sender.queue(body)
        else:
            self.sender.control.append(body)  # whatever the limit of control bytes


__all__ = ["Kind", "Session", "Side", "State", "Stats"]
