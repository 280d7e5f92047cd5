"""The frames of a connection: numbers, layouts, largest sizes, who may send them.

The flow in words. The end that dialled (the *initiator*: a client towards an agent, an agent towards a relay)
sends HELLO. On a session it sends AUTH in the same flight, and may send OPEN with DATA right behind it. The other
end (the *acceptor*) answers HELLO, and AUTH_OK once the token is verified; until then it acts on nothing else.
Then both open streams, send DATA within the credit that WINDOW grants, end a direction with FIN or a stream with
RESET, and confirm with ACK (and with every PING and PONG) how much of the other's byte sequence has arrived.
GOAWAY says that nothing new is accepted, and why. MOVE asks for another connection under the same session, before the
present one goes away. QUIET asks to let the queues run empty for a moment, so that both ends see the round trip. A
control connection has no AUTH (its TLS is mutual) and no
streams: it carries DIAL from the relay and STATUS from the agent.

Header, 8 bytes, big endian::

    length (24 bit) | type (8 bit) | stream id (32 bit)

`length` counts the body alone. Stream ids of the initiator are odd, of the acceptor even, strictly rising; id 0 is
the session. Every length is checked against the type's largest size before anything is kept.

    HELLO    1  record Hello                      <= 4 KiB    both, first
    AUTH     2  record Auth                       <= 68 KiB   initiator
    AUTH_OK  3  record AuthOk                     <= 4 KiB    acceptor
    OPEN     4  record Open                       <= 1 KiB    both (sessions)
    DATA     5  bytes                             <= 256 KiB  both (sessions)
    FIN      6  empty                                         both (sessions)
    RESET    7  code u32                          4           both (sessions)
    WINDOW   8  increment u32, > 0                4           both (sessions); id 0: the session's window
    ACK      9  received u64                      8           both (sessions)
    PING    10  number u64, received u64          16          both
    PONG    11  number u64 of the PING, received  16          both
    GOAWAY  12  record Goaway                     <= 4 KiB    both
    DIAL    13  record Dial                       <= 4 KiB    relay on a control connection
    STATUS  14  record Status                     <= 4 KiB    agent on a control connection
    MOVE   128  record Move                       <= 4 KiB    acceptor of a session
    QUIET  129  -                                 0           both, on a session

Types 128 to 255 are the ignorable range (<= 16 KiB): an end that does not know one skips and counts it. Any other
unknown type is a session error. docs/protocol.md has the same order and the same names.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

HEADER_SIZE = 8
MAX_DATA = 256 * 1024
MAX_AUTH = 68 * 1024
IGNORABLE_FROM = 128
MAX_IGNORABLE = 16 * 1024

VERSION = 1
"""The protocol version this code speaks."""

FIRST_CREDIT = 64 * 1024
"""Credit (bytes) of the session, and of each stream, before HELLO and AUTH say more. A stranger can make the other
end keep no more than this."""


class FrameType(IntEnum):
    """Frame numbers; layouts in the module's docstring."""

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


SMALLEST: dict[int, int] = {
    FrameType.RESET: 4,
    FrameType.WINDOW: 4,
    FrameType.ACK: 8,
    FrameType.PING: 16,
    FrameType.PONG: 16,
}
"""Least body size per type, where it is not 0."""

LARGEST: dict[int, int] = {
    FrameType.HELLO: 4096,
    FrameType.AUTH: MAX_AUTH,
    FrameType.AUTH_OK: 4096,
    FrameType.OPEN: 1024,
    FrameType.DATA: MAX_DATA,
    FrameType.FIN: 0,
    FrameType.RESET: 4,
    FrameType.WINDOW: 4,
    FrameType.ACK: 8,
    FrameType.PING: 16,
    FrameType.PONG: 16,
    FrameType.GOAWAY: 4096,
    FrameType.DIAL: 4096,
    FrameType.STATUS: 4096,
    FrameType.MOVE: 4096,
    FrameType.QUIET: 0,
}
"""Largest body size per type; the decoder checks it on the header alone."""

ON_SESSION_ID: frozenset[int] = frozenset(
    {
        FrameType.HELLO,
        FrameType.AUTH,
        FrameType.AUTH_OK,
        FrameType.ACK,
        FrameType.PING,
        FrameType.PONG,
        FrameType.GOAWAY,
        FrameType.DIAL,
        FrameType.STATUS,
        FrameType.MOVE,
        FrameType.QUIET,
    }
)
"""Types that carry stream id 0 and no other."""

ON_STREAM_ID: frozenset[int] = frozenset({FrameType.OPEN, FrameType.DATA, FrameType.FIN, FrameType.RESET})
"""Types that never carry stream id 0 (WINDOW may carry either)."""

_header = Struct(">II")
U32 = Struct(">I")
U64 = Struct(">Q")
PING_BODY = Struct(">QQ")

pack_header = _header.pack
"""`pack_header(length << 8 | type, stream_id)`: the 8 bytes of a header."""
unpack_header = _header.unpack_from
"""`(length << 8 | type, stream_id)` from a buffer and an offset."""


def frame(kind: int, stream_id: int, body: bytes = b"") -> bytes:
    """One whole frame: header and body in a single object, the form that is written and kept."""
    return pack_header(len(body) << 8 | kind, stream_id) + body
