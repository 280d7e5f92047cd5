"""Applies each of the peer's frames other than DATA to a session, in each of its states.

A frame that breaks the session's rules raises `Violation`, which becomes a GOAWAY in `Session.receive_data`; one that
breaks a stream's rules resets that stream; a race is settled, counted and dropped. Who may send a type is
`wire.frames.FRAMES`' word: a type that this peer may not send has a handler that refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

from arcbridge.wire.context import SessionContext
from arcbridge.wire.frames import (
    FIRST_CREDIT,
    FRAMES,
    MAY_SEND,
    PING_BODY,
    U32,
    U64,
    VERSION,
    FrameType,
    From,
    GoawayCode,
    ResetCode,
)
from arcbridge.wire.lifecycle import DRAIN_CODES, Change, Lifecycle, Violation, ended_by
from arcbridge.wire.receiver import Receiver
from arcbridge.wire.records import Auth, AuthOk, CaSuccession, Dial, Goaway, Hello, Ledger, Move, Open, Revoke, Status
from arcbridge.wire.resumption import Resumption
from arcbridge.wire.sender import Sender
from arcbridge.wire.state import Kind, Side
from arcbridge.wire.stream import RECEIVE_FINISHED
from arcbridge.wire.stream_table import StreamTable
from arcbridge.wire.window import MAX_CREDIT

FrameHandler = Callable[["FrameHandlers", int, bytes], None]
"""Acts on one whole frame: stream id, body."""


@lru_cache(maxsize=64)
def _target_of(body: bytes) -> str:
    """Return what an OPEN names: the same few, again and again."""
    return Open.decode(body).target


def misplaced(kind: FrameType, connection: Kind) -> FrameHandler:
    """Make the handler of a type that this peer may not send."""
    for_sessions = FRAMES[kind].sender in (From.SESSION_BOTH, From.SESSION_ACCEPTOR)
    where = "on a control connection" if for_sessions and connection is Kind.CONTROL else "from the wrong side"

    def refuse(_handlers: FrameHandlers, _stream_id: int, _body: bytes) -> None:
        raise Violation(GoawayCode.PROTOCOL, f"{kind.name} {where}")

    return refuse


class FrameHandlers:
    """The handlers of one session."""

    def __init__(
        self,
        context: SessionContext,
        lifecycle: Lifecycle,
        sender: Sender,
        receiver: Receiver,
        streams: StreamTable,
        resumption: Resumption,
    ) -> None:
        self._context = context
        self._lifecycle = lifecycle
        self._sender = sender
        self._receiver = receiver
        self._streams = streams
        self._resumption = resumption
        self.table: dict[int, FrameHandler] = table_of(context.kind, context.side)

    # -- handshake --------------------------------------------------------------------------------------------------

    def _on_hello(self, _stream_id: int, body: bytes) -> None:
        context, receiver = self._context, self._receiver
        if receiver.peer_hello is not None:
            raise Violation(GoawayCode.PROTOCOL, "a second HELLO")
        hello = Hello.decode(body)
        if not hello.least <= VERSION <= hello.version:
            raise Violation(
                GoawayCode.VERSION,
                f"the other end speaks protocol versions {hello.least} to {hello.version}, this one only {VERSION}: "
                "upgrade the older of the two",
            )
        if not FIRST_CREDIT <= hello.stream_window <= MAX_CREDIT:
            raise Violation(GoawayCode.PROTOCOL, f"a first stream window of {hello.stream_window} bytes")
        receiver.peer_hello = hello
        self._streams.set_first_credit(hello.stream_window)
        context.events.append(hello)
        if hello.session_id:
            # Nothing is answered until the session that is meant takes the connection over, or it is refused.
            if context.side is not Side.ACCEPTOR or context.kind is not Kind.SESSION:
                raise Violation(GoawayCode.PROTOCOL, "a HELLO that resumes, from the wrong side")
            self._resumption.resuming = hello
        else:
            context.owner.say_hello()
        if context.kind is Kind.CONTROL:
            receiver.begin_counting()
            context.owner.establish()
        else:
            self._lifecycle.change(Change.GREET)

    def _on_auth(self, _stream_id: int, body: bytes) -> None:
        if not self._lifecycle.authenticated:
            if self._lifecycle.auth_sent:
                raise Violation(GoawayCode.PROTOCOL, "a second AUTH before the first was answered")
            self._lifecycle.auth_sent = True
            self._receiver.begin_counting()
        self._context.events.append(Auth.decode(body))

    def _on_auth_ok(self, _stream_id: int, body: bytes) -> None:
        if not self._lifecycle.auth_sent:
            raise Violation(GoawayCode.PROTOCOL, "AUTH_OK that answers no AUTH")
        ok = AuthOk.decode(body)
        if not self._lifecycle.authenticated:
            self._resumption.learn_secret(ok, self._receiver.peer_hello)
            self._receiver.begin_counting()
            self._context.owner.establish()
        self._context.events.append(ok)

    # -- streams ----------------------------------------------------------------------------------------------------

    def _on_open(self, stream_id: int, body: bytes) -> None:
        self._streams.peer_opens(stream_id, _target_of(body))

    def _on_fin(self, stream_id: int, _body: bytes) -> None:
        stream = self._streams.find(stream_id, "FIN")
        if stream is None:
            self._receiver.spend_control_budget()
        else:
            self._streams.peer_finished(stream)

    def _on_reset(self, stream_id: int, body: bytes) -> None:
        stream = self._streams.find(stream_id, "RESET")
        code = U32.unpack(body)[0]
        in_order = code == ResetCode.NO_ERROR and (stream is None or stream.receiving is RECEIVE_FINISHED)
        if in_order:  # part of an ordinary close, and two of them may cross
            self._receiver.spend_control_budget()
        if stream is not None:
            self._streams.peer_reset(stream, code, in_order=in_order)
        elif not in_order:
            self._streams.count_churn()

    def _on_window(self, stream_id: int, body: bytes) -> None:
        sender = self._sender
        increment = U32.unpack(body)[0]
        if stream_id == 0:
            if not sender.add_session_credit(increment):
                raise Violation(GoawayCode.FLOW_CONTROL, "an impossible grant for the session")
            return
        stream = self._streams.find(stream_id, "WINDOW")
        if stream is None:
            return
        if increment == 0 or stream.credit + increment > MAX_CREDIT:
            self._streams.refuse(stream, ResetCode.FLOW_CONTROL)
            return
        sender.add_credit(stream, increment)

    # -- counts and liveness ----------------------------------------------------------------------------------------

    def _on_ack(self, _stream_id: int, body: bytes) -> None:
        self._context.owner.acknowledged(U64.unpack(body)[0])

    def _on_quiet(self, _stream_id: int, _body: bytes) -> None:
        if self._sender.congestion is not None:
            self._sender.congestion.begin_probe(self._context.now)

    def _on_ping(self, _stream_id: int, body: bytes) -> None:
        context, receiver, keepalive = self._context, self._receiver, self._lifecycle.keepalive
        payload = receiver.ping_came()
        number, received = PING_BODY.unpack(body)
        context.owner.acknowledged(received)
        self._sender.answer_ping(number, receiver.report())
        receiver.keep_half_free()
        if context.side is Side.ACCEPTOR and keepalive is not None and not payload:
            # While payload comes, its window grows by the round trip, which only PINGs of this end measure.
            keepalive.peer_pinged(context.now)

    def _on_pong(self, _stream_id: int, body: bytes) -> None:
        number, received = PING_BODY.unpack(body)
        self._context.owner.acknowledged(received)
        if self._lifecycle.keepalive is not None:
            self._lifecycle.keepalive.pong(number, self._context.now)

    def _on_goaway(self, _stream_id: int, body: bytes) -> None:
        context, lifecycle = self._context, self._lifecycle
        goaway = Goaway.decode(body)
        context.events.append(goaway)
        if goaway.final or goaway.code not in DRAIN_CODES:
            context.owner.end(ended_by(goaway))
            return
        lifecycle.peer_goaway = goaway
        if context.kind is Kind.CONTROL:
            return
        lifecycle.drain()
        self._streams.refused_above(goaway.last_stream)
        context.owner.finish_drain_if_idle()


def _reports(kind: type[Dial | Status | Revoke | Ledger | Move | CaSuccession]) -> FrameHandler:
    """Make the handler of a frame whose record is the shell's matter alone."""

    def report(handlers: FrameHandlers, _stream_id: int, body: bytes) -> None:
        handlers._context.events.append(kind.decode(body))

    return report


@cache
def table_of(connection: Kind, side: Side) -> dict[int, FrameHandler]:
    """Return the handler of each known type but DATA. All connections share it: a relay has tens of thousands, and of
    its own each would have 2 KiB."""
    peer = connection, Side.ACCEPTOR if side is Side.INITIATOR else Side.INITIATOR
    may_not = [kind for kind, layout in FRAMES.items() if peer not in MAY_SEND[layout.sender]]
    handlers: dict[int, FrameHandler] = {
        FrameType.HELLO: FrameHandlers._on_hello,
        FrameType.AUTH: FrameHandlers._on_auth,
        FrameType.AUTH_OK: FrameHandlers._on_auth_ok,
        FrameType.OPEN: FrameHandlers._on_open,
        FrameType.FIN: FrameHandlers._on_fin,
        FrameType.RESET: FrameHandlers._on_reset,
        FrameType.WINDOW: FrameHandlers._on_window,
        FrameType.ACK: FrameHandlers._on_ack,
        FrameType.PING: FrameHandlers._on_ping,
        FrameType.PONG: FrameHandlers._on_pong,
        FrameType.GOAWAY: FrameHandlers._on_goaway,
        FrameType.DIAL: _reports(Dial),
        FrameType.STATUS: _reports(Status),
        FrameType.MOVE: _reports(Move),
        FrameType.QUIET: FrameHandlers._on_quiet,
        FrameType.REVOKE: _reports(Revoke),
        FrameType.LEDGER: _reports(Ledger),
        FrameType.SUCCESSION: _reports(CaSuccession),
    }
    return handlers | {kind: misplaced(FrameType(kind), connection) for kind in may_not if kind != FrameType.DATA}
