"""The frames of a connection: one table of numbers, layouts, sizes, stream ids, and who may send them.

The flow in words. The end that dialled (the *initiator*: a client towards an agent, an agent towards a relay)
sends HELLO. On a session it sends AUTH in the same flight, and may send OPEN with DATA right behind it. The other
end (the *acceptor*) answers HELLO, and AUTH_OK once the token is verified; until then it acts on nothing else.
Then both open streams, send DATA within the credit that WINDOW grants, end a direction with FIN or a stream with
RESET, and confirm with ACK (and with every PING and PONG) how much of the other's byte sequence has arrived.
GOAWAY says that nothing new is accepted, and why. MOVE asks for another connection under the same session, before the
present one goes away. QUIET asks to let the queues run empty for a moment, so that both ends see the round trip. A
control connection has no AUTH (its TLS is mutual) and no streams: it carries DIAL and REVOKE from the relay, STATUS
from the agent, LEDGER and SUCCESSION both ways.

Header, 8 bytes, big endian::

    length (24 bit) | type (8 bit) | stream id (32 bit)

`length` counts the body alone. Stream ids of the initiator are odd, of the acceptor even, strictly rising; id 0 is
the session. Every length is checked against the type's largest size before anything is kept.

`FRAMES` says of each type what its body is, how large it may be, which stream ids it carries and who may send it.
Types 128 to 255 are the ignorable range (<= 16 KiB): an end that does not know one skips and counts it. Any other
unknown type is a session error. tests/wire/test_frames.py holds the table of docs/protocol.md to `FRAMES`.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from struct import Struct
from typing import NamedTuple

from arcbridge.errors import LocalProtocolError
from arcbridge.wire.records import Record
from arcbridge.wire.state import Kind, Side

HEADER_SIZE = 8
MAX_DATA = 256 * 1024
IGNORABLE_FROM = 128
MAX_IGNORABLE = 16 * 1024

VERSION = 1
"""The protocol version this code speaks."""

FIRST_CREDIT = 64 * 1024
"""Credit (bytes) of the session, and of each stream, before HELLO and AUTH say more. A peer that
is not authenticated can make this end keep no more."""


class FrameType(IntEnum):
    """Frame numbers; `FRAMES` has their layouts."""

    HELLO = 1
    AUTH = 2
    AUTH_OK = 3
    OPEN = 4
    DATA = 5
    FIN = 6
    RESET = 7
    WINDOW = 8
    ACK = 9
    PING = 10
    PONG = 11
    GOAWAY = 12
    DIAL = 13
    STATUS = 14
    MOVE = 128
    QUIET = 129
    REVOKE = 130
    LEDGER = 131
    SUCCESSION = 132


class ResetCode(IntEnum):
    """Why one stream ended before its time."""

    NO_ERROR = 0
    """The sender needs nothing more; what it has sent is complete."""
    PROTOCOL = 1
    FLOW_CONTROL = 2
    CANCELLED = 3
    """The application went away: kubectl was interrupted, a socket was closed or reset."""
    REFUSED = 4
    """Not processed at all (over GOAWAY's last stream): safe to try again."""
    UNKNOWN_TARGET = 5
    FORBIDDEN = 6
    CONNECT_FAILED = 7
    IDLE = 8
    TRUNCATED = 9
    """The source ended early: what was delivered is a prefix, not the whole."""
    INTERNAL = 10
    LIMIT = 11
    EXPIRED = 12
    """The user's token has lapsed."""


class GoawayCode(IntEnum):
    """Why a session or a control connection takes nothing new, or is over."""

    DONE = 0
    PROTOCOL = 1
    VERSION = 2
    UNAUTHENTICATED = 3
    FORBIDDEN = 4
    EXPIRED = 5
    DRAINING = 6
    REPLACED = 7
    LIMIT = 8
    TIMEOUT = 9
    INTERNAL = 10
    REVOKED = 11
    UNAVAILABLE = 12
    FLOW_CONTROL = 13
    GONE = 14
    """The session that a connection wanted to resume is not here, or is over."""
    CROSSED = 15
    """The client was joined under another id than the agent: the relay has crossed two joins."""


class StreamId(Enum):
    """Which stream ids a type carries."""

    ZERO = "0"
    """The frame is about the session."""
    STREAM = "not 0"
    EITHER = "any"


class From(Enum):
    """Who may send a type: connections and sides."""

    BOTH = "both"
    SESSION_BOTH = "both, on a session"
    SESSION_INITIATOR = "initiator of a session"
    SESSION_ACCEPTOR = "acceptor of a session"
    CONTROL_BOTH = "both, on a control connection"
    CONTROL_ACCEPTOR = "relay, on a control connection"
    CONTROL_INITIATOR = "agent, on a control connection"


MAY_SEND: dict[From, frozenset[tuple[Kind, Side]]] = {
    From.BOTH: frozenset((kind, side) for kind in Kind for side in Side),
    From.SESSION_BOTH: frozenset((Kind.SESSION, side) for side in Side),
    From.SESSION_INITIATOR: frozenset({(Kind.SESSION, Side.INITIATOR)}),
    From.SESSION_ACCEPTOR: frozenset({(Kind.SESSION, Side.ACCEPTOR)}),
    From.CONTROL_BOTH: frozenset((Kind.CONTROL, side) for side in Side),
    From.CONTROL_ACCEPTOR: frozenset({(Kind.CONTROL, Side.ACCEPTOR)}),
    From.CONTROL_INITIATOR: frozenset({(Kind.CONTROL, Side.INITIATOR)}),
}
"""Connections on which, and sides from which, a frame may come."""


class Layout(NamedTuple):
    """What is known of one frame type."""

    body: str
    """Fields in order, or the record's name."""
    smallest: int
    """Least size of the body, bytes."""
    largest: int
    """Largest size of the body, bytes; the decoder checks both on the header alone."""
    stream_id: StreamId
    sender: From


FRAMES: dict[int, Layout] = {
    FrameType.HELLO: Layout("record Hello", 0, 4096, StreamId.ZERO, From.BOTH),
    FrameType.AUTH: Layout("record Auth", 0, 68 * 1024, StreamId.ZERO, From.SESSION_INITIATOR),
    FrameType.AUTH_OK: Layout("record AuthOk", 0, 4096, StreamId.ZERO, From.SESSION_ACCEPTOR),
    FrameType.OPEN: Layout("record Open", 0, 1024, StreamId.STREAM, From.SESSION_BOTH),
    FrameType.DATA: Layout("payload", 0, MAX_DATA, StreamId.STREAM, From.SESSION_BOTH),
    FrameType.FIN: Layout("empty", 0, 0, StreamId.STREAM, From.SESSION_BOTH),
    FrameType.RESET: Layout("code u32", 4, 4, StreamId.STREAM, From.SESSION_BOTH),
    FrameType.WINDOW: Layout("increment u32", 4, 4, StreamId.EITHER, From.SESSION_BOTH),
    FrameType.ACK: Layout("received u64", 8, 8, StreamId.ZERO, From.BOTH),
    FrameType.PING: Layout("number u64, received u64", 16, 16, StreamId.ZERO, From.BOTH),
    FrameType.PONG: Layout("number u64, received u64", 16, 16, StreamId.ZERO, From.BOTH),
    FrameType.GOAWAY: Layout("record Goaway", 0, 4096, StreamId.ZERO, From.BOTH),
    FrameType.DIAL: Layout("record Dial", 0, 4096, StreamId.ZERO, From.CONTROL_ACCEPTOR),
    FrameType.STATUS: Layout("record Status", 0, 4096, StreamId.ZERO, From.CONTROL_INITIATOR),
    FrameType.MOVE: Layout("record Move", 0, 4096, StreamId.ZERO, From.SESSION_ACCEPTOR),
    FrameType.QUIET: Layout("empty", 0, 0, StreamId.ZERO, From.SESSION_BOTH),
    FrameType.REVOKE: Layout("record Revoke", 0, 4096, StreamId.ZERO, From.CONTROL_ACCEPTOR),
    FrameType.LEDGER: Layout("record Ledger", 0, MAX_IGNORABLE, StreamId.ZERO, From.CONTROL_BOTH),
    FrameType.SUCCESSION: Layout("record CaSuccession", 0, 16384, StreamId.ZERO, From.CONTROL_BOTH),
}
"""Every type that this end knows."""

HANDSHAKE = frozenset({FrameType.HELLO, FrameType.AUTH, FrameType.AUTH_OK, FrameType.GOAWAY})
"""Types that may come before a peer's byte sequence begins."""

UNCHARGED = frozenset({FrameType.HELLO, FrameType.OPEN, FrameType.FIN, FrameType.RESET, FrameType.PING})
"""Types that do not count as part of a flood just because they come: HELLO comes once, what opens and ends streams has
the streams' own bounds, and the handlers charge a PING that no payload explains, and a FIN of a stream that is over."""

_header = Struct(">II")
U32 = Struct(">I")
U64 = Struct(">Q")
PING_BODY = Struct(">QQ")

pack_header = _header.pack
"""`pack_header(length << 8 | type, stream_id)`: the 8 bytes of a header."""
unpack_header = _header.unpack_from
"""`(length << 8 | type, stream_id)` from a buffer and an offset."""


def frame(kind: int, stream_id: int, body: bytes = b"") -> bytes:
    """Return one whole frame: header and body in a single object, the form that is written and kept."""
    return pack_header(len(body) << 8 | kind, stream_id) + body


def record_frame(kind: FrameType, record: Record, stream_id: int = 0) -> bytes:
    """Return one whole frame with a record. Raises LocalProtocolError where the peer would have to refuse its size."""
    body = record.encode()
    largest = FRAMES[kind].largest
    if len(body) > largest:
        raise LocalProtocolError(f"{kind.name} of {len(body)} bytes, more than {largest}")
    return frame(kind, stream_id, body)
