"""Two session machines with a path between them that has a rate, a length and a deep queue, and a virtual clock.

Each direction is a queue that takes everything at once, as a shaper or a modem does, and lets it out at its rate; what
has left arrives half a round trip later. Applications are few: bulk that is always there, a tick that is echoed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count

from arcbridge.wire import events as ev
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.replay import Budget
from arcbridge.wire.session import Kind, Session, Side
from arcbridge.wire.stream import Stream
from tests.support.books import check_session, take_events

MBIT = 125_000.0
"""Bytes per second."""

PORTION = 512 * 1024
PIECE = 0.001
"""Seconds of the rate that arrive at a time, at most; at least a packet."""


class Way:
    """One direction of the path."""

    def __init__(self, rate: float, delay: float) -> None:
        self.rate = rate
        self.delay = delay
        self.free_at = 0.0
        self.latest = 0.0
        self.carried = 0
        self.hold = 0.0
        """Arrivals come together at multiples of this many seconds (0: as they come)."""

    def queue(self, now: float) -> float:
        """Return the seconds that a byte put in now would wait."""
        return max(0.0, self.free_at - now)


class Node:
    """One session machine and the application above it."""

    def __init__(self, path: SlowPath, side: Side, limits: Limits) -> None:
        self.path = path
        self.machine = Session(side, Kind.SESSION, path.now, limits=limits, budget=path.budget)
        self.read: dict[int, int] = {}
        self.bulk: dict[int, Stream] = {}
        self.on_read: dict[int, Callable[[int], None]] = {}
        self.frozen: set[int] = set()
        self.unread: dict[int, int] = {}
        self.opened: list[Stream] = []

    def adopt(self, stream: Stream) -> Stream:
        number = stream.id
        self.read.setdefault(number, 0)

        def take(view: memoryview) -> None:
            size = len(view)
            self.read[number] += size
            if number in self.frozen:
                self.unread[number] = self.unread.get(number, 0) + size
                return
            self.machine.receiver.consumed(stream, size)
            if number in self.on_read:
                self.on_read[number](size)

        while stream.inbox:
            take(memoryview(stream.inbox.pop(0)))
        stream.sink = take
        return stream

    def collect(self) -> None:
        for event in take_events(self.machine):
            if isinstance(event, Auth):
                self.machine.accept_auth(AuthOk(b"session", b"canary-secret", "jane", 3600))
            elif isinstance(event, ev.StreamOpened):
                self.opened.append(self.adopt(event.stream))

    def fill(self) -> None:
        """Write bulk as a local socket would: a read at a time, while little waits."""
        for stream in self.bulk.values():
            while stream.queued < 256 * 1024:
                if not self.machine.sender.send(stream, bytes(256 * 1024)) and self.machine.sender.blocked:
                    break
                if self.machine.sender.out_bytes > PORTION // 2:
                    break


class SlowPath:
    """The pair, its path, and its clock."""

    def __init__(
        self,
        *,
        rate: float,
        round_trip: float,
        limits: Limits = DEFAULT,
        most: int = 1400,
        budget: Budget | None = None,
    ) -> None:
        self.budget = budget
        self.now = 100.0
        self._packet = most
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.client = Node(self, Side.INITIATOR, limits)
        self.agent = Node(self, Side.ACCEPTOR, limits)
        self.up = Way(rate, round_trip / 2)
        self.down = Way(rate, round_trip / 2)
        self.client.machine.authenticate(Auth("oidc", "canary-token"))
        self.flush()
        self.run(1 + 3 * round_trip)

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Call a function at a moment of the virtual clock."""
        heapq.heappush(self._events, (when, next(self._order), do))

    def flush(self) -> None:
        """Let both ends write what they can."""
        for node, way, other in ((self.client, self.up, self.agent), (self.agent, self.down, self.client)):
            node.collect()
            for _ in range(64):
                node.fill()
                parts = node.machine.sender.data_to_send(PORTION, self.now)
                if not parts:
                    break
                self._put(way, other, b"".join(parts))
            node.machine.sender.take_unblocked()

    def _put(self, way: Way, other: Node, data: bytes) -> None:
        most = max(self._packet, int(way.rate * PIECE))
        for start in range(0, len(data), most):
            piece = data[start : start + most]
            way.free_at = max(way.free_at, self.now) + len(piece) / way.rate
            way.carried += len(piece)
            arrives = way.free_at + way.delay
            if way.hold:
                arrives = (int(arrives / way.hold) + 1) * way.hold
            way.latest = arrives = max(arrives, way.latest)  # in order, though the path became shorter
            self.at(arrives, lambda piece=piece: other.machine.receive_data(memoryview(piece), self.now))

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, do = heapq.heappop(self._events)
            do()
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            for node in (self.client, self.agent):
                node.machine.handle_timer(self.now)
            self.flush()
        self.now = end
        for node in (self.client, self.agent):
            check_session(node.machine)

    def start_bulk(self, *, up: bool) -> int:
        """Open a stream that is always full in one direction; return its id."""
        stream = self.client.adopt(self.client.machine.open_stream("tcp:bulk"))
        if up:
            self.client.bulk[stream.id] = stream
        else:
            self.client.machine.sender.send(stream, b"go")
        self.flush()
        if not up:
            self.run(0.001 + self.up.delay + self.up.queue(self.now) + 2 / self.up.rate + 0.1)
            self.agent.bulk[stream.id] = self.agent.machine.streams[stream.id]
            self.flush()
        return stream.id

    def start_ticks(self, every: float, until: float, size: int = 100) -> list[float]:
        """Send a keystroke each `every` seconds, which the other end echoes; the list fills with the times it took."""
        stream = self.client.adopt(self.client.machine.open_stream("tcp:ticks"))
        took: list[float] = []
        sent: deque[float] = deque()
        state = {"back": 0}

        def echoed(count: int) -> None:
            state["back"] += count
            while state["back"] >= size:
                state["back"] -= size
                took.append(self.now - sent.popleft())

        def at_agent(count: int) -> None:
            self.agent.machine.sender.send(self.agent.machine.streams[stream.id], bytes(count))

        self.client.on_read[stream.id] = echoed
        self.agent.on_read[stream.id] = at_agent

        def tick() -> None:
            sent.append(self.now)
            self.client.machine.sender.send(stream, bytes(size))
            if self.now + every < until:
                self.at(self.now + every, tick)

        self.at(self.now + every, tick)
        return took
