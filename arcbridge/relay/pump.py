"""The pump: bytes between two raw TCP sockets, both ways, unread.

Rules:

1. What goes in comes out, in order, once. FIN passes as FIN after the last byte, RST passes as RST, and a pair that
   is cut here ends with RST on both sides: a cut never looks like an end.
2. At most 256 KiB are held per direction; while any are, that direction reads nothing.
3. One wake-up moves at most `BUDGET` bytes, so a pair at full speed cannot starve fifty interactive ones.
4. No task, no future, no timer per pair: callbacks of the loop on the two descriptors, and one sweep for all.
5. What dies on one side is cut on the other at once: an end that resumes must not wait for a timeout. A socket that is
   being read says so itself; one that is not (its bytes are held, or its direction is over) is asked every second.
   Only those: a sweep over all of ten thousand idle pairs would cost more than all their pings.
6. Callbacks are removed *before* a descriptor is closed, and its number is forgotten in the same breath: the kernel
   gives the number to the next socket, and a late callback or splice would move another pair's bytes.
7. The loop's time is charged to the user of the pair: each move of bulk, and of small reads one in `SAMPLE`, because
   two clocks would be a twentieth of one. Where the user takes too much, both directions stop reading for moments
   (`pump_accounts`): TCP holds the senders back, and nothing is lost.

Two paths. A small message is read into one buffer that all pairs share and sent at once: two system calls. Once a
read comes back large, the direction is *bulk* and bytes move by `splice` through a pipe of the pool, without ever
being copied into this process; when reads get small again, or the pool has no pipe, it goes back to copying.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from arcbridge.identity.claims import Identity
from arcbridge.loop_shares import LoopTime, LoopTimes
from arcbridge.net.sockets import reset
from arcbridge.relay.pipes import Pipe, PipePool
from arcbridge.relay.pump_accounts import PumpAccount
from arcbridge.relay.tcp_state import round_trip
from arcbridge.socket_options import set_keepalive

BUDGET: Final = 512 * 1024
"""Bytes per direction and wake-up, so that one pair leaves the loop to the others soon."""
HELD: Final = 256 * 1024
"""Bytes taken from one socket before they are offered to the other."""
BULK: Final = 16 * 1024
"""A read of this size makes a direction bulk: below it a copy should be cheaper than two more system calls. Chosen, not
measured."""
SMALL: Final = 4 * 1024
"""A splice of less ends bulk."""
SWEEP: Final = 1.0
"""Seconds between two looks at pairs of which a side is not being read."""
UNLOAD_EVERY: Final = 10
"""Looks between two at the pipes that stalled receivers keep."""
SAMPLE: Final = 16
"""Small reads of a direction of which one is measured."""
PAYERS: Final = 16_384
"""Users, and clusters whose pairs come from another relay, whose time of the loop is remembered."""
KEEPALIVE: Final = {"idle": 15, "interval": 5, "probes": 3}
"""Seconds, seconds, probes: with the user timeout of 30 s a peer that vanished is noticed within 30 s of its last word.
An end that lives is never quiet for longer than the 10 s of a PING, so no probe is sent to one."""

_BUFFER: Final = bytearray(64 * 1024)
_VIEW: Final = memoryview(_BUFFER)
# Linux: do not block, and the bytes may be moved instead of copied.
_FLAGS: Final = getattr(os, "SPLICE_F_NONBLOCK", 0) | getattr(os, "SPLICE_F_MOVE", 0)


class Pump:
    """One pair. It owns both sockets from `start` on and calls `Pumps.ended` once, after both are closed.

    `error` is None when both directions ended in order. `client` asked for the session, `agent` answered.
    """

    __slots__ = (
        "_on_done",
        "_to_agent",
        "_to_client",
        "agent",
        "closed",
        "cluster",
        "error",
        "first_session",
        "identity",
        "join_id",
        "not_reading",
        "on_ended",
        "paused",
        "payer",
        "pipes",
        "restricted",
        "source",
        "started_at",
    )

    def __init__(
        self,
        client: socket.socket,
        agent: socket.socket,
        pumps: Pumps,
        *,
        join_id: str = "",
        cluster: str = "",
        identity: Identity | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.join_id = join_id
        self.cluster = cluster
        self.identity = identity
        """Whose session it is, as the access token said at the join. None where another relay of the fleet knows: it
        holds the client's end, and a cut there ends this pair, too."""
        self.agent = self.source = self.first_session = self.restricted = ""
        """For people: the agent's instance, the client's address, and, as the client says it, the join id under which
        the session began (empty where it began with this join) and what it gave up. Set by `Rendezvous`."""
        self.pipes = pumps.pipes
        self.not_reading = pumps.not_reading
        """The set it adds itself to when a side is no longer read; the sweep takes it out."""
        self.on_ended: Callable[[], None] | None = None
        """Called once, after both sockets are closed, besides what `Pumps` was given for all."""
        self.payer = pumps.payer_of(identity, cluster)
        """Who pays for the loop's time."""
        self.paused = False
        """Whether neither side is read because the user takes too much of the loop."""
        self.closed = False
        self.error: OSError | None = None
        self.started_at = loop.time()
        self._on_done = pumps.ended
        self._to_agent = _Direction(self, loop, client, agent)
        self._to_client = _Direction(self, loop, agent, client)

    @property
    def round_trip(self) -> float:
        """Seconds from the client to the agent and back, as far as TCP shows them; 0 where one part is not known."""
        parts = [round_trip(one.source) for one in (self._to_agent, self._to_client)]
        return round(sum(parts), 6) if all(parts) else 0.0

    def start(self, *, to_agent: bytes = b"", to_client: bytes = b"") -> None:
        """Begin, with the bytes that came behind the outer TLS of each end."""
        for sock in (self._to_agent.source, self._to_client.source):
            set_keepalive(sock, **KEEPALIVE)
        self._to_agent.start(to_agent)
        if not self.closed:
            self._to_client.start(to_client)

    @property
    def bytes_to_agent(self) -> int:
        """Bytes passed from client to agent."""
        return self._to_agent.moved

    @property
    def bytes_to_client(self) -> int:
        """Bytes passed from agent to client."""
        return self._to_client.moved

    def abort(self, reason: str = "cut by the relay") -> None:
        """End both sides with RST."""
        self.fail(ConnectionAbortedError(reason))

    def pause(self) -> None:
        """Read neither side until `go_on`; what is held is still passed on."""
        self.paused = True
        self.not_reading.add(self)
        self._to_agent.pause()
        self._to_client.pause()

    def go_on(self) -> None:
        """Read both sides again."""
        self.paused = False
        self._to_agent.go_on()
        self._to_client.go_on()

    def look(self) -> bool:
        """Fail where a side that is not being read has died: nothing else notices until the other side moves. Return
        false when both are read again."""
        not_reading = False
        for one in (self._to_agent, self._to_client):
            if self.closed or not one.not_reading:
                continue
            not_reading = True
            # The error itself and not the connection's state: both ends may have closed a socket in order, with bytes
            # in it that are still to be read.
            if code := one.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.fail(OSError(code, f"{os.strerror(code)}, while it was not being read"))
        return not_reading

    def unload(self) -> None:
        """Give back pipes that a stalled receiver keeps."""
        self._to_agent.unload()
        self._to_client.unload()

    # -- for the two directions ------------------------------------------------------------------------------------

    def direction_over(self) -> None:
        if self._to_agent.over and self._to_client.over:
            self._end(socket.socket.close)

    def fail(self, error: OSError) -> None:
        if not self.closed:
            self.error = error
            self._end(reset)

    def _end(self, close: Callable[[socket.socket], None]) -> None:
        self.closed = True
        self._to_agent.detach()
        self._to_client.detach()
        close(self._to_agent.source)
        close(self._to_client.source)
        self._on_done(self)


@dataclass(slots=True, eq=False, repr=False)
class _Direction:
    """From `source` to `sink`. Reading, or waiting until `sink` takes what is held: never both."""

    _pump: Pump
    _loop: asyncio.AbstractEventLoop
    source: socket.socket
    sink: socket.socket
    _source_fd: int = field(init=False)
    _sink_fd: int = field(init=False)
    _recv_into: Callable[[bytearray], int] = field(init=False)
    _send: Callable[[bytes | memoryview], int] = field(init=False)
    _payer: LoopTime = field(init=False)
    _memory: bytes = b""
    _pipe: Pipe | None = None
    _piped: int = 0
    _bulk: bool = False
    _reading: bool = False
    _writing: bool = False
    _unmeasured: int = 0
    """Small reads until one is measured; 0 during bulk, of which each move is."""
    _left: int = 0
    """The same before bulk began."""
    ended: bool = False
    """The source has sent FIN."""
    over: bool = False
    """... and it has been passed on."""
    moved: int = 0
    """Bytes that were passed on."""

    def __post_init__(self) -> None:
        self._source_fd, self._sink_fd = self.source.fileno(), self.sink.fileno()
        self._recv_into, self._send = self.source.recv_into, self.sink.send
        self._payer = self._pump.payer

    @property
    def not_reading(self) -> bool:
        """Whether the source is not being read."""
        return not self._reading

    def start(self, first: bytes) -> None:
        if first:
            self._memory = first
            self.on_writable()
            if self._memory:  # else it reads already
                self._want_write()
        else:
            self._want_read()

    # -- callbacks -------------------------------------------------------------------------------------------------

    def on_readable(self) -> None:
        """Pass on what has come. Nothing is held; the path of a small message comes first and is the shortest."""
        if not self._unmeasured:
            if self._bulk:
                self._payer.run(self._move)
            else:
                self._unmeasured = SAMPLE
                self._payer.run_sample(self.on_readable, SAMPLE)
            return
        self._unmeasured -= 1
        try:
            count = self._recv_into(_BUFFER)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._pump.fail(error)
            return
        if not count:
            self._end()
            return
        try:
            sent = self._send(_VIEW[:count])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._pump.fail(error)
            return
        self.moved += sent
        if count >= BULK:
            self._bulk, self._left, self._unmeasured = True, self._unmeasured, 0
        if sent < count:
            self._memory = bytes(_VIEW[sent:count])
            self._want_write()

    def on_writable(self) -> None:
        """Offer what is held; when all is gone, go on reading."""
        try:
            if self._memory:
                sent = self._send(self._memory)
                self.moved += sent
                self._memory = self._memory[sent:]
                if self._memory:
                    return
            pipe = self._pipe
            if pipe is not None:
                while self._piped:
                    sent = os.splice(pipe.reader, self._sink_fd, self._piped, flags=_FLAGS)
                    self.moved += sent
                    self._piped -= sent
                self._pipe = None
                self._pump.pipes.give(pipe)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._pump.fail(error)
            return
        if self.ended:
            self._finish()
        elif self._bulk and not self._pump.paused:
            # Straight on: while the sink is the slower one, the set of callbacks need not change at all.
            self._move()
        else:
            self._want_read()

    # -- bulk ------------------------------------------------------------------------------------------------------

    def _move(self) -> None:
        pipes = self._pump.pipes
        pipe = pipes.take()
        if pipe is None:
            self._end_bulk()
            self._want_read()
            return
        reader, writer = pipe.reader, pipe.writer
        source, sink = self._source_fd, self._sink_fd
        piped = 0
        budget = BUDGET
        try:
            while budget > 0:
                piped = count = os.splice(source, writer, HELD, flags=_FLAGS)
                if not count:
                    pipes.give(pipe)
                    self._end()
                    return
                budget -= count
                while piped:
                    sent = os.splice(reader, sink, piped, flags=_FLAGS)
                    self.moved += sent
                    piped -= sent
                if count < SMALL:
                    self._end_bulk()
                    break
        except (BlockingIOError, InterruptedError):
            if piped:
                self._pipe = pipe
                self._piped = piped
                self._want_write()
                return
        except OSError as error:
            if piped:
                pipes.discard(pipe)
            else:
                pipes.give(pipe)
            self._pump.fail(error)
            return
        pipes.give(pipe)
        if not self._reading:
            self._want_read()

    def _end_bulk(self) -> None:
        self._bulk, self._unmeasured = False, self._left

    def unload(self) -> None:
        """Move bytes that wait in a pipe into memory, so that the pool has its pipe back."""
        pipe = self._pipe
        if pipe is None:
            return
        waiting = bytearray()
        while len(waiting) < self._piped:
            waiting += os.read(pipe.reader, self._piped - len(waiting))
        self._memory += bytes(waiting)
        self._piped = 0
        self._pipe = None
        self._pump.pipes.give(pipe)

    # -- ends ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        self.ended = True
        self._finish()

    def _finish(self) -> None:
        """Pass the source's FIN on: all that it ever sent has been taken."""
        self._stop()
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._pump.fail(error)
            return
        self.over = True
        self._pump.not_reading.add(self._pump)
        self._pump.direction_over()

    def detach(self) -> None:
        """Remove the callbacks, forget the descriptors' numbers, drop what is held."""
        self._stop()
        self._source_fd = self._sink_fd = -1
        self._memory = b""
        if self._pipe is not None:
            self._pump.pipes.discard(self._pipe)
            self._pipe = None
            self._piped = 0

    # -- the loop's callbacks: exactly one of the two is registered ------------------------------------------------

    def pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._source_fd)

    def go_on(self) -> None:
        if not self.ended and not self._writing:
            self._want_read()

    def _want_read(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sink_fd)
        if not self._reading and not self._pump.paused:
            self._reading = True
            self._loop.add_reader(self._source_fd, self.on_readable)

    def _want_write(self) -> None:
        self.pause()
        self._pump.not_reading.add(self._pump)
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._sink_fd, self._payer.run, self.on_writable)

    def _stop(self) -> None:
        self.pause()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sink_fd)


class Pumps:
    """All pairs of a process: the one sweep, the counters, and who pays for the loop's time."""

    def __init__(
        self,
        on_done: Callable[[Pump], None],
        *,
        pipes: PipePool | None = None,
        payers: LoopTimes[tuple[str, str]] | None = None,
    ) -> None:
        """`on_done`: the first to be called for each pump that ended; more may be appended. `payers`: users' times of
        the loop; without them no user is slowed down."""
        self._loop = asyncio.get_running_loop()
        self.on_done = [on_done]
        self._open: set[Pump] = set()
        self.not_reading: set[Pump] = set()
        """Those of which a side was not being read at some moment since the last look."""
        self._timer: asyncio.TimerHandle | None = None
        self._sweeps = 0
        self.payers = payers or LoopTimes(0.0, size=PAYERS)
        self._accounts: dict[LoopTime, PumpAccount] = {}
        """Those of the payers that have a pair."""
        self.pipes = pipes or PipePool()
        self.total = 0
        self.bytes_to_agent = 0
        self.bytes_to_client = 0

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Pump]:
        return iter(self._open)

    def join(
        self,
        client: socket.socket,
        agent: socket.socket,
        *,
        to_agent: bytes = b"",
        to_client: bytes = b"",
        join_id: str = "",
        cluster: str = "",
        identity: Identity | None = None,
        on_ended: Callable[[], None] | None = None,
    ) -> Pump:
        """Pair two raw sockets, which belong to the pump from here on, also where this raises: then they are closed.
        `identity`: whose session it is."""
        pump = Pump(client, agent, self, join_id=join_id, cluster=cluster, identity=identity)
        pump.on_ended = on_ended
        account = self._accounts.get(pump.payer)
        if account is None:
            account = self._accounts[pump.payer] = PumpAccount(pump.payer)
        self._open.add(pump)
        self.total += 1
        if self._timer is None:
            self._timer = self._loop.call_later(SWEEP, self._sweep)
        account.pumps.add(pump)
        try:
            pump.start(to_agent=to_agent, to_client=to_client)
            account.hold(pump)
        except BaseException:
            pump.abort("the pair could not begin")
            raise
        return pump

    def payer_of(self, identity: Identity | None, cluster: str = "") -> LoopTime:
        """Return who pays for the loop's time: the user for all pairs, the cluster where another relay knows users."""
        key = ("cluster", cluster) if identity is None else ("user", identity.subject)
        return self.payers.of(key, time.monotonic())

    def bytes(self) -> tuple[int, int]:
        """Return the bytes (to agents, to clients) of ended and running pairs."""
        return (
            self.bytes_to_agent + sum(pump.bytes_to_agent for pump in self._open),
            self.bytes_to_client + sum(pump.bytes_to_client for pump in self._open),
        )

    def close(self) -> None:
        """Cut all pairs."""
        for pump in list(self._open):
            pump.abort()
        self.pipes.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._timer = self._loop.call_later(SWEEP, self._sweep) if self._open else None
        self._sweeps += 1
        unload = self._sweeps % UNLOAD_EVERY == 0
        for pump in list(self.not_reading):
            if not pump.look():
                self.not_reading.discard(pump)
            elif unload and not pump.closed:
                pump.unload()

    def ended(self, pump: Pump) -> None:
        """Take a pump out, whose sockets are closed."""
        self._open.discard(pump)
        self.not_reading.discard(pump)
        account = self._accounts[pump.payer]
        account.pumps.discard(pump)
        if not account.pumps:
            account.close()
            del self._accounts[pump.payer]
        self.bytes_to_agent += pump.bytes_to_agent
        self.bytes_to_client += pump.bytes_to_client
        if pump.on_ended is not None:
            pump.on_ended()
        for done in self.on_done:
            done(pump)
