"""A stream as an asyncio transport.

Anything written for asyncio (aiohttp's server, a splice, our own protocols) runs over a stream unchanged: pausing the
transport stops granting credit, and running out of credit pauses the protocol.

Four ways to end, which `connection_lost` distinguishes: `None` after both directions ended in order; `StreamReset`
after a RESET (`code` says why); `SessionEnded` or `ConnectionLost` when the session under it is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any

from arcbridge.errors import ArcbridgeError, StreamReset
from arcbridge.mux import buffer
from arcbridge.mux.write_limits import write_limits
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.session import Session
from arcbridge.wire.stream import RECEIVE_FINISHED, RECEIVE_OPEN, SEND_FINISHING, SEND_OPEN, Stream

if TYPE_CHECKING:
    from arcbridge.loop_shares import LoopTime
    from arcbridge.mux.session import MuxSession

WRITE_HIGH = 256 * 1024
"""Bytes that may wait in a stream before its protocol is paused: one read."""
WRITE_LOW = 64 * 1024


class StreamTransport(asyncio.Transport):
    """asyncio's transport over one stream.

    A protocol with `view_received(view)` gets payload as a view that is valid during the call only; any other gets
    `data_received(bytes)`. Credit goes back to the peer when a delivery returns, or at `resume_reading` if the
    protocol paused during it: then it had no room for what it got.
    """

    def __init__(self, session: MuxSession, machine: Session, stream: Stream) -> None:
        # Not `super().__init__()`: it makes a dictionary for `get_extra_info`.
        self._session = session
        self.loop, self.error_poll = session.loop, session.error_poll
        """The session's loop, and what polls the sockets of it."""
        self.payer: LoopTime | None = session.payer
        """To whom the loop's work for the stream is charged."""
        self._sender = machine.sender
        self._receiver = machine.receiver
        self._table = machine.stream_table
        self._stream = stream
        self.backlog = machine.backlog
        """That of the session, in which what waits in the stream counts."""
        stream.owner = self
        stream.low_water = WRITE_LOW
        self._low, self._high = WRITE_LOW, WRITE_HIGH
        self._protocol: Any = None
        """An `asyncio.Protocol`, or what has `view_received` in place of `data_received`; None before `attach`."""
        self._view_received: Callable[[memoryview], None] | None = None
        self._paused = False
        self._held = 0
        self._closing = False
        self._lost = False
        self.error: Exception | None = None
        """Why the stream was lost; None before, and after both directions ended in order."""
        self._eof_due = False
        self._writer_paused = False
        self._reader_scheduled = False
        self._draining = False
        self._cut_due: StreamReset | None = None

    def __repr__(self) -> str:
        return f"<StreamTransport session={self._session.label} {self._stream!r}>"

    @property
    def id(self) -> int:
        """The stream's id."""
        return self._stream.id

    @property
    def target(self) -> str:
        """What OPEN named."""
        return self._stream.target

    @property
    def bytes_sent(self) -> int:
        """Payload bytes handed to the connection."""
        return self._stream.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Payload bytes that arrived."""
        return self._stream.bytes_received

    @property
    def owed(self) -> bool:
        """Whether the peer, which opened it, lacks an answer or a part of one; true until the application says else.

        A stream that ends before is churn, of which a session may have a certain amount (docs/threats.md#M7)."""
        return self._stream.owed

    @owed.setter
    def owed(self, owed: bool) -> None:
        self._stream.owed = owed

    def count_as_churn(self) -> None:
        """Count that the stream came to nothing, though it had its answer."""
        self._table.count_churn()
        self._session.act()

    # -- asyncio.BaseTransport ------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`stream_id`; nothing of a socket, for there is none."""
        return self._stream.id if name == "stream_id" else default

    def is_closing(self) -> bool:
        """Return whether the transport was closed, aborted, or lost."""
        return self._closing or self._lost

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Deliver to `protocol` from now on."""
        self._protocol = protocol
        self._view_received = getattr(protocol, "view_received", None)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the current protocol."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def attach(self, protocol: asyncio.BaseProtocol) -> None:
        """First protocol of the stream: `connection_made`, then what has arrived meanwhile, in a later turn.

        What `connection_made` raises is raised here, and the stream is reset.
        """
        late = self._lost  # it ended before it had a protocol
        self.set_protocol(protocol)
        if not late:
            self._stream.sink = self._deliver
        try:
            protocol.connection_made(self)
        except BaseException:
            self.abort(ResetCode.INTERNAL)
            raise
        if late:
            self.loop.call_soon(self._session.charge, self._tell_lost)
        if not self._paused:
            self._schedule_reader()

    def close(self) -> None:
        """End in order: what was written is sent, then FIN; what still comes is not wanted.

        `connection_lost(None)` follows when the last byte was handed to the connection.
        """
        if self._closing or self._lost:
            return
        self._closing = True
        self._discard_input()
        self._table.finish(self._stream)
        self._session.wake()
        if self._stream.sending is not SEND_FINISHING:
            self._end_in_order()
        else:
            self._stream.blocked = True  # resume_writer is called when the bytes have gone
            self._stream.low_water = 0

    def abort(self, code: ResetCode = ResetCode.CANCELLED) -> None:
        """End both directions now with a RESET; queued bytes are dropped. `connection_lost(StreamReset)` follows."""
        if self._lost:
            return
        self._table.reset(self._stream, code)
        self._lose(StreamReset(code))
        self._session.act()

    def cut(self) -> None:
        """End because the source of what was written broke off: the peer gets all of it, then learns of the cut.

        `connection_lost(StreamReset)` follows at once.
        """
        if self._lost:
            return
        self._table.cut(self._stream)
        self._lose(StreamReset(ResetCode.TRUNCATED))
        self._session.act()

    # -- asyncio.ReadTransport ------------------------------------------------------------------------------------

    def is_reading(self) -> bool:
        """Return whether payload is delivered as it arrives."""
        return not self._paused and not self._closing and not self._lost

    def pause_reading(self) -> None:
        """Deliver nothing and grant nothing until `resume_reading`."""
        self._paused = True

    def resume_reading(self) -> None:
        """Deliver again; bytes delivered by the call that paused count as consumed now."""
        if not self._paused:
            return
        self._resume()
        self._schedule_reader()

    def read_on(self) -> None:
        """Deliver again, what waits within the call: `resume_reading` for the loop's own callbacks."""
        self._paused = False
        if self._held:
            self._resume()
        self.drain_inbox()

    # -- asyncio.WriteTransport -----------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, copied once: `data` may be reused at once. Ignored after the stream was lost."""
        if self._lost or self._closing:
            return
        queued = self._sender.send(self._stream, data)
        session = self._session
        if session._flush_handle is None:
            session.wake()
        if queued and not self._writer_paused:
            if queued > self._high:
                self._pause_writer(self._low)
            elif self.backlog.full:
                self._pause_writer(0)

    @property
    def writing_paused(self) -> bool:
        """Whether its protocol, this one or one before it, was paused, and not resumed yet."""
        return self._writer_paused

    @property
    def portion(self) -> int:
        """Bytes that may be read at a time for this stream: few while its backlog is full."""
        return buffer.PORTION if self.backlog.full else buffer.PAYLOAD

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send all, as one write."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """Return True: half-close is a FIN frame."""
        return True

    def write_eof(self, *, soon: bool = True) -> None:
        """End our direction after all its bytes; reading goes on. Without `soon`, for the loop's own callbacks, a
        `connection_lost` comes within the call."""
        if self._lost or self._closing:
            return
        self._table.finish(self._stream)
        self._session.wake()
        if self._stream.receiving is not RECEIVE_OPEN:
            self._lose_if_over(soon=soon)

    def get_write_buffer_size(self) -> int:
        """Return the bytes that wait in the stream."""
        return self._stream.queued

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """(low, high) in bytes."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As asyncio's: `low` defaults to a quarter of `high`."""
        self._low, self._high = write_limits(high, low, WRITE_HIGH)
        self._stream.low_water = self._low

    # -- called by the session ------------------------------------------------------------------------------------

    def resume_writer(self) -> None:
        """What was queued has gone down to the low-water mark."""
        if self._closing:
            if self._stream.sending is not SEND_OPEN and not self._stream.queued:
                self._end_in_order()
            return
        if self._writer_paused and not self._lost:
            self._writer_paused = False
            if self._protocol is not None:
                try:
                    self._protocol.resume_writing()
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self._broken(error)
                    return
        self._lose_if_over()

    def finish_received(self) -> None:
        """FIN came: tell the protocol once everything before it was delivered."""
        if self._closing:
            self._lose_if_over()
            return
        self._eof_due = True
        # Not at once: what breaks the stream behind its end mostly comes in the same read.
        if not self._paused and not self._reader_scheduled and self._protocol is not None:
            self._session.finished.append(self)

    def reset_received(self, code: int) -> None:
        """RESET came, or the stream was broken by the peer."""
        if code == ResetCode.NO_ERROR and self._stream.receiving is RECEIVE_FINISHED:
            self.resume_writer()  # what it writes now is dropped: the peer wants no more
            return
        if code == ResetCode.TRUNCATED and self._stream.inbox and not self._closing:
            self._cut_due = StreamReset(code)  # what came before it is delivered first
            self._eof_due = True
            self._schedule_reader()
            return
        self._lose(StreamReset(code))

    def session_ended(self, error: ArcbridgeError) -> None:
        """The session is over, and the stream with it, behind the end of the peer's direction if that has come."""
        if self._eof_due and self._cut_due is None and not self._stream.inbox and self.is_reading():
            self._eof_due = False
            self._deliver_eof()
        self._lose(error)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _deliver(self, view: memoryview) -> None:
        """The sink of the machine's stream: payload as it arrives."""
        stream = self._stream
        received, paused = self._view_received, self._paused
        if received is None or paused or self._closing or stream.inbox:
            self._deliver_otherwise(view)
            return
        try:
            received(view)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._broken(error)
            return
        if self._paused:  # it paused within the call
            self._account(len(view))
        else:
            self._receiver.consumed(stream, len(view))

    def _deliver_otherwise(self, view: memoryview) -> None:
        """The same to a protocol that takes bytes, or to none now."""
        stream = self._stream
        if self._closing or self._lost:  # the rest of a frame that had begun
            self._receiver.consumed(stream, len(view))
            return
        if self._paused or (stream.inbox and not self._draining):
            stream.keep(view)
            return
        try:
            if self._view_received is not None:
                self._view_received(view)
            else:
                self._protocol.data_received(bytes(view))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._broken(error)
            return
        self._account(len(view))

    def _account(self, count: int) -> None:
        """A delivery returned: its bytes are consumed, or held until the protocol, which paused, resumes."""
        if self._paused and not self._closing and not self._lost:
            self._held += count
        else:
            self._receiver.consumed(self._stream, count)

    def _resume(self) -> None:
        self._paused = False
        if self._held:
            held, self._held = self._held, 0
            self._receiver.consumed(self._stream, held)
            self._session.wake()

    def _schedule_reader(self) -> None:
        waits = not self._paused and (self._stream.inbox or self._eof_due)
        if waits and not self._reader_scheduled and self._protocol is not None:
            self._reader_scheduled = True
            self.loop.call_soon(self._session.charge, self.drain_inbox)

    def drain_inbox(self) -> None:
        """Deliver what waited, then the end of the peer's direction."""
        payer = self._session.payer
        if payer is not None and payer.held_until and (wait := payer.held_until - monotonic()) > 0.0:
            self._reader_scheduled = True
            self.loop.call_later(wait, self._session.charge, self.drain_inbox)
            return
        self._reader_scheduled = False
        inbox = self._stream.inbox
        if inbox:
            while inbox and self.is_reading():
                self._draining = True
                try:
                    self._deliver(memoryview(inbox.pop(0)))
                finally:
                    self._draining = False
            self._session.wake()
        if self._eof_due and not inbox and self.is_reading():
            self._eof_due = False
            if self._cut_due is not None:
                self._lose(self._cut_due)
            else:
                self._deliver_eof()

    def _deliver_eof(self) -> None:
        try:
            keep_open = self._protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._broken(error)
            return
        if not keep_open:
            self.close()
        elif self._stream.over:
            self._lose(None, soon=False)

    def _discard_input(self) -> None:
        """Nothing more is wanted of the peer: return the credit of what waits."""
        stream = self._stream
        waiting = self._held + sum(map(len, stream.inbox))
        stream.inbox.clear()
        self._held = 0
        self._eof_due = False
        if waiting:
            self._receiver.consumed(stream, waiting)

    def _end_in_order(self) -> None:
        """Our FIN has gone. A peer that still sends gets a RESET that says so: nothing more is wanted."""
        if self._stream.receiving is RECEIVE_OPEN:
            self._table.reset(self._stream, ResetCode.NO_ERROR)
        self._lose(None)
        self._session.act()

    def _lose_if_over(self, *, soon: bool = True) -> None:
        """Both directions are over and everything was delivered."""
        if self._lost or self._eof_due or self._stream.inbox:
            return
        if self._stream.over:
            self._lose(None, soon=soon)

    def _broken(self, error: BaseException) -> None:
        """The protocol raised: its stream ends, its neighbours do not notice."""
        self._report(error)
        self.abort(ResetCode.INTERNAL)

    def _report(self, error: BaseException) -> None:
        """Give what the protocol raised to the loop's exception handler."""
        self.loop.call_exception_handler(
            {"message": f"the protocol of {self!r} failed", "exception": error, "protocol": self._protocol}
        )

    def _pause_writer(self, low_water: int) -> None:
        """Pause the protocol until `low_water` bytes wait."""
        self._writer_paused = True
        self._stream.blocked = True
        self._stream.low_water = low_water
        if self._protocol is not None:
            try:
                self._protocol.pause_writing()
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self._broken(error)

    def _lose(self, error: Exception | None, *, soon: bool = True) -> None:
        """The stream is over: tell the protocol in a later turn (`soon`), because it may be what called."""
        if self._lost:
            return
        self._lost = True
        self.error = error
        self._stream.sink = None
        if error is not None:
            self._discard_input()
        self._stream.owner = None
        if not soon:
            self._tell_lost()
        elif self._protocol is not None:
            self.loop.call_soon(self._session.charge, self._tell_lost)

    def _tell_lost(self) -> None:
        # Looked up now: it may have been changed meanwhile. It is let go, because it has this transport: a cycle for
        # each stream, and the collector that finds them took 7 % of an open at the client.
        protocol, self._protocol, self._view_received = self._protocol, None, None
        if protocol is None:
            return
        try:
            protocol.connection_lost(self.error)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # the stream is over; what else the session has to do goes on
            self._report(error)
