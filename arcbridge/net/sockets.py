"""Raw non-blocking sockets: the options that every connection of arcbridge gets, waiting, accepting, resetting.

Nothing here knows TLS or frames. A wait that is cancelled leaves no callback behind, and a listening socket that is out
of descriptors is never asked in a loop: it stays readable, and would take all of the process' time.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from arcbridge.net.descriptors import EXHAUSTED
from arcbridge.socket_options import reset_on_close, set_tcp_option

_USER_TIMEOUT_MS: Final = 30_000
"""Above PING's 25 s, so that the ends notice first and can say why. It also counts a peer that ACKs but does not
read (a zero window), which is wanted between the roles and must not be set on kubectl's own sockets."""
_NOTSENT_LOWAT: Final = 128 * 1024
"""Unsent bytes the kernel may hold per socket: what waits in there a keystroke can no longer overtake. Smaller should
cost wake-ups on fast links; on a noisy loopback two runs each of 64 KiB to 1 MiB showed no difference in CPU per byte
beyond the noise, and throughput varied too much to tell. The value is a start, not a result. It bounds this socket
alone: what waits in all of them on the way, the relay's and the modem's included, is bounded by `wire.congestion`."""
_TCP: Final = {"NODELAY": 1, "KEEPIDLE": 30, "KEEPINTVL": 10, "KEEPCNT": 3, "NOTSENT_LOWAT": _NOTSENT_LOWAT}
_OPTIONS: Final = [
    (socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
    for name, value in _TCP.items()
    if hasattr(socket, f"TCP_{name}")
]
"""Of every connection, as far as the system has them; looked up once, because an agent sets them for each stream."""
_ALONE: Final = 16
"""Times in a row that one connection is accepted and no second one looked for. Behind those more may be queued."""
ACCEPT_BURST: Final = 16
"""Connections accepted per wake-up and socket, about 1 ms of work; the loop does other things in between."""
ACCEPT_PAUSE: Final = 0.25
"""Seconds without accepting after descriptors ran out: long enough to cost nothing, short enough to go unnoticed."""


def tune(sock: socket.socket, *, user_timeout: bool = True) -> None:
    """Set no delay, keepalive (30 s, then 3 probes 10 s apart), user timeout, a shallow send queue. Non-blocking."""
    if sock.gettimeout() != 0.0:
        sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in _OPTIONS:
        sock.setsockopt(*option)
    if user_timeout:
        enable_user_timeout(sock)


def enable_user_timeout(sock: socket.socket) -> None:
    """Lose the connection when the peer has confirmed nothing of what was sent for 30 s: the kernel's own repetitions
    end after a quarter of an hour, and its keepalive waits for them."""
    set_tcp_option(sock, "TCP_USER_TIMEOUT", _USER_TIMEOUT_MS)


def disable_user_timeout(sock: socket.socket) -> None:
    """Let a peer that is no role of ours stop reading for as long as it likes without losing the connection.

    TCP_USER_TIMEOUT counts a zero window as no answer; between the roles that is wanted, because they always read.
    """
    set_tcp_option(sock, "TCP_USER_TIMEOUT", 0)


def reset(sock: socket.socket) -> None:
    """Close with RST, so that the peer sees a cut and never a complete end. The socket must have no callbacks left."""
    reset_on_close(sock)
    sock.close()


class AcceptLoop:
    """Accepts on listening, non-blocking sockets, which it owns: `start`, then `close`.

    `accepted(sock, host)` takes each connection, which is non-blocking. `exhausted(listening, error, again)` is told
    when no descriptor is left, before accepting pauses; `again`: the pause before has not helped.
    """

    def __init__(
        self,
        listening: Sequence[socket.socket],
        accepted: Callable[[socket.socket, str], None],
        exhausted: Callable[[socket.socket, OSError, bool], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listening = tuple(listening)
        self._accepted = accepted
        self._exhausted = exhausted
        self._resuming: asyncio.TimerHandle | None = None
        self._again = False
        """Whether the last try to accept found no descriptor."""
        self._found = 0
        """Times in a row that all connections were there that were looked for."""

    def start(self) -> None:
        """Accept from now on."""
        self._resuming = None
        for sock in self._listening:
            self._loop.add_reader(sock, self._accept, sock, *_kind(sock))

    def close(self) -> None:
        """Stop accepting and close the sockets; the kernel resets what it has queued for them."""
        self._remove_readers()
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        for sock in self._listening:
            sock.close()
        self._listening = ()

    def release(self) -> tuple[socket.socket, ...]:
        """Stop accepting and return the sockets, open: what is queued for them waits for the next who accepts."""
        listening = self._listening
        self._remove_readers()
        self._listening = ()
        self.close()
        return listening

    def resume(self, listening: Sequence[socket.socket]) -> None:
        """Accept again on sockets that were released."""
        self._listening = tuple(listening)
        self.start()

    def accept(self) -> bool:
        """Take what is queued now; say whether there may be more."""
        return any([self._accept(sock, *_kind(sock)) for sock in self._listening])

    def _accept(self, listening: socket.socket, family: int, kind: int, protocol: int) -> bool:
        self._found += 1
        for _ in range(1 if self._found <= _ALONE else ACCEPT_BURST):
            if not self._listening:  # `accepted` has closed it
                return False
            try:
                descriptor, address = listening._accept()  # type: ignore[attr-defined]  # what `accept` calls
            except (BlockingIOError, InterruptedError):
                self._found = 0
                return False
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._pause(listening, error)
                    return False
                # The peer left between its SYN and now; the others wait.
                continue
            self._again = False
            # As `accept` does, which makes an enum of each number first: six calls for each connection.
            sock = socket.socket(family, kind, protocol, fileno=descriptor)
            sock.setblocking(False)
            self._accepted(sock, str(address[0]))
        return True

    def _pause(self, listening: socket.socket, error: OSError) -> None:
        again, self._again = self._again, True
        self._remove_readers()
        if self._resuming is None:
            self._resuming = self._loop.call_later(ACCEPT_PAUSE, self.start)
        self._exhausted(listening, error, again)

    def _remove_readers(self) -> None:
        for sock in self._listening:
            self._loop.remove_reader(sock)


def _kind(sock: socket.socket) -> tuple[int, int, int]:
    return int(sock.family), int(sock.type), sock.proto


async def readable(sock: socket.socket) -> None:
    """Return when `sock` has bytes, an end or an error. One reader per socket; a cancelled call leaves nothing."""
    loop = asyncio.get_running_loop()
    await _wait(sock, loop.add_reader, loop.remove_reader)


async def writable(sock: socket.socket) -> None:
    """Return when `sock` takes bytes again, is connected, or has an error."""
    loop = asyncio.get_running_loop()
    await _wait(sock, loop.add_writer, loop.remove_writer)


async def _wait(sock: socket.socket, add: Callable[..., None], remove: Callable[[int], object]) -> None:
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    descriptor = sock.fileno()
    if descriptor < 0:
        raise ConnectionAbortedError("the socket was closed")
    add(descriptor, _wake, waiter)
    try:
        await waiter
    finally:
        remove(descriptor)


async def receive(sock: socket.socket, size: int) -> bytes:
    """Return at most `size` bytes, b"" at the end; raises `OSError`. A cancelled call has taken no byte."""
    while True:
        try:
            return sock.recv(size)
        except (BlockingIOError, InterruptedError):
            await readable(sock)


class SocketReader:
    """Receives from one socket, whose registration at the loop it keeps from one wait to the next: with uvloop one
    costs six system calls. `stop` before the socket is closed, or belongs to another part.

    Bytes that come while nothing waits for them end the registration, so that they do not keep the loop awake.
    """

    __slots__ = ("_descriptor", "_loop", "_on_readable", "_sock", "deadline")

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._descriptor = -1
        """That which is registered; -1: none."""
        self._on_readable: Callable[[], None] | None = None
        self.deadline: float | None = None
        """When a wait raises TimeoutError, in the loop's time."""

    async def receive(self, size: int) -> bytes:
        """Return at most `size` bytes, b"" at the end; raises `OSError`. A cancelled call has taken no byte."""
        while True:
            if self.deadline is not None and self._loop.time() >= self.deadline:
                raise TimeoutError
            try:
                return self._sock.recv(size)
            except (BlockingIOError, InterruptedError):
                await self._readable()

    def watch(self, on_readable: Callable[[], None]) -> None:
        """Call back as long as there are bytes, an end or an error, until `unwatch`."""
        self._on_readable = on_readable
        if self._descriptor < 0:
            descriptor = self._sock.fileno()
            if descriptor < 0:
                raise ConnectionAbortedError("the socket was closed")
            self._loop.add_reader(descriptor, self._call)
            self._descriptor = descriptor

    def unwatch(self) -> None:
        """Call back no more."""
        self._on_readable = None

    def stop(self) -> None:
        """Take the registration back."""
        self.unwatch()
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            self._descriptor = -1

    async def _readable(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self.watch(partial(_wake, waiter))
        timer = None if self.deadline is None else self._loop.call_at(self.deadline, _expire, waiter)
        try:
            await waiter
        finally:
            self.unwatch()
            if timer is not None:
                timer.cancel()

    def _call(self) -> None:
        if self._on_readable is None:
            self.stop()
        else:
            self._on_readable()


async def send_all(sock: socket.socket, data: bytes | bytearray | memoryview, *, deadline: float | None = None) -> None:
    """Send everything; raises `OSError`, TimeoutError where it has to wait beyond `deadline`, in the loop's time. A
    cancelled call may have sent a part."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except (BlockingIOError, InterruptedError):
            async with asyncio.timeout_at(deadline):
                await writable(sock)


def unacknowledged(sock: socket.socket) -> bool:
    """Return whether the peer's kernel lacks bytes of ours (SIOCOUTQ, tcp(7)); false where that cannot be told."""
    try:
        import fcntl  # not on Windows
        import termios

        return any(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    except (ImportError, OSError):
        return False


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
