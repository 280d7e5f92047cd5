"""One stream: two halves that share no flag.

Rules:

1. A stream is opened by OPEN; after that each direction lives on its own.
2. A direction ends in order exactly once, with FIN, after all its bytes; or with the stream, by RESET.
3. RESET ends both directions at once. One exception makes an orderly close possible without waiting for the peer:
   RESET with NO_ERROR after FIN says "I need nothing more": what the peer sent before FIN stays complete. Another one
   keeps what came before a cut: RESET with TRUNCATED is sent behind the bytes and drops none of them at the receiver.
4. The stream is forgotten when both directions are over. Frames that cross that moment are dropped and counted,
   their session credit is returned: a race is not an error.

============  ==========================  ==========================================
sending half  on                          becomes
============  ==========================  ==========================================
OPEN          `finish` with bytes queued  FINISHING (bytes first, then FIN)
OPEN          `finish`, nothing queued    FINISHED
any but over  `cut` with bytes queued     CUTTING (bytes first, then RESET with TRUNCATED)
FINISHING     last byte taken             FINISHED
CUTTING       last byte taken             RESET
any           RESET either way            RESET
============  ==========================  ==========================================

==============  ==================  ==================================================
receiving half  on                  becomes
==============  ==================  ==================================================
OPEN            DATA                OPEN (within credit; else RESET with FLOW_CONTROL)
OPEN            FIN                 FINISHED
FINISHED        DATA, FIN           RESET with PROTOCOL
any             RESET either way    RESET (NO_ERROR after FIN, and TRUNCATED, leave it FINISHED)
==============  ==================  ==================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from arcbridge.errors import ArcbridgeError
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.window import ReceiveWindow

SMALL = 2048
"""Bytes below which a piece that waits is joined to its neighbour: an object of one byte takes fifty."""

PROGRESS = 16 * 1024
"""Bytes of those that wait that must leave, unless all do, for a stream not to count as stalled."""


class SendState(Enum):
    """The direction from us."""

    OPEN = "open"
    FINISHING = "finishing"
    CUTTING = "cutting"
    FINISHED = "finished"
    RESET = "reset"


class ReceiveState(Enum):
    """The direction towards us."""

    OPEN = "open"
    FINISHED = "finished"
    RESET = "reset"


# As names of the module, because Python 3.11 finds a member of an enumeration by `__getattr__` of its class: 850
# instructions each time, and each open asked thirty times.
SEND_OPEN, SEND_FINISHING, SEND_CUTTING = SendState.OPEN, SendState.FINISHING, SendState.CUTTING
SEND_FINISHED, SEND_RESET = SendState.FINISHED, SendState.RESET
RECEIVE_OPEN, RECEIVE_FINISHED, RECEIVE_RESET = ReceiveState.OPEN, ReceiveState.FINISHED, ReceiveState.RESET


class StreamOwner(Protocol):
    """What the shell's object for a stream is called with."""

    def finish_received(self) -> None:
        """FIN came."""

    def reset_received(self, code: int) -> None:
        """RESET came, or the peer broke the stream."""

    def resume_writer(self) -> None:
        """What was queued has gone down to the low-water mark."""

    def abort(self, code: ResetCode) -> None:
        """Reset the stream, because this end does without it."""

    def session_ended(self, error: ArcbridgeError) -> None:
        """The session is over, and the stream with it."""


@dataclass(slots=True, eq=False, repr=False)
class Stream:
    """State of one stream. Its session changes it; the shell reads it, and sets `sink`."""

    id: int
    target: str
    credit: int
    """Bytes the peer still accepts; may be negative for a moment when its HELLO lowers the first window."""
    window: ReceiveWindow
    owner: StreamOwner | None = None
    """The object that acts for the stream in the shell."""
    owed: bool = False
    """Whether the peer opened it and lacks an answer, or a part of one: the shell says when it has all of it. A
    stream that ends before counts as churn, whichever end ended it (docs/threats.md#M7)."""
    sending: SendState = SEND_OPEN
    # Lists: an empty deque has 760 bytes.
    outbox: list[bytes | memoryview] = field(default_factory=list)
    queued: int = 0
    """Bytes in `outbox`."""
    held: int = 0
    """Bytes of memory that `outbox` holds: a piece of which a part was sent is held as a whole."""
    stalled_since: float = 0.0
    """Monotonic seconds since which less than `PROGRESS` bytes were taken of those that wait; of no meaning while
    none does."""
    progress: int = 0
    """`bytes_sent` then."""
    low_water: int = 0
    """Bytes in `outbox` at which a writer that stopped may go on."""
    blocked: bool = False
    """Whether the writer was told to stop, and is to be told when `queued` is at most `low_water`."""
    scheduled: bool = False
    """Whether the stream is in the scheduler."""
    allowance: int = 0
    """Bytes that it may send before bulk."""
    renewed_at: int = -(2**63)
    """The scheduler's count of bulk when the allowance was renewed; that of a new stream always is."""
    bulk: bool = False
    """Whether it sent as much as a copy does when that was last measured (by the scheduler)."""
    measured_at: float = 0.0
    """When that was, monotonic seconds; and `bytes_sent` then."""
    measured_bytes: int = 0
    bytes_sent: int = 0
    """Payload bytes handed to the connection."""
    receiving: ReceiveState = RECEIVE_OPEN
    sink: Callable[[memoryview], None] | None = None
    """Takes payload as it arrives (a view valid during the call); None: payload waits in `inbox`.

    A frame goes to the sink that was there when it began; after a reset the decoder drops the rest of it."""
    inbox: list[bytes] = field(default_factory=list)
    """Payload that waits, bounded by the window."""
    bytes_received: int = 0
    """Payload bytes, counted per frame where a sink takes them, else as they arrive."""

    def __repr__(self) -> str:
        return f"<Stream {self.id} {self.target} sending={self.sending.value} receiving={self.receiving.value}>"

    @property
    def over(self) -> bool:
        """Whether both directions have ended."""
        return (
            self.receiving is not RECEIVE_OPEN
            and self.sending is not SEND_OPEN
            and self.sending is not SEND_FINISHING
            and self.sending is not SEND_CUTTING
        )

    def deliver(self, view: memoryview) -> None:
        """Take payload of a frame that began while there was no sink; one that has come meanwhile gets it."""
        if self.receiving is not RECEIVE_OPEN:
            return  # reset in the middle of a frame: its credit was settled then
        self.bytes_received += len(view)
        if self.sink is not None:
            self.sink(view)
        else:
            self.keep(view)

    def keep(self, view: memoryview) -> None:
        """Let a copy of payload wait in `inbox`. Small pieces are joined, as `put` does: frames of two bytes would take
        thirty times their payload."""
        inbox = self.inbox
        if len(view) < SMALL and inbox and len(inbox[-1]) < SMALL:
            inbox[-1] = b"".join((inbox[-1], view))
        else:
            inbox.append(bytes(view))

    def put(self, data: bytes | memoryview | bytearray) -> None:
        """Let a copy of `data` wait. Small pieces are joined: what is held is little less than the memory it takes."""
        size = len(data)
        outbox = self.outbox
        last = outbox[-1] if size < SMALL and outbox else None
        if last is not None and len(last) < SMALL and type(last) is bytes:
            outbox[-1] = b"".join((last, data))
        else:
            outbox.append(bytes(data))
        self.queued += size
        self.held += size

    def take(self, most: int) -> list[bytes | memoryview]:
        """Take up to `most` queued bytes; nothing else holds the pieces."""
        pieces: list[bytes | memoryview] = []
        while most > 0 and self.outbox:
            chunk = self.outbox[0]
            size = len(chunk)
            if size <= most:
                self.outbox.pop(0)
                self.held -= len(chunk.obj) if type(chunk) is memoryview else size  # type: ignore[arg-type]
                pieces.append(chunk)
                most -= size
                self.queued -= size
            else:
                view = memoryview(chunk)
                pieces.append(view[:most])
                self.outbox[0] = view[most:]
                self.queued -= most
                most = 0
        return pieces
