"""Defines every default of the protocol, with its unit, its reason, and what breaks when it is larger or smaller.

The parts of a session act on the values; nothing is counted here. Invariant: values that cannot work together are
refused when a `Limits` is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from arcbridge.errors import LocalProtocolError
from arcbridge.wire.frames import FIRST_CREDIT, MAX_DATA
from arcbridge.wire.window import MAX_CREDIT

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one session or control connection, on one side."""

    stream_window: int = 256 * KIB
    """First credit of a stream, bytes. One full read: smaller stalls a burst, larger costs memory per idle stream
    (nothing is allocated, but a frozen reader may be sent this much)."""

    max_stream_window: int = 16 * MIB
    """Where a stream's window stops growing: fills 1.3 Gbit/s over 100 ms."""

    session_window: int = 64 * MIB
    """Bytes that all streams of a session together may be sent ahead of their readers: the session's memory cap.
    Smaller lets a few frozen readers starve their neighbours; larger is memory one peer may hold."""

    max_streams: int = 8192
    """Streams the peer may have open at once; k9s and 500 watches use hundreds."""

    early_streams: int = 64
    """Streams that may be opened before AUTH is accepted: the first flight of a client that starts."""

    max_queued_control: int = 256 * KIB
    """Control bytes waiting for a peer that does not read; above it the session ends (floods of PING, OPEN+RESET)."""

    churn_burst: int = 1000
    """Streams that end by RESET (either side), or before their answer, that may come at once (docs/threats.md#M7)."""

    churn_rate: float = 33.0
    """Such streams per second that refill the burst."""

    small_frame_burst: int = 20_000
    """Empty DATA, WINDOW, ACK, PING and ignorable frames that may come beyond what payload explains."""

    small_frame_rate: float = 2_000.0
    """Such frames per second that refill the burst."""

    ping_interval: float = 10.0
    """Seconds between PINGs. Below the 30 s after which some NATs forget; idle cost is 2 frames of 24 bytes."""

    ping_timeout: float = 25.0
    """Seconds without any byte from the peer, or with a PING unanswered, until the connection is dead."""

    handshake_timeout: float = 10.0
    """Seconds for HELLO and AUTH together."""

    drain_timeout: float = 30.0
    """Seconds from GOAWAY until the remaining streams are reset."""

    detached_timeout: float = 120.0
    """Seconds that a session waits without a connection: a laptop's change of network, a relay's restart. Longer keeps
    what a vanished client left at the API server (watches, exec) for as long."""

    replay: int = 32 * MIB
    """Bytes that were sent and not confirmed, kept to be sent again on a new connection; above it writing pauses. More
    than may be under way, so that it never is the limit of a path that works. 0: nothing is kept, and a session ends
    with its connection."""

    backlog: int = 32 * MIB
    """Bytes that may wait towards the peer, in its streams and sent but not confirmed, before its streams are fed in
    small portions (`wire.backlog`): as much as `replay`. Smaller slows many copies at once over a long path, larger is
    memory that one peer may hold."""

    under_way: int = 24 * MIB
    """Most bytes that are sent and not confirmed, however long and fast the path (`wire.congestion` chooses how many it
    takes): the largest window and a half, for a second stream. 0: only credit limits what is sent."""

    ack_every: int = 255 * KIB
    """Bytes received before an ACK: one ACK per full DATA frame. Rarer keeps more history at the sender."""

    frame_shared: int = 16 * KIB
    """What a sparse stream may send before all bulk, and the least turn of a bulk stream while another one waits: one
    TLS record, bytes. On a path whose rate is known, a turn is a millisecond of it (`wire.scheduler`)."""

    frame_alone: int = 255 * KIB
    """Largest DATA frame, and largest turn: what one read gives of payload (`mux.buffer`). Cutting to 16 KiB costs a
    third of the throughput."""

    def __post_init__(self) -> None:
        """Raise LocalProtocolError for windows that a peer must refuse, or that could not be kept."""
        if not FIRST_CREDIT <= self.stream_window <= self.max_stream_window <= MAX_CREDIT:
            raise LocalProtocolError(f"stream windows must be {FIRST_CREDIT} <= first <= largest <= {MAX_CREDIT} bytes")
        if not FIRST_CREDIT <= self.session_window <= MAX_CREDIT:
            raise LocalProtocolError(f"the session's window must be {FIRST_CREDIT} to {MAX_CREDIT} bytes")
        if self.replay and self.replay < 2 * self.ack_every:
            raise LocalProtocolError(f"replay must be 0, or at least twice ack_every ({2 * self.ack_every} bytes)")
        if self.under_way and self.under_way < FIRST_CREDIT:
            raise LocalProtocolError(f"under_way must be 0, or at least {FIRST_CREDIT} bytes")
        if not 0 < self.frame_shared <= self.frame_alone <= MAX_DATA:
            raise LocalProtocolError(f"DATA frames must be 1 <= shared <= alone <= {MAX_DATA} bytes")


DEFAULT = Limits()
