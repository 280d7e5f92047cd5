"""A machine whose peer is the test itself: frames in, frames out."""

from __future__ import annotations

from arcbridge.wire import events as ev
from arcbridge.wire.decoder import Decoder
from arcbridge.wire.frames import MAX_DATA, U32, U64, VERSION, FrameType, GoawayCode, frame
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk, Goaway, Hello, Open
from arcbridge.wire.session import Kind, Session, Side, State
from tests.support.books import check_session, take_events

OK = AuthOk(b"id", b"canary-secret", "jane", 60)
AUTH = frame(FrameType.AUTH, 0, Auth("oidc", "canary-token").encode())
AUTH_OK = frame(FrameType.AUTH_OK, 0, OK.encode())


def hello(**changes: object) -> bytes:
    """A HELLO frame with some fields changed."""
    fields: dict[str, object] = {"version": VERSION, "least": VERSION, "stream_window": 256 * 1024, "max_streams": 100}
    return frame(FrameType.HELLO, 0, Hello(**(fields | changes)).encode())


def data(stream_id: int, size: int) -> bytes:
    """DATA frames of `size` bytes."""
    out = b""
    while size > MAX_DATA:
        out += frame(FrameType.DATA, stream_id, b"d" * MAX_DATA)
        size -= MAX_DATA
    return out + frame(FrameType.DATA, stream_id, b"d" * size)


def window(stream_id: int, increment: int) -> bytes:
    """A WINDOW frame."""
    return frame(FrameType.WINDOW, stream_id, U32.pack(increment))


def reset(stream_id: int, code: int) -> bytes:
    """A RESET frame."""
    return frame(FrameType.RESET, stream_id, U32.pack(code))


def opening(stream_id: int, target: str = "kubernetes") -> bytes:
    """An OPEN frame."""
    return frame(FrameType.OPEN, stream_id, Open(target).encode())


def goaway(code: GoawayCode, last: int = 0, message: str = "why") -> bytes:
    """A GOAWAY frame."""
    return frame(FrameType.GOAWAY, 0, Goaway(last, code, message).encode())


def ack(received: int) -> bytes:
    """An ACK frame."""
    return frame(FrameType.ACK, 0, U64.pack(received))


class Scripted:
    """A machine, the frames that it sent, and its events."""

    def __init__(self, side: Side, kind: Kind = Kind.SESSION, limits: Limits = DEFAULT) -> None:
        self.now = 500.0
        self.machine = Session(side, kind, self.now, limits=limits)
        self.events: list[ev.Event] = []
        self.said: list[tuple[int, int, bytes]] = []
        self._decoder = Decoder()
        if side is Side.INITIATOR and kind is Kind.SESSION:
            self.machine.authenticate(Auth("oidc", "canary-token"))
        self.collect()

    # The decoder's sink for what the machine says.
    def data_begins(self, stream_id: int, length: int):
        at = len(self.said)
        self.said.append((FrameType.DATA, stream_id, b""))

        def take(view: memoryview) -> None:
            kind, stream, sofar = self.said[at]
            self.said[at] = (kind, stream, sofar + bytes(view))

        return take

    def frame_received(self, kind: int, stream_id: int, body: bytes) -> None:
        self.said.append((kind, stream_id, body))

    def collect(self) -> None:
        """Take the machine's events and output."""
        self.events += take_events(self.machine)
        while parts := self.machine.sender.data_to_send(1 << 20):
            self._decoder.feed(memoryview(b"".join(parts)), self)
        self.machine.sender.take_unblocked()
        self.events += take_events(self.machine)
        if self.machine.state is not State.CLOSED:
            check_session(self.machine)

    def feed(self, *frames: bytes) -> Scripted:
        """Receive these frames from the peer, in one piece."""
        self.machine.receive_data(memoryview(b"".join(frames)), self.now)
        self.collect()
        return self

    def kinds(self) -> list[int]:
        """Return the types of the frames that the machine sent."""
        return [kind for kind, _, _ in self.said]

    def resets(self) -> dict[int, int]:
        """Return the code of each RESET that the machine sent, by stream id."""
        return {stream: U32.unpack(body)[0] for kind, stream, body in self.said if kind == FrameType.RESET}

    def goaway(self) -> Goaway | None:
        """Return the last GOAWAY that the machine sent, if any."""
        bodies = [body for kind, _, body in self.said if kind == FrameType.GOAWAY]
        return Goaway.decode(bodies[-1]) if bodies else None

    def code(self) -> int | None:
        """Return the code of the last GOAWAY that the machine sent, if any."""
        said = self.goaway()
        return None if said is None else said.code

    def of(self, kind: type) -> list[ev.Event]:
        """Events of one type."""
        return [event for event in self.events if isinstance(event, kind)]


def agent(limits: Limits = DEFAULT, *, accepted: bool = True) -> Scripted:
    """An acceptor's machine that has HELLO and AUTH, accepted unless said."""
    one = Scripted(Side.ACCEPTOR, limits=limits).feed(hello(), AUTH)
    if accepted:
        one.machine.accept_auth(OK)
        one.collect()
    return one


def client(limits: Limits = DEFAULT) -> Scripted:
    """An initiator's machine whose AUTH was accepted."""
    return Scripted(Side.INITIATOR, limits=limits).feed(hello(), AUTH_OK)
