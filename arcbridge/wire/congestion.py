"""Bounds the bytes of a session that are under way: enough to fill the path, too few to fill its queues.

A sender's own windows say what a *reader* can take. What a path can take is another question: the queue in front of a
slow last mile takes megabytes, and a keystroke waits behind all of them. So the sender keeps what it sent and the peer
did not confirm below a *cap*, made from what the peer's counts (ACK, PONG) tell: bytes delivered per second, and the
smallest recent round trip. Everything between the two schedulers counts as under way, TLS buffers and sockets too.

Policy, in order:

1. PING goes out with each `step` bytes, so the counts come as often as the cap needs them, whatever the peer's habits.
   A sender that stopped at its cap always has a PING under way, whose answer lets it go on: no deadlock.
2. Each answer gives a round trip, and a rate: the bytes between the last PING that was answered when this one left,
   and this one, over the longer of the two times that they took to leave and to be answered (answers that waited for
   each other and come in a heap say nothing about the path). While the sender had nothing more to send, a rate says
   only that the path carries at least so much.
3. While the rate still grows, the cap grows with each count by what that count confirmed, as TCP's slow start does
   (RFC 5681 §3.1), and is at least twice rate times round trip. A queue is seen before the plateau: while answers take
   much longer than the smallest round trip, the cap grows by a quarter of that (RFC 9406, HyStart++). Once three
   rounds in a row brought nothing, it is `CRUISE_GAIN` times the product, so that the queue is half a round trip at
   most and a path that gets faster is noticed.
4. The round trip is the smallest of the last `ROUND_TRIP_MEMORY` seconds. When none of them was as small, or three
   rounds in a row were far above it, our own queue and a longer path look the same; so both ends halve their caps
   (QUIET) until the queues must be empty, and the smallest round trip of that time is believed whatever it is. With it
   the rate is taken anew: a slower path is noticed by its queue.

`CongestionWindow` keeps the account of counts and PINGs and sets the cap. Its parts judge the answers: `RateEstimate`
makes the rate of 2, `SlowStart` the growth of 3, `RoundTripProbe` the doubt and the halving of 4.

Nothing is done per frame and there is no timer: a comparison or two for each flush, the estimate with each answer.
"""

from __future__ import annotations

from collections import deque

from arcbridge.wire.rate_estimate import SPAN, RateEstimate
from arcbridge.wire.round_trip import BULK_ROUND_TRIP, LEAST_ROUND_TRIP, RoundTripProbe
from arcbridge.wire.slow_start import SlowStart

KIB = 1024

FIRST = 128 * KIB
"""Bytes under way before anything was measured: 50 ms of 20 Mbit/s, and seven doublings below 16 MiB."""

FLOOR = 32 * KIB
"""Least cap, bytes: two frames of the smaller size."""

EXTRA = 8 * KIB
"""Bytes beyond the product, for the frame that is being cut."""

SHARE = 96 * KIB
"""Bytes beyond the product, at most, while a sparse stream sends beside bulk on a path so short that processors may
carry less than it would: both directions share them. A cap in proportion to the rate keeps whatever shares there are:
the slower of two copies had 27 to 49 %. With a part that is the same for both they come to halves, and a keystroke
takes 3.7 ms in place of 3.4 (decision 0008)."""

STARTUP_GAIN = 2.0
CRUISE_GAIN = 1.25
"""Times rate times round trip. Less lost throughput where counts come late; more is queue in front of a keystroke."""

PROBE_GAIN = 1.5
"""The same, in one of `rate_estimate.ROUNDS` rounds: a sender that never probes above its estimate measures its own
limit and shrinks."""

STEP_SECONDS = 0.001
"""No more than one PING in as many seconds."""

ROUND_TRIP_MEMORY = 10.0
"""Seconds for which a round trip counts."""


class CongestionWindow:
    """The cap of one connection's one direction. `now` is monotonic seconds and an argument."""

    def __init__(self, most: int, *, sent: int = 0, now: float = 0.0, earlier: CongestionWindow | None = None) -> None:
        """`most`: the cap never exceeds it, bytes. `sent`: the count so far. `earlier`: that of the connection before,
        of which half counts again as soon as the path proves to be no longer (RFC 9040 §8.1)."""
        self._most = most
        self.cap = 0
        """Bytes that may be under way."""
        self.step = 0
        """Bytes between two PINGs; at most half the cap, so that a sender at the cap has one under way."""
        self.least = 0
        """Bytes of room below which no payload is sent: no frames of a few bytes."""
        self.round_trip = 0.0
        """The smallest recent round trip, seconds; 0 while unknown."""
        self._trip_confirmed_at = now
        """When a round trip was last as small, monotonic seconds."""
        self.interactive = False
        """Whether a sparse stream sends beside bulk (the session says so): its bytes wait behind the others'."""
        self.app_limited_until = sent
        """Count of bytes up to which the sender had nothing more to send (RFC 9002 §7.8, BBR)."""
        self.left_at = now
        """When the latest flush left, monotonic seconds. `Sender` writes it, and `app_limited_until`, at each flush."""
        self._rate_estimate = RateEstimate()
        self._slow_start = SlowStart(
            FIRST, most, (earlier.cap // 2, earlier.round_trip) if earlier is not None and earlier.rate else None
        )
        self._probe = RoundTripProbe(now)
        self._received = sent
        """The peer's latest count, bytes."""
        self._pings: deque[tuple[int, float, tuple[int, float, float], bool]] = deque()
        """Unanswered PINGs: bytes sent before it, when it left, `_base` then, whether the sender was app-limited."""
        self._base = (sent, now, now)
        """Of the latest PING whose answer gave a rate: bytes sent before it, when the answer came, when it had left."""
        self._round_end = sent
        """The round ends with a count above this, bytes."""
        self._round_began_at = now
        """When the round began, monotonic seconds."""
        self._round_least_trip = 0.0
        """The smallest round trip of the round, seconds; 0: none."""
        self._recapped_for = 0, False
        """Slow start's cap, bytes, and `interactive` when the cap was set: all that a count without a PING changes."""
        self._recap(self._usual_trip)

    @property
    def rate(self) -> float:
        """Bytes per second that the path delivers; 0 while unknown."""
        return self._rate_estimate.rate

    @property
    def pace(self) -> int:
        """Bytes that the path takes in a millisecond; 0 while unknown."""
        return int(self._rate_estimate.rate * STEP_SECONDS)

    def resume(self, sent: int, under_way: int, now: float) -> None:
        """Begin again: the first flush after a pause is about to be counted; `sent` and `under_way` are without it."""
        if under_way < self.step:
            # What was sent long ago has arrived, though no count has said so yet.
            self._base = (sent, now, now)
            self._received = sent

    def pinged(self, sent: int, now: float) -> None:
        """Note a PING that leaves behind the bytes up to `sent`."""
        self._pings.append((sent, now, self._base, self.app_limited_until > self._base[0]))

    def confirmed(self, received: int, sent: int, now: float) -> float:
        """Note that the peer's count rose to `received`; return a new round trip, or 0."""
        estimate = self._rate_estimate
        ack_burst, was_under_way = received - self._received, sent - self._received
        self._received = received
        if ack_burst > estimate.ack_burst:
            estimate.ack_burst = ack_burst
        probing, growing = self._probe.active, self._slow_start.growing
        if growing and not probing and was_under_way << 1 >= self.cap:
            self._slow_start.grow(ack_burst)
        pings = self._pings
        if not pings or received <= pings[0][0]:
            if probing:
                self._probe.take_count(received, sent, self.cap)
            elif growing and self._recapped_for != (self._slow_start.cap, self.interactive):
                self._recap(self._usual_trip)
            return 0.0
        trip = 0.0
        while pings and received > pings[0][0]:
            at, left_at, (base, base_at, base_left_at), app_limited = pings.popleft()
            trip = max(now - left_at, 1e-6)
            span = max(now - base_at, left_at - base_left_at)
            if span >= SPAN:
                estimate.take((at - base) / span, app_limited, probing)
                self._base = (at, now, left_at)
            if not self._round_least_trip or trip < self._round_least_trip:
                self._round_least_trip = trip
        if not self.round_trip or trip <= self.round_trip:
            self.round_trip, self._trip_confirmed_at = trip, now
        elif trip <= 1.1 * self.round_trip + 0.0005:
            self._trip_confirmed_at = now
        if probing:
            probed = self._probe.take_trip(trip, received, sent, self.cap)
            if probed:
                self.round_trip, self._trip_confirmed_at = probed, now
        usual = self._usual_trip
        if growing and not probing:
            self._slow_start.take_trip(trip, usual, now)
        if received > self._round_end and now - self._round_began_at >= SPAN:
            self._end_round(sent, now, usual)
        self._recap(usual)
        return trip

    def wants_probe(self, now: float) -> bool:
        """Return whether the round trip is in doubt. If slow answers are the reason, the rate is taken anew."""
        estimate, slow_start = self._rate_estimate, self._slow_start
        if self._probe.active or not estimate.rate:
            return False
        if not slow_start.growing and self._probe.doubts(now):
            slow_start.full_rate = estimate.restart()
            return True
        return now - self._trip_confirmed_at > ROUND_TRIP_MEMORY

    def begin_probe(self, now: float) -> bool:
        """Halve the cap until the queue is empty; false if that is under way, or was a moment ago."""
        if not self._probe.begin(now):
            return False
        self._recap(self._usual_trip)
        return True

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _usual_trip(self) -> float:
        """Seconds that an answer takes without a queue, schedulers included."""
        return max(self.round_trip, LEAST_ROUND_TRIP if self.interactive else BULK_ROUND_TRIP)

    def _end_round(self, sent: int, now: float, usual: float) -> None:
        """Let each part judge the round, and begin the next."""
        estimate, slow_start, trip = self._rate_estimate, self._slow_start, self._round_least_trip
        self._round_end, self._round_began_at, self._round_least_trip = sent, now, 0.0
        slow_start.end_round(trip, usual, estimate.rate, estimate.round_rate > 0, self.cap)
        if estimate.end_round(self._probe.active) and not slow_start.growing:
            slow_start.full_rate = min(slow_start.full_rate, estimate.rate)
        self._probe.end_round(trip, usual)

    def _recap(self, usual: float) -> None:
        """Set the cap, and with it the step and the least room, from the parts; `usual`: `_usual_trip`, seconds."""
        estimate, slow_start = self._rate_estimate, self._slow_start
        rate, growing = estimate.rate, slow_start.growing
        self._recapped_for = slow_start.cap, self.interactive
        product = rate * usual
        extra, startup_gain = EXTRA, CRUISE_GAIN if slow_start.conservative else STARTUP_GAIN
        if usual == LEAST_ROUND_TRIP:
            extra += min(SHARE, int(2 * product))
            startup_gain = min(startup_gain, PROBE_GAIN)  # the one that began first may be growing still
        if self._probe.active:
            cap = max(FLOOR, int(product / 2))
        elif growing:
            cap = max(FIRST, int(startup_gain * product) + extra)
            if not (self.interactive and rate):
                cap = max(cap, slow_start.cap)
        else:
            # Counts that come in bursts let bytes leave in bursts: meanwhile as much more must be under way.
            ack_burst = min(max(estimate.ack_burst, estimate.ack_burst_before), int(product / 4))
            gain = CRUISE_GAIN if estimate.rounds else PROBE_GAIN
            cap = max(FLOOR, int(gain * product) + ack_burst + extra)
        self.cap = cap = min(cap, self._most)
        self.step = min(max(cap // (4 if growing else 16), int(rate * STEP_SECONDS)), cap // 2)
        self.least = min(cap // 16, 64 * KIB)
