"""A stream joined to something else, without a task: bytes move in the callbacks of the loop.

`SocketSplice` joins it to a raw TCP socket (TCP targets, `forward`): half-close passes both ways, a reset passes as a
reset. `TransportSplice` joins it to an asyncio transport (the local HTTPS endpoint, an upgraded API-server
connection), and can show its owner what either side gave, once it has gone on. Neither looks at what it moves itself,
and neither closes as if complete what was cut.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from types import SimpleNamespace
from typing import cast

from arcbridge.errors import StreamReset
from arcbridge.loop_shares import LoopTime
from arcbridge.mux import buffer
from arcbridge.mux.socket_error_poll import SocketErrorPoll
from arcbridge.mux.stream import StreamTransport
from arcbridge.socket_options import reset_on_close
from arcbridge.wire.frames import ResetCode


@dataclass(slots=True)
class SpliceResult:
    """How a splice ended."""

    from_stream: int
    """Bytes that the stream gave."""
    to_stream: int
    """Bytes that the stream took."""
    error: Exception | None
    """None after both directions ended in order."""


class SocketSplice(asyncio.Protocol):
    """A stream's protocol that moves its bytes to and from a connected, non-blocking TCP socket, which it owns.

    `on_done` is called once, when the socket is closed and the stream is over.
    """

    def __init__(self, sock: socket.socket, on_done: Callable[[SpliceResult], None] | None = None) -> None:
        self._sock = sock
        self._descriptor = sock.fileno()
        """For the loop's callbacks: uvloop does more for a socket object."""
        # Bound once: these are called for every frame.
        self._send, self._recv_into = sock.send, sock.recv_into
        self._polled = False
        """Whether the next poll includes this socket."""
        self._on_done = on_done
        self._stream: StreamTransport | None = None
        self._loop: asyncio.AbstractEventLoop
        self._error_poll: SocketErrorPoll
        self._payer: LoopTime | None
        """All three are the stream's."""
        self._reading = False
        self._reset: OSError | None = None
        """The error of a socket that was reset, while bytes of it are still to be read."""
        self._pending = b""
        self._shut_when_sent = False
        self._read_over = False
        self._write_over = False
        self._to_stream = 0
        self._from_stream = 0
        self._error: Exception | None = None
        self._closed = False
        self._stream_lost = False

    # -- the stream's protocol ------------------------------------------------------------------------------------

    def connection_made(self, transport: StreamTransport) -> None:  # type: ignore[override]
        self._stream, self._payer = transport, transport.payer
        self._loop, self._error_poll = transport.loop, transport.error_poll
        self.resume_writing()

    def view_received(self, view: memoryview) -> None:
        """Payload from the stream: straight into the socket, the rest waits and pauses the stream."""
        if self._write_over or self._closed:
            return
        size = len(view)
        self._from_stream += size
        try:
            sent = self._send(view)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail(error)
            return
        if sent < size:
            self._pending = bytes(view[sent:])
            cast(StreamTransport, self._stream).pause_reading()
            self._loop.add_writer(self._descriptor, self._writable)

    def eof_received(self) -> bool:
        """FIN from the stream becomes a FIN of the socket, after its bytes."""
        if self._pending:
            self._shut_when_sent = True
        else:
            self._shut()
        return True

    def pause_writing(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._descriptor)

    def resume_writing(self) -> None:
        if not self._reading and not self._read_over and not self._closed:
            self._reading = True
            self._loop.add_reader(self._descriptor, self._read)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stream_lost = True
        if exc is not None and not self._closed:
            self._error = self._error or exc
            self._close(reset=True)
        elif not self._pending or self._closed:
            self._close(reset=False)

    # -- the socket -----------------------------------------------------------------------------------------------

    def read_on(self) -> None:
        """Read what may have come already: for the loop's own callbacks, behind `connection_made`."""
        if self._reading:
            self._read()

    def _read(self) -> None:
        stream, payer = self._stream, self._payer
        assert stream is not None  # nothing is read before `connection_made`; `cast` would cost a call
        if payer is not None:
            began, before = monotonic(), payer.shares.total
        try:
            count = self._recv_into(buffer.BUFFER, buffer.PORTION if stream.backlog.full else buffer.PAYLOAD)
            if count:
                self._to_stream += count
                stream.write(buffer.VIEW[:count])
                if not self._polled:
                    self._polled = True
                    self._error_poll.add(self)
            elif self._reset is not None:
                self._fail(self._reset)
            else:
                self._read_over = True
                stream.write_eof(soon=False)
                if self._reading:  # else `connection_lost` has closed the socket
                    self.pause_writing()
                    if self._stream_lost and self._write_over:
                        self._close(reset=False)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._fail(error)
        finally:
            if payer is not None:
                payer.charge(monotonic(), began, before)

    def poll_error(self) -> None:
        """Find out whether the socket was reset with the bytes that were read last (called by the poll)."""
        self._polled = False
        if self._closed or not self._reading:
            return  # a socket in error that is read again calls again
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._read_the_rest(OSError(code, os.strerror(code)))

    def _read_the_rest(self, error: OSError) -> None:
        """The socket was reset: what its kernel still holds comes before the cut, as fast as the stream takes it."""
        self._reset = error
        stream = cast(StreamTransport, self._stream)
        while self._reading:
            try:
                count = self._recv_into(buffer.BUFFER, stream.portion)
            except OSError:
                count = 0
            if not count:
                self._fail(error)
                return
            self._to_stream += count
            stream.write(buffer.VIEW[:count])

    def _writable(self) -> None:
        try:
            sent = self._send(self._pending)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(error)
            return
        self._pending = self._pending[sent:]
        if self._pending:
            return
        self._loop.remove_writer(self._descriptor)
        if self._stream_lost:
            self._close(reset=False)
            return
        if self._shut_when_sent:
            self._shut()
        cast(StreamTransport, self._stream).resume_reading()

    def _shut(self) -> None:
        self._write_over = True
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._fail(error)
            return
        if self._stream_lost and self._read_over:
            self._close(reset=False)

    def _fail(self, error: OSError) -> None:
        """The socket broke: the stream is cut behind what was read, never finished."""
        self._error = self._error or error
        self._close(reset=True)
        if self._stream is not None and not self._stream_lost:
            self._stream.cut()

    def _close(self, *, reset: bool) -> None:
        if not self._closed:
            self._closed = True
            if self._polled:
                self._error_poll.remove(self)
            # Both callbacks first: the next socket gets this descriptor's number. Each is removed only where it is
            # there: uvloop looks the descriptor up among its transports either way, and finds it by an exception.
            if self._reading:
                self._reading = False
                self._loop.remove_reader(self._descriptor)
            if self._pending:
                self._loop.remove_writer(self._descriptor)
                self._pending = b""
            if reset:
                reset_on_close(self._sock)
            self._sock.close()
        if self._stream_lost and self._on_done is not None:
            done, self._on_done = self._on_done, None
            done(SpliceResult(self._from_stream, self._to_stream, self._error))


class TransportSplice(asyncio.BufferedProtocol):
    """Joins an asyncio transport, whose protocol it becomes, to a stream, whose protocol is `stream_side`.

    Use: `splice = TransportSplice(outer, on_done)`, then `session.open(target, splice.stream_side)` or
    `stream.attach(splice.stream_side)`, then `splice.start(first)` with the bytes that were read from `outer` before.
    TLS has no half-close in asyncio: the end of either side ends the other after its last byte.
    """

    def __init__(
        self,
        outer: asyncio.Transport,
        on_done: Callable[[SpliceResult], None] | None = None,
        *,
        read_size: int = buffer.PAYLOAD,
        seen: Callable[[memoryview], None] | None = None,
        passed: Callable[[memoryview], None] | None = None,
    ) -> None:
        """`read_size`: most bytes that are read from `outer` at a time. `seen` is called with what the stream gave,
        `passed` with what `outer` gave, after it has gone on; they must not raise, and the view is good within the
        call."""
        self.outer = outer
        self._read_size = read_size
        self._on_done = on_done
        self._seen = seen
        self._passed = passed
        self._tls = outer.get_extra_info("ssl_object") is not None
        self._stream: StreamTransport | None = None
        self._outer_lost = False
        self._outer_eof = False
        self._outer_closed = False
        self._stream_over = False
        self._to_stream = 0
        self._from_stream = 0
        self._error: Exception | None = None
        self._began = 0.0
        """When the transport began to decrypt the bytes of the present read, monotonic seconds."""
        # No class of its own, which would be one more call for each frame.
        self.stream_side = cast(
            asyncio.Protocol,
            SimpleNamespace(
                connection_made=self.stream_made,
                view_received=self.from_stream,
                eof_received=self.stream_finished,
                pause_writing=self.pause_outer,
                resume_writing=self.resume_outer,
                connection_lost=self.stream_lost,
            ),
        )
        """The stream's protocol."""

    @property
    def moved(self) -> SpliceResult:
        """What has moved until now."""
        return SpliceResult(self._from_stream, self._to_stream, self._error)

    def start(self, first: bytes = b"") -> None:
        """Begin: `first` goes to the stream, then whatever `outer` reads."""
        if first:
            self._to_stream += len(first)
            cast(StreamTransport, self._stream).write(first)
            if self._passed is not None:
                self._passed(memoryview(first))
        self.outer.set_protocol(self)
        if not self.outer.is_closing():
            if self._stream is not None and self._stream.writing_paused:  # whom it told may have been another protocol
                self.pause_outer()
            else:
                self.resume_outer()
            return
        # It was lost before this began, and its last protocol may have got `connection_lost` already.
        self._outer_lost = True
        cast(StreamTransport, self._stream).abort(ResetCode.CANCELLED)
        self._finish_if_over()

    # -- the outer transport's protocol -----------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        self._began = monotonic()
        # Not BUFFER: asyncio's TLS slices what it gets, and a slice of a bytearray is a copy.
        crowded = self._stream is not None and self._stream.backlog.full
        return buffer.VIEW[: buffer.PORTION if crowded else self._read_size]

    def buffer_updated(self, nbytes: int) -> None:
        self._to_stream += nbytes
        stream = self._stream
        if stream is not None:
            payer = stream.payer
            before = 0.0 if payer is None else payer.shares.total
            stream.write(buffer.VIEW[:nbytes])
            if self._passed is not None:
                self._passed(buffer.VIEW[:nbytes])
            if payer is not None:
                payer.charge(monotonic(), self._began, before)

    @property
    def outer_over(self) -> bool:
        """Whether the outer side has ended, or was lost."""
        return self._outer_eof or self._outer_lost

    def finish_with(self, last: bytes) -> None:
        """End the stream in order behind `last`, and cut the outer side now: nothing more of the stream reaches it."""
        stream = cast(StreamTransport, self._stream)
        self._to_stream += len(last)
        self._outer_closed = True
        reset_transport(self.outer)
        stream.write(last)
        stream.close()

    def eof_received(self) -> bool:
        if self._tls and not said_goodbye(self.outer):
            return False  # a cut: `connection_lost` follows and resets the stream
        self._outer_eof = True
        if self._stream is not None:
            self._stream.write_eof()
        return not self._tls

    def pause_writing(self) -> None:
        if self._stream is not None:
            self._stream.pause_reading()

    def resume_writing(self) -> None:
        if self._stream is not None:
            self._stream.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._outer_lost = True
        self._error = self._error or exc
        if self._stream is not None and not self._stream_over:
            if (self._outer_eof or self._outer_closed) and exc is None:
                self._stream.close()
            else:
                # A socket's end without TLS's close_notify is a cut, not an end; what came before it still counts.
                self._stream.cut()
        self._finish_if_over()

    # -- called by the stream's side --------------------------------------------------------------------------------

    def stream_made(self, stream: asyncio.BaseTransport) -> None:
        """The stream is there."""
        self._stream = cast(StreamTransport, stream)

    def pause_outer(self) -> None:
        """The stream is full."""
        if not self.outer.is_closing():
            self.outer.pause_reading()

    def resume_outer(self) -> None:
        """The stream takes more."""
        if not self.outer.is_closing():
            self.outer.resume_reading()

    def from_stream(self, view: memoryview) -> None:
        """Payload from the stream. TLS encrypts it within the call; a plain transport would keep the view."""
        self._from_stream += len(view)
        self.outer.write(view if self._tls else bytes(view))
        if self._seen is not None:
            self._seen(view)

    def stream_finished(self) -> bool:
        """End the outer side after its bytes: the stream's FIN came. Return True: the stream stays open."""
        if self.outer.can_write_eof() and not self._tls:
            self.outer.write_eof()
        else:
            self._outer_closed = True
            self.outer.close()
        return True

    def stream_lost(self, exc: Exception | None) -> None:
        """The stream is over: in order, or cut (then the outer side is cut too)."""
        self._stream_over = True
        if exc is None:
            if not self.outer.is_closing():  # asyncio's TLS forgets who it is at a second `close`
                self.outer.close()
        elif not self._outer_lost and (isinstance(exc, StreamReset) or not self._outer_closed):
            self._error = self._error or exc
            cut = getattr(self.outer, "cut", None)
            if cut is not None and isinstance(exc, StreamReset) and exc.code == ResetCode.TRUNCATED:
                cut()  # the peer gets what came before, then an end that is visibly none
            else:
                reset_transport(self.outer)
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        if self._outer_lost and (self._stream_over or self._stream is None) and self._on_done is not None:
            done, self._on_done = self._on_done, None
            done(SpliceResult(self._from_stream, self._to_stream, self._error))


def said_goodbye(transport: asyncio.Transport) -> bool:
    """Return whether a TLS peer ended in order (close_notify, RFC 8446 §6.1) and everything before it was read.

    For `eof_received`: asyncio calls that also when the TCP connection just ends, and with bytes unread when reading
    was paused.
    """
    try:
        return bool(transport.get_extra_info("ssl_object").read(1) == b"")
    except ssl.SSLZeroReturnError:
        return True
    except ssl.SSLError:  # it waits for more: the end never came
        return False


def reset_transport(transport: asyncio.Transport) -> None:
    """Close a transport so that its peer sees a reset, not an end in order."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        reset_on_close(sock)
    transport.abort()


__all__ = ["SocketSplice", "SpliceResult", "TransportSplice", "reset_transport", "said_goodbye"]
