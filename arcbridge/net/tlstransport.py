"""A TLS transport whose end loses nothing.

asyncio's TLS transports (uvloop's too) end a connection by sending close_notify and waiting for the peer's. If the peer
still has something to send, a ping of kubectl's WebSocket is enough, OpenSSL reports data after close_notify, the
transport aborts, the kernel sends RST because bytes lie unread, and what the peer had not received yet is lost: one
`kubectl exec` in ten lost the tail of a megabyte. Here the end has three steps: what was written, then close_notify and
FIN, then whatever the peer still sends is read and dropped until it ends its side too, or has long had everything.

The other difference is honesty about the peer's end: `eof_received` means its close_notify; a connection that ends
without one is lost with an error (RFC 8446 §6.1), so that the protocol does not take a cut for the end.

Everything else is asyncio's transport: flow control both ways, `Protocol` and `BufferedProtocol`. OpenSSL works on
memory BIOs, as it does under uvloop; bytes are read through the process's one receive buffer.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from arcbridge.loop_shares import LoopTime
from arcbridge.mux import buffer
from arcbridge.mux.socket_error_poll import socket_error_poll
from arcbridge.mux.write_limits import write_limits
from arcbridge.net.sockets import unacknowledged
from arcbridge.net.tlspipe import EMPTY_MOST, PIECE
from arcbridge.socket_options import reset_on_close

HANDSHAKE_DEADLINE = 10.0
"""Seconds for the TLS handshake."""
LINGER = 5.0
"""Seconds between two checks whether the peer has acknowledged everything; then nothing can be lost any more."""
CUT_FIRST_LOOK = 0.005
"""Seconds until the first check before a reset; then twice as long each time, up to LINGER."""
LINGER_MOST = 4000.0
"""Seconds that a peer which reads nothing (`kubectl logs | less`) may take for the last bytes."""
WRITE_HIGH = 256 * 1024
WRITE_LOW = 64 * 1024
_RECORD = 16 * 1024
"""Most payload of one TLS record (RFC 8446 §5.1), which is the most that OpenSSL gives at a time."""
_WHOLE = _RECORD + 256 + 5
"""Bytes of the largest record (§5.2): one that lacks its end brings no payload yet."""
_EXPLAINS = 32
"""Bytes beside its payload that a record of TLS 1.3 explains: it has 22 of its own, and the next one may be a ticket.
A peer that pads its records (RFC 8446 §5.4), which none is known to do, would be cut off. TLS 1.2 has no KeyUpdate,
and its ciphers add more."""


class _TlsState(Enum):
    HANDSHAKE = "handshake"
    OPEN = "open"
    FLUSHING = "flushing"
    """`close` was called: what was written goes out first."""
    LINGERING = "lingering"
    """Ours is sent, close_notify and FIN too; the peer's is read and dropped."""
    CLOSED = "closed"


class TlsTransport(asyncio.Transport):
    """TLS over a connected, non-blocking socket, which it owns. Make one with `accept_tls` or `connect_tls`."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        protocol: asyncio.BaseProtocol,
        *,
        server_hostname: str | None = None,
        on_handshake: Callable[[BaseException | None], None] | None = None,
    ) -> None:
        peername: Any = None
        with suppress(OSError):
            peername = sock.getpeername()
        super().__init__({"peername": peername})
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        try:
            self._tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side=server_hostname is None, server_hostname=server_hostname
            )
        except BaseException:  # a context of the other side, a name that is none
            sock.close()
            raise
        # Any writable buffer does, and then the answer is a number; the stub of `ssl` knows less.
        self._read_into: Callable[[int, bytearray | memoryview], int] = self._tls.read  # type: ignore[assignment]
        self._protocol: Any = protocol
        """A BufferedProtocol where `_buffered` says so, else a Protocol; `cast` would cost a call for each read."""
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)
        self._on_handshake = on_handshake
        self._empty = 0
        """Bytes from the peer that its payload does not explain."""
        self._explains = 0
        """Bytes that a record with payload explains beside it; 0: none has come, and little is read at a time."""
        self._state = _TlsState.HANDSHAKE
        self._reading = False
        self._error_poll = socket_error_poll(self._loop)
        self._polled = False
        """Whether the next poll includes this connection."""
        self._paused = False
        self._orderly = True
        """Whether our direction ends with close_notify; false after `cut`."""
        self._peer_over = False
        """The peer's close_notify was read."""
        self._socket_over = False
        """The peer's FIN was read; OpenSSL may still hold bytes from before it."""
        self._failed: OSError | None = None
        """The peer takes nothing more; what it sent before that is still to be delivered."""
        self._broken: ssl.SSLError | None = None
        """The error of a record whose predecessors are still to be delivered."""
        self._scheduled = False
        self._pending: list[bytes | memoryview] = []
        self._pending_bytes = 0
        self._high = WRITE_HIGH
        self._low = WRITE_LOW
        self._writer_paused = False
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(HANDSHAKE_DEADLINE, self._handshake_expired)
        self._lingered = 0.0
        self._begin()

    def _begin(self) -> None:
        """Start the handshake."""
        try:
            self._start_reading()
        except BaseException:  # the loop has no room for it, or the socket is closed
            self._reading = False
            self._state = _TlsState.CLOSED
            self._disarm()
            self._sock.close()
            raise
        self._loop.call_soon(self._advance_handshake)

    def __repr__(self) -> str:
        return f"<TlsTransport {self.get_extra_info('peername')} {self._state.value} pending={self._pending_bytes}>"

    # -- asyncio.BaseTransport ------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`socket`, `ssl_object`, `sslcontext`, `peercert`, `peername`, as asyncio's TLS transports give them."""
        if name == "ssl_object":
            return self._tls
        if name == "sslcontext":
            return self._tls.context
        if name == "socket":
            return self._sock
        if name == "peercert":
            return self._tls.getpeercert()
        return super().get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Return whether `close` or `abort` was called, or the connection is lost."""
        return self._state not in (_TlsState.HANDSHAKE, _TlsState.OPEN)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Deliver to `protocol` from now on."""
        self._protocol = protocol
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the current protocol."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def close(self) -> None:
        """End in order: see the module's docstring. `connection_lost(None)` comes when the socket is closed."""
        if self._state is _TlsState.HANDSHAKE:
            self._lose(None)
        elif self._failed is not None:
            self._lose(None if self._peer_over else self._failed)
        elif self._state is _TlsState.OPEN:
            self._state = _TlsState.FLUSHING
            self._start_reading()
            if not self._pending:
                self._send_close_notify()
            else:
                self._timer = self._loop.call_later(LINGER, self._look_at_flush, self._pending_bytes)

    def cut(self) -> None:
        """End as a cut: the peer gets every byte that was written, then a reset in place of an end."""
        if self._state is _TlsState.OPEN:
            self._orderly = False
        self.close()

    def abort(self) -> None:
        """Close the socket now; what was not sent is dropped."""
        self._lose(None)

    # -- asyncio.ReadTransport ------------------------------------------------------------------------------------

    def is_reading(self) -> bool:
        """Return whether payload is delivered as it arrives."""
        return not self._paused and self._state is _TlsState.OPEN

    def pause_reading(self) -> None:
        """Deliver nothing, and take nothing from the socket, until `resume_reading`.

        The loop goes on looking at the socket until it can be read: short pauses cost no system calls.
        """
        self._paused = True

    def resume_reading(self) -> None:
        """Deliver again, first what OpenSSL holds already."""
        if not self._paused:
            return
        self._paused = False
        if self._state is _TlsState.OPEN:
            if not self._socket_over:
                self._start_reading()
            self._deliver_soon()

    # -- asyncio.WriteTransport -----------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send; `data` may be reused at once. Ignored once closing."""
        if self._state is not _TlsState.OPEN or not data:
            return
        tls = self._tls
        try:
            written = tls.write(data)
            if written < len(data):
                view = memoryview(data)[written:]
                while view:
                    view = view[tls.write(view) :]
        except ssl.SSLError as error:
            self._lose(error)
            return
        self._send_outgoing()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send all, as one write."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """Return False: TLS has a half-close, but its users mostly do not expect one, and `close` ends both
        directions."""
        return False

    def get_write_buffer_size(self) -> int:
        """Return the bytes that the kernel did not take yet."""
        return self._pending_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """(low, high) in bytes."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As asyncio's: `low` defaults to a quarter of `high`."""
        self._low, self._high = write_limits(high, low, WRITE_HIGH)
        self._pause_writer_if_full()

    # -- the handshake ----------------------------------------------------------------------------------------------

    def _advance_handshake(self) -> None:
        if self._state is not _TlsState.HANDSHAKE:
            return
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send_outgoing()
            return
        except ssl.SSLError as error:
            if not self._pending:
                try:
                    self._sock.send(self._outgoing.read())  # the alert that tells the peer why
                except OSError:
                    pass  # as far as the socket takes it now: the error is what counts
            self._lose(error)
            return
        self._send_outgoing()
        if self.is_closing():
            return
        self._disarm()
        self._state = _TlsState.OPEN
        done, self._on_handshake = self._on_handshake, None
        self._guard(self._protocol.connection_made, self)
        if done is not None:
            done(None)
        self._deliver()  # what came in the same segment

    def _handshake_expired(self) -> None:
        self._lose(TimeoutError(f"no TLS handshake within {HANDSHAKE_DEADLINE:.0f} s"))

    # -- the socket -------------------------------------------------------------------------------------------------

    def _start_reading(self) -> None:
        if not self._reading and self._state is not _TlsState.CLOSED:
            self._reading = True
            self._loop.add_reader(self._sock, self._readable)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)

    def _readable(self) -> None:
        if self._paused and self._state is _TlsState.OPEN:
            self._stop_reading()
        elif self._read() and not self._polled and self._state is not _TlsState.CLOSED:
            self._polled = True
            self._error_poll.add(self)

    def poll_error(self) -> None:
        """Read on: the socket may be in error, of which uvloop would not tell again (called by the poll)."""
        self._polled = False
        if self._reading:  # else `_start_reading` will report the error anew
            self._readable()

    def _read(self) -> bool:
        """Take bytes from the socket; whether there were any.

        No more than the protocol's buffer holds, and one record: what the protocol does not want stays in the kernel.
        """
        size = buffer.SIZE if self._buffered else _RECORD
        into: bytearray | None = None
        small = self._empty > _WHOLE or not self._explains
        if small and self._state in (_TlsState.HANDSHAKE, _TlsState.OPEN):
            size = PIECE
        if self._buffered and self._state is _TlsState.OPEN:
            into = self._buffer_of(self._protocol)
            if into is None:
                return False
            room = len(into)
            if not small:
                size = _RECORD if room < _RECORD else room if room < size else size
        try:
            count = self._sock.recv_into(buffer.BUFFER, size)
        except (BlockingIOError, InterruptedError):
            if self._failed is not None:
                self._lose(self._failed)
            return False
        except OSError as error:
            if self._state is not _TlsState.OPEN or self._peer_over:
                self._lose(error)
                return False
            self._stop_reading()
            self._socket_over = True
            self._failed = self._failed or error
            self._deliver()  # what OpenSSL holds comes first: uvloop may call this before `_deliver_held`
            return False
        if self._state in (_TlsState.FLUSHING, _TlsState.LINGERING):
            if not count:
                self._peer_ended()
            return bool(count)
        if not count:
            if self._state is _TlsState.HANDSHAKE:
                self._lose(ConnectionAbortedError("ended within the TLS handshake"))
                return False
            self._stop_reading()
            self._socket_over = True
            self._deliver()  # what OpenSSL holds comes first, and its close_notify may be among it
            return False
        if self._peer_over:
            return True  # TLS is over in this direction: whatever this is, it is not kept
        self._incoming.write(buffer.VIEW[:count])
        if self._state is _TlsState.HANDSHAKE:
            self._advance_handshake()
        else:
            self._empty += count
            self._deliver(into)
            if self._empty > EMPTY_MOST and not self._paused:
                self._lose(ConnectionAbortedError("the peer sends records without payload"))
        return True

    def _peer_ended(self) -> None:
        """The peer's FIN while we close: once ours is out, nothing is left to wait for."""
        if self._state is _TlsState.LINGERING and not self._pending:
            self._lose(None)
        else:
            self._stop_reading()

    def _deliver_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._deliver_held)

    def _deliver_held(self) -> None:
        self._scheduled = False
        self._deliver()
        if self._failed is None:
            return
        while self._state is _TlsState.OPEN and not self._paused and not self._socket_over:
            self._read()  # until the kernel has nothing more
        if self._state is _TlsState.OPEN and not self._paused:
            self._lose(self._failed)

    def _deliver(self, into: bytearray | None = None) -> None:
        """Hand over what OpenSSL can decrypt; `into`: where the protocol has just said that it wants the next bytes."""
        while self._state is _TlsState.OPEN and not self._paused and not self._peer_over:
            try:
                if self._buffered:
                    protocol = self._protocol
                    into = into or self._buffer_of(protocol)
                    if into is None:
                        return
                    count, more = self._decrypt(into)
                    into = None
                    if count and not self._guard(protocol.buffer_updated, count):
                        return
                    over = not count
                else:
                    data = self._tls.read(_RECORD)
                    more = self._incoming.pending > 0 or len(data) == _RECORD
                    self._explain(len(data), 1)
                    if data and not self._guard(self._protocol.data_received, data):
                        return
                    over = not data
            except ssl.SSLWantReadError:
                if self._socket_over:
                    self._lose(self._failed or ConnectionAbortedError("ended without TLS's close_notify"))
                    return
                break
            except ssl.SSLZeroReturnError:
                over = True
            except ssl.SSLError as error:
                self._lose(error)
                return
            if over:
                self._peer_over = True
                self._peer_sent_close_notify()
                return
            if not more and not self._socket_over:
                break  # OpenSSL would only raise SSLWantReadError, which costs as much as a small read
        if self._outgoing.pending:  # an answer of TLS itself, to a key update
            self._send_outgoing()

    def _decrypt(self, into: bytearray) -> tuple[int, bool]:
        """Fill `into` from as many records as there are; (how much, whether it is worth to ask again).

        OpenSSL gives one record at a time, 16 KiB at most, and what is handed over at once leaves as one frame: the
        fewer, the faster. 0 is the peer's end; raises as OpenSSL's `read`. An end or an error behind other records is
        left to the next call: OpenSSL says an end again, but an error only once.
        """
        if self._broken is not None:
            raise self._broken
        read, incoming = self._read_into, self._incoming
        size = len(into)
        count = read(size, into)
        if count == size or not incoming.pending:
            self._explain(count, 1)
            return count, count == size
        view = memoryview(into)  # a slice of a bytearray would be a copy
        records = 1
        try:
            while count < size:
                if not incoming.pending:
                    return count, False
                more = read(size - count, view[count:])
                if not more:
                    break
                count += more
                records += 1
        except ssl.SSLWantReadError:
            return count, False
        except ssl.SSLError as error:
            self._broken = error
        finally:
            self._explain(count, records)
        return count, True

    def _explain(self, count: int, records: int) -> None:
        """Note that so much payload came, in so many records."""
        if count and not self._explains:
            self._explains = _EXPLAINS if self._tls.version() == "TLSv1.3" else buffer.SIZE
        left = self._empty - count - records * self._explains
        self._empty = left if left > 0 else 0

    def _buffer_of(self, protocol: asyncio.BufferedProtocol) -> bytearray | None:
        """Return where the protocol wants the next bytes; None after the connection was lost for want of a place."""
        try:
            into: bytearray = protocol.get_buffer(-1)  # type: ignore[assignment]  # any writable buffer does
            if not into:  # to read 0 bytes would look like the peer's end
                raise BufferError("get_buffer() returned an empty buffer")
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._protocol_failed(error)
            return None
        return into

    def _peer_sent_close_notify(self) -> None:
        keep_open: list[bool | None] = []
        if not self._guard(lambda: keep_open.append(self._protocol.eof_received())):
            return
        if not keep_open[0]:
            self.close()

    def _send_outgoing(self) -> None:
        """Move what OpenSSL made to the socket, or behind what waits for it."""
        data = self._outgoing.read()
        if not data or self._state is _TlsState.CLOSED or self._failed is not None:
            return
        if not self._pending:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._send_failed(error)
                return
            if sent == len(data):
                return
            self._loop.add_writer(self._sock, self._writable)
            self._pending.append(memoryview(data)[sent:] if sent else data)
            self._pending_bytes += len(data) - sent
        else:
            self._pending.append(data)
            self._pending_bytes += len(data)
        self._pause_writer_if_full()

    def _pause_writer_if_full(self) -> None:
        if self._pending_bytes > self._high and not self._writer_paused and self._state is _TlsState.OPEN:
            self._writer_paused = True
            self._guard(self._protocol.pause_writing)

    def _send_failed(self, error: OSError) -> None:
        """The peer is gone. All that it sent before is in the socket's buffer, and is delivered first."""
        if self._state is not _TlsState.OPEN:
            self._lose(error)
            return
        self._failed = error
        self._loop.remove_writer(self._sock)
        self._pending.clear()
        self._pending_bytes = 0
        self._deliver_soon()
        if self._writer_paused:  # else one that reads no further until it has written would wait for ever
            self._writer_paused = False
            self._guard(self._protocol.resume_writing)

    def _writable(self) -> None:
        while self._pending:
            head = self._pending[0]
            try:
                sent = self._sock.send(head)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._send_failed(error)
                return
            self._pending_bytes -= sent
            if sent < len(head):
                self._pending[0] = memoryview(head)[sent:]
                break
            del self._pending[0]
        if not self._pending:
            self._loop.remove_writer(self._sock)
            if self._state is _TlsState.FLUSHING:
                self._send_close_notify()
                return
            if self._state is _TlsState.LINGERING:
                self._shut()
                return
        if self._writer_paused and self._pending_bytes <= self._low and self._state is _TlsState.OPEN:
            self._writer_paused = False
            self._guard(self._protocol.resume_writing)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _send_close_notify(self) -> None:
        """Everything written is with the kernel: close_notify, then FIN."""
        self._state, self._lingered = _TlsState.LINGERING, 0.0
        if not self._orderly:
            self._reset_when_received()
            return
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # it wants the peer's close_notify, or finds data first: ours is in the BIO either way
        self._send_outgoing()
        if not self._pending:
            self._shut()

    def _shut(self) -> None:
        if self._state is not _TlsState.LINGERING:
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._lose(None)  # the peer is gone altogether
            return
        # Where it had ended before, nothing can come that a close would answer by RST.
        if not self._reading or self._peer_over:
            self._lose(None)
            return
        self._disarm()
        self._timer = self._loop.call_later(LINGER, self._linger)

    def _reset_when_received(self) -> None:
        """RST overtakes what is on its way, so it waits until the peer's kernel has everything (RFC 9293 §3.10.7)."""
        self._disarm()
        if unacknowledged(self._sock) and self._lingered < LINGER_MOST:
            wait = min(LINGER, max(CUT_FIRST_LOOK, self._lingered))
            self._lingered += wait
            self._timer = self._loop.call_later(wait, self._reset_when_received)
            return
        reset_on_close(self._sock)
        self._lose(None)

    def _look_at_flush(self, before: int) -> None:
        """Give up a peer that has taken nothing of what waits for LINGER_MOST seconds: its owner waits for the end."""
        self._lingered = self._lingered + LINGER if self._pending_bytes == before else 0.0
        if self._lingered < LINGER_MOST:
            self._timer = self._loop.call_later(LINGER, self._look_at_flush, self._pending_bytes)
        else:
            reset_on_close(self._sock)
            self._lose(TimeoutError("the peer takes nothing"))

    def _linger(self) -> None:
        """Close once the peer's kernel has everything; what it sends to a closed socket can then do no harm."""
        self._lingered += LINGER
        if unacknowledged(self._sock) and self._lingered < LINGER_MOST:
            self._timer = self._loop.call_later(LINGER, self._linger)
        else:
            self._lose(None)

    def _lose(self, error: BaseException | None) -> None:
        if self._state is _TlsState.CLOSED:
            return
        opened = self._state is not _TlsState.HANDSHAKE
        self._state = _TlsState.CLOSED
        self._disarm()
        # Both callbacks first: the next socket gets this descriptor's number.
        self._stop_reading()
        self._error_poll.remove(self)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._pending.clear()
        self._pending_bytes = 0
        if opened:
            self._loop.call_soon(self._guard, self._protocol.connection_lost, error)
        elif self._on_handshake is not None:
            done, self._on_handshake = self._on_handshake, None
            done(error or ConnectionAbortedError("closed within the TLS handshake"))

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _guard(self, callback: Callable[..., object], *args: object) -> bool:
        """Call the protocol; if it raises, the connection ends and nothing else does."""
        try:
            callback(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._protocol_failed(error)
            return False
        return True

    def _protocol_failed(self, error: BaseException) -> None:
        self._loop.call_exception_handler(
            {"message": "the protocol of a TLS connection failed", "exception": error, "transport": self}
        )
        self._lose(error)


class BoundedTlsTransport(TlsTransport):
    """TLS whose reads may be charged, and of which the end may take a bounded time."""

    # Objects of one class share the keys of 29 attributes, as many as a TlsTransport has: with one more each takes
    # another 1.3 KiB (CPython 3.11).
    __slots__ = ("_close_deadline", "_close_timer", "payer")

    def __init__(self, *arguments: Any, payer: LoopTime | None, close_deadline: float | None, **settings: Any) -> None:
        """`close_deadline`: seconds that the end takes at most, behind `close`; None: as long as it takes."""
        self.payer = payer
        """Pays for what is read, the handshake included, for as long as it is set (docs/threats.md#L43)."""
        self._close_deadline = close_deadline
        self._close_timer: asyncio.TimerHandle | None = None
        super().__init__(*arguments, **settings)

    def close(self) -> None:
        if self._close_deadline is not None and not self.is_closing():
            self._close_timer = self._loop.call_later(self._close_deadline, self._lose, None)
        super().close()

    def _readable(self) -> None:
        if self.payer is None:
            super()._readable()
        else:
            self.payer.run(super()._readable)

    def _lose(self, error: BaseException | None) -> None:
        if self._close_timer is not None:
            self._close_timer.cancel()
        super()._lose(error)


_Transport = TypeVar("_Transport", bound=TlsTransport)


def accept_tls(
    sock: socket.socket,
    context: ssl.SSLContext,
    protocol: asyncio.BaseProtocol,
    *,
    on_handshake: Callable[[BaseException | None], None] | None = None,
) -> TlsTransport:
    """Serve TLS on an accepted socket; `protocol` hears of the connection when the handshake is done, else never.

    `on_handshake` is called once, later: with None behind `connection_made`, or with what ended the handshake.
    """
    return TlsTransport(sock, context, protocol, on_handshake=on_handshake)


async def accepted_tls(
    sock: socket.socket,
    context: ssl.SSLContext,
    protocol: asyncio.BaseProtocol,
    *,
    deadline: float,
    payer: LoopTime | None = None,
    close_deadline: float | None = None,
) -> BoundedTlsTransport:
    """Serve TLS on an accepted socket; return when the handshake is done.

    The socket belongs to the transport from now on, also on failure. Raises ssl.SSLError, OSError, TimeoutError.
    """
    make = partial(BoundedTlsTransport, payer=payer, close_deadline=close_deadline)
    async with asyncio.timeout(deadline):
        return await _made(sock, context, protocol, make)


async def connect_tls(
    sock: socket.socket, context: ssl.SSLContext, protocol: asyncio.BaseProtocol, server_hostname: str
) -> TlsTransport:
    """Make TLS on a connected socket, which belongs to the transport from now on, also on failure.

    Raises ssl.SSLError, OSError, TimeoutError. Cancelling closes the socket.
    """
    return await _made(sock, context, protocol, TlsTransport, server_hostname)


async def _made(
    sock: socket.socket,
    context: ssl.SSLContext,
    protocol: asyncio.BaseProtocol,
    make: Callable[..., _Transport],
    server_hostname: str | None = None,
) -> _Transport:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finished(error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    transport = make(sock, context, protocol, server_hostname=server_hostname, on_handshake=finished)
    try:
        await done
    except BaseException as error:
        if server_hostname is None and isinstance(error, asyncio.CancelledError):
            reset_on_close(sock)  # a peer that stalls sees a cut, and no descriptor waits for it
        transport.abort()
        raise
    return transport
