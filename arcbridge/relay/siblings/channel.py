"""Messages and descriptors between the processes of one relay.

A channel is one end of a `SOCK_SEQPACKET` pair that the supervisor made and gave away as descriptors. So it has no
name in a file system: there is no path that could be too long, no directory to protect, and no way to connect to it.
A message is a short head (JSON), a body (bytes) and at most one socket.

Rules:

1. A message is sent whole or not at all, in order. What the kernel does not take now waits here, at most `QUEUE`
   bytes; beyond that the other process is taken for dead and the channel is closed: an order that was left out
   would leave the two with different views for ever.
2. A socket that is sent stays the sender's, too, until the receiver says that it has it. The sender only holds it.
3. A descriptor that did not arrive (the receiver's table is full, which the kernel tells by `MSG_CTRUNC` and by no
   error) leaves a message without its socket, whose handler can tell that one is missing; descriptors that did arrive
   are never lost: they are the handler's, or closed here.
4. Only processes of this user are at the other end.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from arcbridge.errors import ArcbridgeError

QUEUE: Final = 32 * 1024 * 1024
"""Bytes that wait for the other process: more than a worker that drains has to say at once of 100,000 agents."""
MAX_MESSAGE: Final = 128 * 1024
"""Bytes. The longest is a join with what came behind its TLS (64 KiB), or a part of metrics; the kernel's default for a
Unix socket's buffer is 208 KiB, and a message has to fit."""
PART: Final = 64 * 1024
"""Bytes of a longer body in each of the messages that carry it."""
_SPARE_DESCRIPTORS: Final = 4
"""Room in the ancillary buffer: one descriptor is sent, and a buffer that is too short loses them without an error."""
_MESSAGES: Final = 64
"""Taken per wake-up."""

Head = dict[str, Any]


class ChannelClosed(ArcbridgeError):
    """The process at the other end is gone, or does not read any more."""

    def __init__(self, message: str = "the other process of this relay is gone") -> None:
        super().__init__(message)


class Received(NamedTuple):
    """One message. `sock` belongs to the handler; None where none was sent, or where it did not arrive."""

    head: Head
    body: bytes
    sock: socket.socket | None


class Channel:
    """One end. `start` before the first message; `on_message` and `on_closed` are called from the loop.

    `on_closed` is called once, whichever end closed it. Raises `ChannelClosed` when the other end is another user's.
    """

    def __init__(
        self, sock: socket.socket, on_message: Callable[[Received], None], on_closed: Callable[[], None]
    ) -> None:
        check_peer(sock)
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._on_message = on_message
        self._on_closed = on_closed
        self._waiting: deque[tuple[bytes, socket.socket | None, bool]] = deque()
        self._queued = 0
        self._moved = asyncio.Event()
        self.closed = False

    def start(self) -> None:
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def send(self, head: Head, body: bytes = b"", sock: socket.socket | None = None, *, keep: bool = True) -> None:
        """Queue a message; raises `ChannelClosed`. `sock` has to stay open until the other end has confirmed it: one
        that was closed before the message left is left out, and the message with it. With `keep` False it is closed
        here as soon as it has left, or when it never will."""
        message = json.dumps(head, separators=(",", ":")).encode() + b"\n" + body
        try:
            if self.closed:
                raise ChannelClosed
            if len(message) > MAX_MESSAGE:
                raise ChannelClosed("a message between the processes of this relay is too long")
            if self._queued + len(message) > QUEUE:
                self.close()
                raise ChannelClosed("the other process of this relay does not read")
            sent = not self._waiting and self._sent(message, sock)
        except ChannelClosed:
            if sock is not None and not keep:
                sock.close()
            raise
        if not sent:
            if not self._waiting:
                self._loop.add_writer(self._sock.fileno(), self._writable)
            self._waiting.append((message, sock, keep))
            self._queued += len(message)
        elif sock is not None and not keep:
            sock.close()

    def tell(self, head: Head, body: bytes = b"", give: socket.socket | None = None) -> None:
        """Send what need not arrive: where the other end is gone, `on_closed` has run, or will. `give`: a socket that
        is the other process's alone from then on."""
        try:
            self.send(head, body, give, keep=False)
        except ChannelClosed:
            pass

    async def room(self, most: int) -> None:
        """Wait until at most `most` bytes wait here for the other process; for what is long and may come slowly. Raises
        `ChannelClosed`."""
        while self._queued > most and not self.closed:
            self._moved.clear()
            await self._moved.wait()
        if self.closed:
            raise ChannelClosed

    def read_rest(self) -> None:
        """Take what has come, for when the other end is known to be gone."""
        while not self.closed and self._readable():
            # Until there is nothing more, or the end.
            pass

    def close(self) -> None:
        """Close this end and drop what waits. May be called more than once."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        for _, sock, keep in self._waiting:
            if sock is not None and not keep:
                sock.close()
        self._waiting.clear()
        self._moved.set()
        self._sock.close()
        self._on_closed()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _sent(self, message: bytes, sock: socket.socket | None) -> bool:
        """Send one message; return False where the kernel takes no more now. True also for one that is left out."""
        ancillary = []
        if sock is not None:
            if sock.fileno() < 0:
                return True
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))]
        try:
            self._sock.sendmsg([message], ancillary)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            # Also ETOOMANYREFS, too many descriptors on their way: the peer does not read.
            self.close()
            raise ChannelClosed from error
        return True

    def _writable(self) -> None:
        try:
            while self._waiting:
                message, sock, keep = self._waiting[0]
                if not self._sent(message, sock):
                    return
                self._waiting.popleft()
                self._queued -= len(message)
                self._moved.set()
                if sock is not None and not keep:
                    sock.close()
        except ChannelClosed:
            # `on_closed` was told.
            return
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> bool:
        """Hand on what has come, at most `_MESSAGES`; return whether there may be more."""
        for _ in range(_MESSAGES):
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    MAX_MESSAGE, socket.CMSG_SPACE(_SPARE_DESCRIPTORS * array.array("i").itemsize), _RECEIVE_FLAGS
                )
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self.close()
                return False
            sockets = _sockets(_descriptors(ancillary))
            message = _read(data, flags, sockets)
            if message is None:
                # The end, or nothing that we send: whatever this is, it is no sibling that can be talked to.
                for one in sockets:
                    one.close()
                self.close()
                return False
            self._on_message(message)
            if self.closed:
                return False
        return True


def in_parts(body: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield a body of any length in parts that fit into a message each; the second value says which is the last. One at
    least."""
    for begin in range(0, max(len(body), 1), PART):
        yield body[begin : begin + PART], begin + PART >= len(body)


def check_peer(sock: socket.socket) -> None:
    """Raise `ChannelClosed` unless the process that made the other end has our user id (SO_PEERCRED)."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid != os.getuid():
        raise ChannelClosed("the other end of a channel between this relay's processes belongs to another user")


def pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new channel, as sockets that can be given away."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        # Up to what the system allows; the longest message fits into the default as well.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024 * 1024)
    return ends


def _read(data: bytes, flags: int, sockets: list[socket.socket]) -> Received | None:
    if not data or flags & socket.MSG_TRUNC or len(sockets) > 1:
        return None
    head, _, body = data.partition(b"\n")
    try:
        parsed = json.loads(head)
    except ValueError:
        return None
    if not isinstance(parsed, dict):
        return None
    return Received(parsed, body, sockets[0] if sockets else None)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _sockets(descriptors: list[int]) -> list[socket.socket]:
    found = []
    for number in descriptors:
        try:
            found.append(socket.socket(fileno=number))
        except OSError:
            # No socket: nothing that we send.
            os.close(number)
    return found


_RECEIVE_FLAGS: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
