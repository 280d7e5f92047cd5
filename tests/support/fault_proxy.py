"""A TCP proxy that breaks things on purpose: cut, freeze, flip; by plan or by command.

    with FaultProxy(("127.0.0.1", port), plan=lambda number: Plan(cut_up=300, how="fin")) as proxy:
        ...                       # connect to proxy.address instead
        proxy.freeze("down")      # and later: thaw, cut

*Up* is from the dialling end towards the target, *down* the other way. A plan is made for each connection when it is
accepted (they are numbered from 0); commands act on the connections that are open. An event loop in a thread of its own
does all of it, so a test may use the proxy from anywhere, with an event loop or without.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tests.support.stopping import Stopping

Direction = Literal["up", "down"]
How = Literal["fin", "rst"]
T = TypeVar("T")

READ = 64 * 1024
"""Bytes that are taken from a source before they are passed on; a frozen direction takes no more."""
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


class _Cut(Exception):
    """The plan ends the connection here."""


class _Half:
    """One direction of one connection."""

    def __init__(self, direction: Direction, plan: Plan, source: socket.socket, sink: socket.socket) -> None:
        self.direction: Direction = direction
        self.cut, self.stop_at, self.flip = (
            getattr(plan, f"{fault}_{direction}") for fault in ("cut", "freeze", "flip")
        )
        self.source, self.sink = source, sink
        self.passes = asyncio.Event()
        """Clear while the direction is frozen."""
        self.passes.set()
        self.passed = 0

    async def carry(self, moved: Callable[[], None]) -> None:
        """Pass on what comes, up to the source's end; `moved` is called for each piece. Raises `_Cut`, OSError."""
        loop = asyncio.get_running_loop()
        while data := bytearray(await loop.sock_recv(self.source, READ)):
            if self.flip is not None and 0 <= self.flip - self.passed < len(data):
                data[self.flip - self.passed] ^= 0x10
            while data:
                await self.passes.wait()
                if self.cut == self.passed:
                    raise _Cut
                if self.stop_at == self.passed:
                    self.passes.clear()
                    continue
                faults = [at - self.passed for at in (self.cut, self.stop_at) if at is not None]
                piece = data[: min([READ, *faults])]
                await loop.sock_sendall(self.sink, piece)
                self.passed += len(piece)
                moved()
                del data[: len(piece)]
        await self.passes.wait()
        self.sink.shutdown(socket.SHUT_WR)


class _Connection:
    """Two sockets and the two directions between them."""

    def __init__(self, proxy: FaultProxy, passage: Passage, plan: Plan, near: socket.socket) -> None:
        self.passage = passage
        self.plan = plan
        self.near, self.far = near, proxy._make_far()
        for sock in (self.near, self.far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.halves = (_Half("up", plan, self.near, self.far), _Half("down", plan, self.far, self.near))
        self.commanded: tuple[How, str] = ("rst", "closed")
        """How and why a cancelled connection ends."""
        self.ended = asyncio.Event()
        """Set when both sides have been given the end."""
        self._proxy = proxy
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        how: How = "fin"
        why = "both ended"
        try:
            how, why = await self._carry()
        except asyncio.CancelledError:
            how, why = self.commanded
        with self._proxy._changed:  # before either end can see it on the sockets
            self.passage.end = why
        if how == "fin" and why != "both ended":
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._linger()
        with self._proxy._changed:
            self.passage.open = False
            self._proxy._changed.notify_all()
        for sock in (self.near, self.far):
            if how == "rst":
                reset(sock)
            else:
                sock.close()
        self.ended.set()

    async def _carry(self) -> tuple[How, str]:
        """Pass on both directions to their ends; return how and why both sides end."""
        try:
            await asyncio.get_running_loop().sock_connect(self.far, self._proxy._target)
        except OSError as error:
            return "rst", f"unreachable: {errno.errorcode.get(error.errno or 0, error.errno)}"
        ways = [asyncio.ensure_future(half.carry(self._moved)) for half in self.halves]
        try:
            await asyncio.gather(*ways)
        except _Cut:
            return self.plan.how, "planned"
        except OSError:
            return "rst", "reset"
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        return "fin", "both ended"

    async def _linger(self) -> None:
        """End both sides by FIN; read and drop for a while what they still send."""
        loop = asyncio.get_running_loop()

        async def drop(sock: socket.socket) -> None:
            while await loop.sock_recv(sock, READ):
                pass

        for sock in (self.near, self.far):
            sock.shutdown(socket.SHUT_WR)
        self.ended.set()
        async with asyncio.timeout(LINGER):
            await asyncio.gather(drop(self.near), drop(self.far))

    def _moved(self) -> None:
        with self._proxy._changed:
            self.passage.up, self.passage.down = (half.passed for half in self.halves)
            self._proxy._changed.notify_all()


class FaultProxy(Stopping):
    """The proxy. Use as a context manager, or `stop` it.

    `make_near` and `make_far` make its sockets; those of a network namespace stay in it.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        plan: Callable[[int], Plan] = lambda number: Plan(),
        listen: tuple[str, int] = ("127.0.0.1", 0),
        make_near: Callable[[], socket.socket] = socket.socket,
        make_far: Callable[[], socket.socket] = socket.socket,
    ) -> None:
        self.plan = plan
        """Asked at each accept, in the proxy's thread."""
        self._target = target
        self._make_near, self._make_far = make_near, make_far
        self._connections: list[_Connection] = []
        self._passages: list[Passage] = []
        self._changed = threading.Condition()
        self._listening = self._listen(listen)
        host, port = self._listening.getsockname()[:2]
        self.host, self.port = str(host), int(port)
        self._loop = asyncio.SelectorEventLoop()
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="fault proxy")
        self._thread.start()

    def _listen(self, address: tuple[str, int]) -> socket.socket:
        listening = self._make_near()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)
        listening.setblocking(False)
        return listening

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
        return sum(passage.open for passage in self.passages)

    def wait(self, look: Callable[[], object], timeout: float = 15) -> None:
        """Wait until `look` is true; it is asked whenever bytes have passed. Raises AssertionError at the deadline."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not look():
                left = deadline - time.monotonic()
                assert left > 0, f"not within {timeout} s; {self._passages}"
                self._changed.wait(min(left, 0.2))

    # -- command --------------------------------------------------------------------------------------------------

    def freeze(self, *directions: Direction) -> None:
        """Pass on nothing more of these directions (both, if none is named); the sockets stay open."""

        async def freeze() -> None:
            for connection in self._connections:
                for half in connection.halves:
                    if not directions or half.direction in directions:
                        half.passes.clear()

        self._call(freeze())

    def thaw(self) -> None:
        """Pass on held and new bytes again, also where a plan has frozen the direction."""

        async def thaw() -> None:
            for connection in self._connections:
                for half in connection.halves:
                    half.stop_at = None
                    half.passes.set()

        self._call(thaw())

    def cut(self, how: How = "rst") -> int:
        """End the open connections now and return how many there were. Held bytes are lost."""
        return self._call(self._cut(how, "commanded"))

    def refuse(self) -> None:
        """Refuse new connections; those that are open stay. `listen` has named a port that no other program takes."""
        self._call(self._refuse())

    def accept_again(self) -> None:
        """Listen again, after `refuse`, on the same port."""

        async def listen() -> None:
            self._listening = self._listen((self.host, self.port))
            self._accepting = asyncio.ensure_future(self._accept())

        self._call(listen())

    def stop(self) -> None:
        """Stop listening, close all connections (by RST) and end the thread; raise the error of a plan, if any."""
        if self._loop.is_closed():
            return
        try:
            self._call(self._end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    # -- in the thread --------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _accept(self) -> None:
        while True:
            try:
                near, _ = await self._loop.sock_accept(self._listening)
            except ConnectionAbortedError:
                continue
            with self._changed:
                passage = Passage(len(self._passages))
                self._passages.append(passage)
            connection = _Connection(self, passage, self.plan(passage.number), near)
            self._connections.append(connection)
            connection.task.add_done_callback(lambda _, one=connection: self._connections.remove(one))

    async def _refuse(self) -> None:
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listening.close()

    async def _cut(self, how: How, why: str) -> int:
        await asyncio.sleep(0)  # a task that is cancelled before it has begun would do nothing
        running = [one for one in self._connections if not one.ended.is_set()]
        for one in running:
            one.commanded = (how, why)
            one.task.cancel()
        for one in running:
            await one.ended.wait()
        return len(running)

    async def _end(self) -> None:
        await self._refuse()
        await self._cut("rst", "closed")
        for one in list(self._connections):  # that still read what comes behind a FIN
            one.task.cancel()
            await asyncio.wait([one.task])
        if not self._accepting.cancelled():
            self._accepting.result()


def reset(sock: socket.socket) -> None:
    """Close a TCP socket by RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
