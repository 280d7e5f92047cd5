"""What a part of a session needs to be tested alone: a context, and an owner that only notes what it is asked."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import create_autospec

from arcbridge.wire.congestion import CongestionWindow
from arcbridge.wire.context import Owner, SessionContext
from arcbridge.wire.decoder import Decoder
from arcbridge.wire.frames import FrameType, GoawayCode
from arcbridge.wire.lifecycle import Change, Lifecycle
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.receiver import Receiver
from arcbridge.wire.replay import Budget, Replay
from arcbridge.wire.sender import Sender
from arcbridge.wire.session_window import SessionWindow
from arcbridge.wire.state import Kind, Side
from arcbridge.wire.stream import Stream
from arcbridge.wire.stream_table import StreamTable
from arcbridge.wire.window import ReceiveWindow


class Parts:
    """The parts of one session without the session."""

    def __init__(
        self,
        side: Side = Side.ACCEPTOR,
        kind: Kind = Kind.SESSION,
        limits: Limits = DEFAULT,
        *,
        history: bool = False,
        congestion: bool = False,
        established: bool = True,
    ) -> None:
        self.owner = create_autospec(Owner, instance=True)
        self.budget = Budget(1 << 30)
        self.context = SessionContext(self.owner, side, kind, limits, 100.0)
        self.lifecycle = Lifecycle(kind, limits, 100.0)
        self.sender = Sender(
            self.context,
            history=Replay(limits.replay, self.budget, self.context.backlog) if history else None,
            congestion=CongestionWindow(limits.under_way, now=100.0) if congestion else None,
        )
        self.decoder = Decoder()
        self.window = SessionWindow(self.context, self.sender, self.budget)
        self.table = StreamTable(self.context, self.lifecycle, self.sender, self.decoder, self.window, self.budget)
        self.handled: list[tuple[int, int, bytes]] = []
        self.receiver = Receiver(self.context, self.lifecycle, self.sender, self.decoder, self.window, self.table)
        table = {kind: self._note(kind) for kind in FrameType if kind is not FrameType.DATA}
        self.receiver.handlers = SimpleNamespace(table=table)
        if established:
            self.lifecycle.change(Change.GREET)
            self.lifecycle.establish(100.0)
            self.receiver.counting = True

    def _note(self, kind: int):
        return lambda _handlers, stream_id, body: self.handled.append((kind, stream_id, body))

    @property
    def failures(self) -> list[GoawayCode]:
        """The codes with which a part ended the session."""
        return [call.args[0] for call in self.owner.fail.call_args_list]

    def stream(self, stream_id: int = 1, *, credit: int = 1 << 20) -> Stream:
        """A stream that is open both ways."""
        limits = self.context.limits
        stream = Stream(stream_id, "kubernetes", credit, ReceiveWindow(limits.stream_window, limits.max_stream_window))
        self.context.streams[stream_id] = stream
        return stream

    def written(self, limit: int = 1 << 20, now: float = 0.0) -> bytes:
        """Return the bytes that leave now."""
        return b"".join(self.sender.data_to_send(limit, now))

    def feed(self, *frames: bytes) -> None:
        """Receive these frames from the peer."""
        self.decoder.feed(memoryview(b"".join(frames)), self.receiver)
