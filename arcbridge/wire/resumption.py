"""From one connection to the next: what a session does when its connection is lost, and how it goes on.

The initiator makes the new connection. It says which session it means, proves it, and says how much of the agent's
sequence it has; the acceptor checks all that against the session it still holds and answers with its own count. Each
then sends again what the other lacks, and the sequences go on as if nothing had happened: every frame is acted on once.

Invariant: nothing of the session's sequence travels before both counts are known, so a refused connection changes
nothing.
"""

from __future__ import annotations

from dataclasses import replace

from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    LocalProtocolError,
    RemoteProtocolError,
    SessionEnded,
    WrongAgent,
)
from arcbridge.wire import events as ev
from arcbridge.wire.context import SessionContext
from arcbridge.wire.frames import FRAMES, HEADER_SIZE, VERSION, FrameType, GoawayCode, record_frame, unpack_header
from arcbridge.wire.lifecycle import Lifecycle, Violation, ended_by
from arcbridge.wire.receiver import Receiver
from arcbridge.wire.records import Auth, AuthOk, Goaway, Hello, Move
from arcbridge.wire.sender import Sender
from arcbridge.wire.state import Kind, Side, State

REFUSED_FOR_NOW = frozenset(
    {
        GoawayCode.DRAINING,
        GoawayCode.REPLACED,
        GoawayCode.LIMIT,
        GoawayCode.TIMEOUT,
        GoawayCode.UNAVAILABLE,
        GoawayCode.CROSSED,
    }
)
"""Answers to a resuming connection after which another one may succeed; any other ends the session."""

GREETINGS = frozenset({FrameType.HELLO, FrameType.AUTH_OK, FrameType.GOAWAY})
"""What an acceptor may say before the sequence goes on."""


class Resumption:
    """Detaching and attaching. `wire.lifecycle` has the table of states."""

    def __init__(
        self, context: SessionContext, lifecycle: Lifecycle, sender: Sender, receiver: Receiver, hello_template: Hello
    ) -> None:
        """`hello_template` is this end's HELLO without what names a session."""
        self._context = context
        self._lifecycle = lifecycle
        self._sender = sender
        self._receiver = receiver
        self._hello_template = hello_template
        self.session_id = b""
        """What names the session to its acceptor; empty where it cannot be resumed."""
        self.secret = b""
        """What proves that a connection belongs to the session. Never to be logged."""
        self.epoch = 0
        """Number of the attached connection; each later one has a higher one."""
        self.resuming: Hello | None = None
        """Acceptor: the HELLO of a connection that asks to resume another session."""
        self.handshake: bytearray | None = None
        """Initiator: the part of a frame that has come of the handshake of a new connection; None: none is under
        way."""
        self._hello: Hello | None = None
        """Initiator: the acceptor's HELLO on the new connection."""

    @property
    def possible(self) -> bool:
        """Whether the session outlives its connection: both ends keep history, and both know the secret."""
        return self._sender.history is not None and bool(self.session_id) and self._lifecycle.state is not State.CLOSED

    # -- commands ---------------------------------------------------------------------------------------------------

    def learn_secret(self, ok: AuthOk, peer_hello: Hello | None) -> None:
        """Take id and secret of the first AUTH_OK.

        Without both, or where the peer keeps nothing, the session dies with its connection.
        """
        offered = peer_hello is not None and "resume" in peer_hello.features.split()
        if self._sender.history is not None and ok.session_id and ok.resume_secret and offered:
            self.session_id, self.secret = ok.session_id, ok.resume_secret
        else:
            self._sender.forget_history()

    def begin(self, auth: Auth, now: float, join_id: str = "") -> None:
        """Initiator: say on a new connection, made under `join_id`, which session it is to carry.

        A connection that is still attached is given up: its bytes must not come any more.
        """
        if self._context.side is not Side.INITIATOR or not self.possible:
            raise LocalProtocolError("this session cannot be resumed")
        self._context.now = now
        if self._lifecycle.state is not State.DETACHED:
            self._detach(ConnectionLost("another connection takes its place"), tell=False)
        self.epoch += 1
        self.handshake, self._hello = bytearray(), None
        self._sender.prelude = [self._resuming_hello(self.secret, join_id), record_frame(FrameType.AUTH, auth)]
        self._lifecycle.await_handshake(now)

    def take_over(self, hello: Hello, ok: AuthOk, now: float) -> None:
        """Acceptor: go on over the connection whose HELLO this is, and whose right to the session was verified.

        Raises LocalProtocolError when its epoch is not higher, or the session is over; RemoteProtocolError, with the
        session over, when the counts cannot be true.
        """
        if self._context.side is not Side.ACCEPTOR or not self.possible:
            raise LocalProtocolError("this session cannot be resumed")
        if hello.epoch <= self.epoch:
            raise LocalProtocolError("a connection of an older epoch")
        self._context.now = now
        if self._lifecycle.state is not State.DETACHED:
            self._detach(ConnectionLost("another connection took its place"), tell=False)
        self._check_counts(hello)
        self.epoch = hello.epoch
        self._sender.prelude = [self._resuming_hello(b""), record_frame(FrameType.AUTH_OK, ok)]
        self._attach(hello)

    def hand_over(self, now: float) -> None:
        """Acceptor: end this session, whose connection another session took; no frame is sent."""
        if self.resuming is None or self._lifecycle.authenticated:
            raise LocalProtocolError("not a connection that resumes")
        self._context.now = now
        self._sender.prelude.clear()
        self._sender.control.clear()
        self._context.owner.end(SessionEnded(GoawayCode.DONE, "its connection carries the resumed session now"))

    def ask_to_move(self, join_id: str) -> None:
        """Acceptor: ask for another connection in place of the one made under `join_id`."""
        if self._context.side is not Side.ACCEPTOR or self._context.kind is not Kind.SESSION:
            raise LocalProtocolError("only an agent asks to move")
        if self._lifecycle.authenticated and self.possible:
            self._sender.queue_control(record_frame(FrameType.MOVE, Move(join_id)))

    # -- called by the session --------------------------------------------------------------------------------------

    def connection_lost(self, error: ArcbridgeError) -> None:
        """Wait for another connection where that is possible, else end the session."""
        lifecycle = self._lifecycle
        if lifecycle.state is State.CLOSED:
            return
        if self.handshake is not None:
            self.failed(error)
        elif lifecycle.state is State.DETACHED:
            return
        elif self.possible and (lifecycle.peer_goaway is None or self._context.streams):
            self._detach(error)
        elif lifecycle.peer_goaway is not None:
            self._context.owner.end(ended_by(lifecycle.peer_goaway))
        else:
            self._context.owner.end(error)

    def failed(self, error: ArcbridgeError) -> None:
        """Give up the new connection, which did not resume the session; the session waits for another one."""
        self.abandon_handshake()
        self._lifecycle.handshake_deadline = None
        self._sender.prelude.clear()
        self._context.events.append(ev.ResumeFailed(error))

    def abandon_handshake(self) -> None:
        """Forget the handshake that is under way."""
        self.handshake = self._hello = None

    def greet(self, data: memoryview) -> memoryview:
        """Initiator: read the acceptor's part of the handshake; return what of `data` belongs to the sequence.

        The sequence goes on behind the last of these frames, perhaps in the middle of a frame, so it gets exactly the
        rest. Raises RemoteProtocolError at the header of a frame that has no place here.
        """
        kept = self.handshake
        assert kept is not None
        kept += data
        while self.handshake is not None and len(kept) >= HEADER_SIZE:
            word, stream_id = unpack_header(kept)
            kind, end = word & 0xFF, HEADER_SIZE + (word >> 8)
            if kind not in GREETINGS or stream_id or end - HEADER_SIZE > FRAMES[kind].largest:
                raise RemoteProtocolError(f"a frame of type {kind} before the session was resumed")
            if len(kept) < end:
                break
            body = bytes(kept[HEADER_SIZE:end])
            del kept[:end]
            if kind == FrameType.GOAWAY:
                self._refused(Goaway.decode(body))
                return data[:0]
            if kind == FrameType.HELLO:
                self._on_hello(Hello.decode(body))
            else:
                self._on_auth_ok(AuthOk.decode(body))
        return memoryview(kept) if self.handshake is None else data[:0]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _detach(self, error: ArcbridgeError, *, tell: bool = True) -> None:
        self._lifecycle.detach(self._context.now)
        self._context.stats.detached += tell
        self._sender.detach()
        if tell:
            self._context.events.append(ev.Detached(error))

    def _resuming_hello(self, secret: bytes, join_id: str = "") -> bytes:
        hello = replace(
            self._hello_template,
            session_id=self.session_id,
            resume_secret=secret,
            received=self._receiver.received,
            sent=self._sender.sent,
            epoch=self.epoch,
            join_id=join_id,
        )
        return record_frame(FrameType.HELLO, hello)

    def _on_hello(self, hello: Hello) -> None:
        if self._hello is not None:
            raise Violation(GoawayCode.PROTOCOL, "a second HELLO")
        if not hello.least <= VERSION <= hello.version:
            raise Violation(GoawayCode.VERSION, "the other end speaks another protocol version now")
        self._hello = hello

    def _on_auth_ok(self, ok: AuthOk) -> None:
        hello = self._hello
        if hello is None or hello.session_id != self.session_id or hello.epoch != self.epoch:
            raise Violation(GoawayCode.PROTOCOL, "AUTH_OK without the HELLO of this session")
        self.abandon_handshake()
        self._check_counts(hello)
        self._context.events.append(ok)
        self._attach(hello)

    def _refused(self, goaway: Goaway) -> None:
        error = ended_by(goaway)
        first, now = self._receiver.peer_hello, self._hello
        if first is not None and now is not None and first.agent and now.agent and first.agent != now.agent:
            # Another agent cannot know the session: its refusal says nothing, and the right agent may still come.
            self.failed(WrongAgent("the relay brought another agent than the one that has the session"))
        elif goaway.code in REFUSED_FOR_NOW:
            self.failed(error)
        else:
            self._context.owner.end(error)

    def _check_counts(self, hello: Hello) -> None:
        """Raise RemoteProtocolError, with the session over, for counts that contradict this end's."""
        sender = self._sender
        assert sender.history is not None
        possible = sender.history.holds(hello.received) and hello.received >= sender.peer_received
        if possible and hello.sent >= self._receiver.received:
            return
        error = RemoteProtocolError("the session cannot be resumed: the two ends disagree about what was sent")
        sender.prelude.clear()
        self._context.owner.end(error)
        raise error

    def _attach(self, hello: Hello) -> None:
        """Both counts are known: go on."""
        context, owner = self._context, self._context.owner
        self._lifecycle.resume()
        self._sender.replay_from(hello.received)
        context.stats.resumed += 1
        self._receiver.connection_changed(hello.sent)
        owner.acknowledged(hello.received)
        self._sender.attach()
        self._lifecycle.watch(context.now)
        context.events.append(ev.Resumed())
        owner.send_ping()
        owner.finish_drain_if_idle()
