"""Two session machines, wired together in memory, with a clock that only the test moves.

`Pair` plays the shell of both ends: it collects events, carries bytes with latency (and cut as the test likes), and
calls the timers. An application at each end writes, reads and keeps a record of what it saw, so that a test can
compare the two ends: `written` at one must be `read` at the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from arcbridge.errors import ArcbridgeError
from arcbridge.wire import events as ev
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Introduction, Kind, Session, Side, State
from arcbridge.wire.stream import ReceiveState, SendState, Stream
from tests.support.books import check_session, take_events

TOKEN = "canary-token-5f1d"
SECRET = b"canary-secret-9a7c"


@dataclass
class Seen:
    """What one end's application knows of one stream."""

    stream: Stream
    written: bytearray = field(default_factory=bytearray)
    read: bytearray = field(default_factory=bytearray)
    unread: int = 0
    """Bytes that were delivered and are not consumed yet."""
    finished: bool = False
    """FIN came."""
    ends: list[str] = field(default_factory=list)
    """Reasons with which the stream ended; a correct machine gives at most one."""


class End:
    """One machine and the application above it."""

    def __init__(self, side: Side, kind: Kind, now: float, limits: Limits, *, eager: bool) -> None:
        self.machine = Session(side, kind, now, limits=limits, introduction=Introduction("instance-1", "test"))
        self.eager = eager
        """Consume at once; otherwise `take` decides."""
        self.seen: dict[int, Seen] = {}
        self.events: list[ev.Event] = []
        self.error: ArcbridgeError | None = None
        self.arrivals: deque[tuple[float, bytes]] = deque()
        """(when, bytes) on their way to this end."""

    def open(self, target: str = "kubernetes") -> Seen:
        """Open a stream."""
        stream = self.machine.open_stream(target)
        return self._adopt(stream)

    def write(self, seen: Seen, data: bytes) -> None:
        """Send, and remember what was sent."""
        if seen.stream.sending is SendState.OPEN and self.machine.state is not State.CLOSED:
            seen.written += data
            self.machine.sender.send(seen.stream, data)

    def take(self, seen: Seen, count: int) -> None:
        """Consume up to `count` delivered bytes."""
        count = min(count, seen.unread)
        seen.unread -= count
        self.machine.receiver.consumed(seen.stream, count)

    def finish(self, seen: Seen) -> None:
        """FIN after everything written."""
        self.machine.stream_table.finish(seen.stream)
        self._note_over(seen)

    def reset(self, seen: Seen, code: ResetCode = ResetCode.CANCELLED) -> None:
        """Reset, if the stream still runs."""
        if seen.stream.id in self.machine.streams:
            self.machine.stream_table.reset(seen.stream, code)
            self._ended(seen, f"reset by us {code}")

    def collect(self) -> None:
        """Act on the machine's events."""
        while events := take_events(self.machine):
            for event in events:
                assert self.error is None, f"{event} after Ended"
                self.events.append(event)
                self._act_on(event)

    def note_ends(self) -> None:
        """Look which streams ended by FIN both ways."""
        for seen in self.seen.values():
            self._note_over(seen)

    def _adopt(self, stream: Stream) -> Seen:
        seen = self.seen[stream.id] = Seen(stream)
        while stream.inbox:
            self._deliver(seen, memoryview(stream.inbox.pop(0)))
        stream.sink = lambda view: self._deliver(seen, view)
        return seen

    def _deliver(self, seen: Seen, view: memoryview) -> None:
        assert not seen.finished, "bytes after FIN"
        assert not seen.ends, "bytes after the end"
        seen.read += view
        seen.unread += len(view)
        if self.eager:
            self.take(seen, seen.unread)

    def _act_on(self, event: ev.Event) -> None:
        if isinstance(event, ev.StreamOpened):
            assert event.stream.id not in self.seen, "opened twice"
            self._adopt(event.stream)
        elif isinstance(event, ev.StreamFinished):
            seen = self.seen[event.stream.id]
            assert not seen.finished, "FIN twice"
            seen.finished = True
            self._note_over(seen)
        elif isinstance(event, ev.StreamWasReset):
            seen = self.seen[event.stream.id]
            complete = event.code == ResetCode.NO_ERROR and event.stream.receiving is ReceiveState.FINISHED
            self._ended(seen, "in order" if complete else f"reset {event.code}")
        elif isinstance(event, Auth):
            self.machine.accept_auth(AuthOk(b"session", SECRET, "jane", 3600))
        elif isinstance(event, ev.Ended):
            self.error = event.error
            for stream in self.machine.streams.values():
                if stream.id in self.seen:
                    self._ended(self.seen[stream.id], "session over")
            self.machine.streams.clear()

    def check_backlog(self) -> None:
        """What counts as waiting is what waits: in streams, and sent but not confirmed."""
        history = self.machine.sender.history
        waiting = sum(stream.held for stream in self.machine.streams.values())
        assert self.machine.backlog.held == waiting + (history.held if history is not None else 0)

    def _note_over(self, seen: Seen) -> None:
        if not seen.ends and seen.finished and seen.stream.sending is SendState.FINISHED:
            self._ended(seen, "in order")

    def _ended(self, seen: Seen, reason: str) -> None:
        seen.ends.append(reason)
        seen.unread = 0 if seen.stream.receiving is ReceiveState.RESET else seen.unread
        assert len(seen.ends) == 1, f"stream {seen.stream.id} ended twice: {seen.ends}"


class Pair:
    """A client's and an agent's machine with a link between them."""

    def __init__(
        self,
        kind: Kind = Kind.SESSION,
        *,
        latency: float = 0.01,
        limits: Limits = DEFAULT,
        eager: bool = True,
        portion: int = 512 * 1024,
    ) -> None:
        self.now = 1000.0
        self.latency = latency
        self.portion = portion
        """Bytes asked of a machine at a time: what one flush of the shell asks."""
        self.client = End(Side.INITIATOR, kind, self.now, limits, eager=eager)
        self.agent = End(Side.ACCEPTOR, kind, self.now, limits, eager=eager)
        self.lost = False
        if kind is Kind.SESSION:
            self.client.machine.authenticate(Auth("oidc", TOKEN))

    @property
    def ends(self) -> tuple[End, End]:
        """Client, agent."""
        return self.client, self.agent

    def other(self, end: End) -> End:
        """The end across the link."""
        return self.agent if end is self.client else self.client

    def flush(self) -> None:
        """Collect the events of both ends and put what they want to send on the link."""
        for end in self.ends:
            end.collect()
            while parts := end.machine.sender.data_to_send(self.portion):
                data = b"".join(parts)
                if not self.lost:
                    self.other(end).arrivals.append((self.now + self.latency, data))
            end.machine.sender.take_unblocked()
            end.collect()
            end.note_ends()
            if end.machine.state is not State.CLOSED:
                check_session(end.machine)
            end.check_backlog()

    def deliver(self, end: End, most: int | None = None) -> bool:
        """Let the next bytes arrive at `end` now, at most `most` of them; false if none are on their way."""
        if not end.arrivals:
            return False
        when, data = end.arrivals.popleft()
        if most is not None and most < len(data):
            end.arrivals.appendleft((when, data[most:]))
            data = data[:most]
        scratch = bytearray(data)
        end.machine.receive_data(memoryview(scratch), self.now)
        scratch[:] = b"\xdb" * len(scratch)  # as the shell's buffer does: a view that was kept shows at once
        end.collect()
        return True

    def next_wakeup(self) -> float | None:
        """The earliest arrival or deadline."""
        times = [end.arrivals[0][0] for end in self.ends if end.arrivals]
        times += [at for end in self.ends if (at := end.machine.next_deadline()) is not None]
        return min(times, default=None)

    def step(self) -> bool:
        """Go to the next wake-up and do what is due; false when nothing ever will be."""
        self.flush()
        at = self.next_wakeup()
        if at is None:
            return False
        self.now = max(self.now, at)
        for end in self.ends:
            while end.arrivals and end.arrivals[0][0] <= self.now:
                self.deliver(end)
            end.machine.handle_timer(self.now)
            end.collect()
        self.flush()
        return True

    @property
    def quiet(self) -> bool:
        """Nothing on its way."""
        return not self.client.arrivals and not self.agent.arrivals

    def settle(self, steps: int = 10_000) -> None:
        """Until nothing is on its way (deadlines are not waited for); fails instead of hanging."""
        self.drive_bounded(lambda: self.quiet, steps)

    def drive_bounded(self, until: Callable[[], bool], steps: int = 10_000) -> None:
        """Step until `until()`; an AssertionError after `steps` steps, or when nothing more will happen."""
        self.flush()
        for _ in range(steps):
            if until():
                return
            assert self.step(), f"nothing more will happen: {self!r}"
        raise AssertionError(f"not reached within {steps} steps: {self!r}")

    def cut(self) -> None:
        """The connection dies: what is on its way is lost, both ends learn of it."""
        from arcbridge.errors import ConnectionLost

        self.lost = True
        for end in self.ends:
            end.arrivals.clear()
            end.machine.connection_lost(self.now, ConnectionLost("cut by the test"))
            end.collect()

    def check_books(self) -> None:
        """At rest: what one end may still send is what the other has granted and not seen used."""
        assert self.quiet, "not at rest"
        for end in self.ends:
            other = self.other(end)
            if State.CLOSED in (end.machine.state, other.machine.state):
                continue
            session = other.machine.session_window.account
            assert session.granted - session.received == end.machine.sender.credit, "session credit lost or invented"
            for stream in end.machine.streams.values():
                peer = other.machine.streams.get(stream.id)
                if peer is not None and peer.receiving is ReceiveState.OPEN and stream.sending is SendState.OPEN:
                    assert peer.window.granted - peer.window.received == stream.credit, "stream credit lost or invented"

    def check_prefixes(self) -> None:
        """What was read is a prefix of what was written; equal where FIN was seen."""
        for end in self.ends:
            for stream_id, seen in end.seen.items():
                source = self.other(end).seen.get(stream_id)
                written = bytes(source.written) if source is not None else b""
                assert written.startswith(bytes(seen.read)), f"stream {stream_id}: not a prefix"
                if seen.finished:
                    assert len(seen.read) == len(written), f"stream {stream_id}: FIN before the last byte"

    def established(self) -> Pair:
        """Drive the handshake; the pair itself."""
        self.drive_bounded(lambda: all(end.machine.state is State.OPEN for end in self.ends))
        self.settle()
        return self

    def __repr__(self) -> str:
        return f"<Pair at {self.now:.3f}: {self.client.machine!r} {self.agent.machine!r}>"


__all__ = ["SECRET", "TOKEN", "End", "GoawayCode", "Pair", "Seen"]
