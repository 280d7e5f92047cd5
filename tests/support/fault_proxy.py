"""A TCP proxy that breaks things on purpose: cut, freeze, swallow, flip, chop; by plan or by command.

    with FaultProxy(("127.0.0.1", port), plan=lambda number: Plan(cut_up=300, how="fin")) as proxy:
        ...                       # connect to proxy.address instead
        proxy.freeze("down")      # and later: thaw, cut, swallow

*Up* is from the dialling end towards the target, *down* the other way. A plan is made for each connection when it is
accepted (they are numbered from 0); commands act on the connections that are open, or on one of them. One thread does
all of it, so a test may use the proxy from anywhere, with an event loop or without.
"""

from __future__ import annotations

import errno
import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

Direction = Literal["up", "down"]
How = Literal["fin", "rst"]

READ = 64 * 1024
HELD = 256 * 1024
"""Bytes taken from a source and not passed on; beyond it the proxy stops reading the source."""
LINGER = 5.0
"""Seconds that the rest of a connection ended by FIN is read and dropped; what is left unread would make it a RST."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The faults of one connection. An offset counts the bytes of its direction that pass before the fault."""

    cut_up: int | None = None
    cut_down: int | None = None
    """End both sides once exactly so many bytes of that direction were passed on, and another one waits."""
    how: How = "rst"
    freeze_up: int | None = None
    freeze_down: int | None = None
    """Pass on no more of that direction from this byte, until `thaw`."""
    flip_up: int | None = None
    flip_down: int | None = None
    """Change one bit of this byte."""
    segment: int = 0
    """Pass on at most so many bytes at a time; 0: as they come."""
    forget: float = 0.0
    """Seconds without a byte either way after which all that comes is dropped, as by a NAT that forgets; 0: never."""

    def offset(self, name: Literal["cut", "freeze", "flip"], direction: Direction) -> int | None:
        """Return the offset of a fault in one direction."""
        found: int | None = getattr(self, f"{name}_{direction}")
        return found

    @staticmethod
    def random_cut(rng: random.Random, up: int, down: int) -> Plan:
        """Plan a cut, by FIN or RST, somewhere in the first `up` or `down` bytes."""
        how: How = rng.choice(("fin", "rst"))
        at = rng.randrange(up + down)
        return Plan(cut_up=at, how=how) if at < up else Plan(cut_down=at - up, how=how)


@dataclass(slots=True)
class Passage:
    """What the proxy has seen of one connection."""

    number: int
    up: int = 0
    down: int = 0
    """Bytes passed on."""
    open: bool = True
    end: str = ""
    """`planned`, `commanded`, `both ended`, `reset`, `unreachable` or `closed`."""


class _Half:
    """One direction of one connection."""

    def __init__(self, direction: Direction, plan: Plan) -> None:
        self.direction: Direction = direction
        self.cut = plan.offset("cut", direction)
        self.stop_at = plan.offset("freeze", direction)
        self.flip = plan.offset("flip", direction)
        self.segment = plan.segment
        self.frozen = False
        self.swallowing = False
        self.queue: deque[bytearray] = deque()
        self.held = 0
        self.taken = 0
        self.passed = 0
        self.ended = False
        """The source has ended this direction."""
        self.told = False
        """So was the sink."""

    def take(self, data: bytes) -> None:
        """Take bytes of the source."""
        if self.swallowing:
            return
        chunk = bytearray(data)
        if self.flip is not None and self.taken <= self.flip < self.taken + len(chunk):
            chunk[self.flip - self.taken] ^= 0x10
        self.taken += len(chunk)
        self.held += len(chunk)
        self.queue.append(chunk)

    def allowed(self) -> int:
        """Return how many bytes may pass before the next fault."""
        bounds = [at - self.passed for at in (self.cut, self.stop_at) if at is not None]
        return min([HELD, *bounds])


class _Connection:
    """Two sockets and the two directions between them."""

    def __init__(self, passage: Passage, plan: Plan, near: socket.socket, far: socket.socket, now: float) -> None:
        self.passage = passage
        self.plan = plan
        self.near = near
        self.far = far
        self.connecting = True
        self.up = _Half("up", plan)
        self.down = _Half("down", plan)
        self.moved_at = now
        self.lingering: float | None = None
        """When the rest stops being read."""

    @property
    def halves(self) -> tuple[_Half, _Half]:
        return self.up, self.down

    def ends_of(self, half: _Half) -> tuple[socket.socket, socket.socket]:
        """Return the direction's source and sink."""
        return (self.near, self.far) if half is self.up else (self.far, self.near)


class FaultProxy:
    """The proxy. Use as a context manager, or `stop` it.

    `make_near` and `make_far` make its sockets; those of a network namespace stay in it. By `clock` (seconds) a
    connection is forgotten; all else waits by real time.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        plan: Callable[[int], Plan] = lambda number: Plan(),
        listen: tuple[str, int] = ("127.0.0.1", 0),
        make_near: Callable[[], socket.socket] = socket.socket,
        make_far: Callable[[], socket.socket] = socket.socket,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        """Asked at each accept, in the proxy's thread."""
        self._target = target
        self._make_far = make_far
        self._clock = clock
        self._make_near = make_near
        self._listening: socket.socket | None = None
        self._listen(listen)
        self._selector = selectors.DefaultSelector()
        self._wake_up, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._commands: deque[Callable[[], None]] = deque()
        self._connections: list[_Connection] = []
        self._passages: list[Passage] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="fault proxy")
        self._thread.start()

    def _listen(self, address: tuple[str, int]) -> None:
        listening = self._make_near()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)
        listening.setblocking(False)
        self._listening = listening
        host, port = listening.getsockname()[:2]
        self.host, self.port = str(host), int(port)

    # -- look -----------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """`host:port` to connect to."""
        return f"{self.host}:{self.port}"

    @property
    def passages(self) -> list[Passage]:
        """All connections so far, in order."""
        with self._changed:
            return list(self._passages)

    @property
    def passing(self) -> int:
        """Connections that are open."""
        with self._changed:
            return sum(passage.open for passage in self._passages)

    def wait(self, look: Callable[[], object], timeout: float = 15) -> None:
        """Wait until `look` is true; it is asked whenever bytes have passed. Raises AssertionError at the deadline."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not look():
                left = deadline - time.monotonic()
                assert left > 0, f"not within {timeout} s; {self._passages}"
                self._changed.wait(min(left, 0.2))

    # -- command --------------------------------------------------------------------------------------------------

    def freeze(self, *directions: Direction, number: int | None = None) -> None:
        """Pass on nothing more of these directions (both, if none is named); the sockets stay open."""
        self._on_halves(directions, number, lambda half: setattr(half, "frozen", True))

    def thaw(self, *directions: Direction, number: int | None = None) -> None:
        """Pass on held and new bytes again, also where a plan has frozen the direction."""

        def thaw(half: _Half) -> None:
            half.frozen = False
            half.stop_at = None

        self._on_halves(directions, number, thaw)

    def swallow(self, *directions: Direction, number: int | None = None) -> None:
        """Read and drop new bytes: the source believes that they arrive."""
        self._on_halves(directions, number, lambda half: setattr(half, "swallowing", True))

    def cut(self, how: How = "rst", *, number: int | None = None) -> int:
        """End the open connections now and return how many there were. Held bytes are lost."""
        count = 0

        def cut() -> None:
            nonlocal count
            for connection in self._chosen(number):
                count += connection.lingering is None
                self._end(connection, how, "commanded")

        self._call(cut)
        return count

    def refuse(self) -> None:
        """Refuse new connections; those that are open stay. `listen` has named a port that no other program takes."""
        self._call(self._refuse)

    def _refuse(self) -> None:
        if self._listening is not None:
            if self._listening in self._selector.get_map():
                self._selector.unregister(self._listening)
            self._listening.close()
            self._listening = None

    def accept_again(self) -> None:
        """Listen again, after `refuse`, on the same port."""
        self._call(lambda: self._listen((self.host, self.port)))

    def stop(self) -> None:
        """Stop listening, close all connections (by RST) and end the thread; raise its error, if any."""
        if not self._stopping:
            self._stopping = True
            self._wake_up.send(b"x")
            self._thread.join(10)
            assert not self._thread.is_alive()
            self._wake_up.close()
            self._woken.close()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _call(self, command: Callable[[], None]) -> None:
        """Run `command` in the thread; return when it is done."""
        done = threading.Event()

        def run() -> None:
            try:
                command()
            finally:
                done.set()

        self._commands.append(run)
        self._wake_up.send(b"x")
        assert done.wait(10), f"the proxy does not answer: {self._failure!r}"

    def _on_halves(
        self, directions: tuple[Direction, ...], number: int | None, change: Callable[[_Half], None]
    ) -> None:
        def run() -> None:
            for connection in self._chosen(number):
                for half in connection.halves:
                    if not directions or half.direction in directions:
                        change(half)

        self._call(run)

    def _chosen(self, number: int | None) -> list[_Connection]:
        return [one for one in self._connections if number is None or one.passage.number == number]

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            self._failure = error
        finally:
            self._refuse()
            for connection in list(self._connections):
                self._close(connection, "rst", "closed")
            self._selector.close()
            with self._changed:
                self._changed.notify_all()

    def _turn(self) -> None:
        """Wait for the sockets' events, then serve all connections."""
        now = time.monotonic()
        wanted: dict[socket.socket, int] = {self._woken: selectors.EVENT_READ}
        if self._listening is not None:
            wanted[self._listening] = selectors.EVENT_READ
        deadlines: list[float] = []
        for connection in self._connections:
            for sock, events in self._wanted(connection, deadlines).items():
                wanted[sock] = wanted.get(sock, 0) | events
        for key in list(self._selector.get_map().values()):
            if key.fileobj not in wanted:
                self._selector.unregister(key.fileobj)
        for sock, events in wanted.items():
            if sock not in self._selector.get_map():
                self._selector.register(sock, events)
            elif self._selector.get_key(sock).events != events:
                self._selector.modify(sock, events)
        timeout = max(0.0, min(deadlines) - now) if deadlines else None
        ready = {key.fileobj: events for key, events in self._selector.select(timeout)}
        if self._woken in ready:
            self._woken.recv(1024)
        while self._commands:
            self._commands.popleft()()
        for connection in list(self._connections):
            self._serve(connection, ready)
        if self._listening is not None and self._listening in ready:
            self._accept(self._listening)
        with self._changed:
            self._changed.notify_all()

    def _wanted(self, connection: _Connection, deadlines: list[float]) -> dict[socket.socket, int]:
        wanted: dict[socket.socket, int] = {}

        def want(sock: socket.socket, event: int) -> None:
            wanted[sock] = wanted.get(sock, 0) | event

        if connection.connecting:
            want(connection.far, selectors.EVENT_WRITE)
            return wanted
        if connection.lingering is not None:
            deadlines.append(connection.lingering)
        for half in connection.halves:
            source, sink = connection.ends_of(half)
            if not half.ended and (connection.lingering is not None or (not half.frozen and half.held < HELD)):
                want(source, selectors.EVENT_READ)
            if half.queue and not half.frozen and connection.lingering is None and self._passable(half):
                want(sink, selectors.EVENT_WRITE)
        return wanted

    @staticmethod
    def _passable(half: _Half) -> bool:
        """Tell whether the next byte may pass, or whether the connection is cut at it."""
        return half.allowed() > 0 or half.cut == half.passed

    def _accept(self, listening: socket.socket) -> None:
        try:
            near, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        near.setblocking(False)
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._changed:
            passage = Passage(len(self._passages))
            self._passages.append(passage)
        far = self._make_far()
        far.setblocking(False)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(passage, self.plan(passage.number), near, far, self._clock())
        self._connections.append(connection)
        if (problem := far.connect_ex(self._target)) not in (0, errno.EINPROGRESS):
            self._close(connection, "rst", f"unreachable: {errno.errorcode.get(problem, problem)}")

    def _serve(self, connection: _Connection, ready: Mapping[Any, int]) -> None:
        far = connection.far
        if not connection.passage.open:
            return
        if connection.connecting:
            if ready.get(far, 0):
                if problem := far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    self._close(connection, "rst", f"unreachable: {errno.errorcode.get(problem, problem)}")
                connection.connecting = False
            return
        try:
            for half in connection.halves:
                source, sink = connection.ends_of(half)
                if ready.get(source, 0) & selectors.EVENT_READ and not half.ended:
                    self._read(connection, half, source)
                if connection.lingering is None and not self._write(connection, half, sink):
                    return
        except BlockingIOError:
            return
        except OSError:
            self._close(connection, "rst", "reset")
            return
        if connection.lingering is not None:
            if all(half.ended for half in connection.halves) or time.monotonic() >= connection.lingering:
                self._close(connection, "fin", connection.passage.end)
        elif all(half.told for half in connection.halves):
            self._close(connection, "fin", "both ended")

    def _read(self, connection: _Connection, half: _Half, source: socket.socket) -> None:
        data = source.recv(READ)
        if not data:
            half.ended = True
        elif connection.lingering is None:
            forget, seen = connection.plan.forget, self._clock()
            if forget and seen - connection.moved_at > forget:
                for one in connection.halves:
                    one.swallowing = True
            connection.moved_at = seen
            half.take(data)

    def _write(self, connection: _Connection, half: _Half, sink: socket.socket) -> bool:
        """Pass on what may pass now; return false when that ended the connection."""
        while half.queue and not half.frozen:
            if half.cut == half.passed:
                self._end(connection, connection.plan.how, "planned")
                return False
            most = half.allowed()
            if most <= 0:
                return True
            chunk = half.queue[0]
            try:
                sent = sink.send(chunk[: min(most, half.segment or most)])
            except BlockingIOError:
                return True
            half.passed += sent
            half.held -= sent
            with self._changed:
                connection.passage.up, connection.passage.down = connection.up.passed, connection.down.passed
            if sent == len(chunk):
                half.queue.popleft()
            else:
                half.queue[0] = chunk[sent:]
        if half.ended and not half.queue and not half.told and not half.frozen:
            half.told = True
            sink.shutdown(socket.SHUT_WR)
        return True

    def _end(self, connection: _Connection, how: How, why: str) -> None:
        """End both sides; after a FIN, read and drop for a while what they still send."""
        if how == "rst" or connection.connecting:
            self._close(connection, how, why)
            return
        if connection.lingering is not None:
            return
        connection.lingering = time.monotonic() + LINGER
        connection.passage.end = why
        for sock in (connection.near, connection.far):
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._close(connection, "rst", why)  # gone already
                return

    def _close(self, connection: _Connection, how: How, why: str) -> None:
        if not connection.passage.open:
            return
        self._connections.remove(connection)
        with self._changed:  # before either end can see it on the sockets
            connection.passage.open = False
            connection.passage.end = why
        for sock in (connection.near, connection.far):
            if sock in self._selector.get_map():
                self._selector.unregister(sock)
            if how == "rst":
                reset(sock)
            else:
                sock.close()


def reset(sock: socket.socket) -> None:
    """Close a TCP socket by RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
