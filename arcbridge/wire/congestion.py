"""How many bytes of a session may be under way: enough to fill the path, too few to fill its queues.

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
   rounds in a row brought nothing, it is `STEADY` times the product, so that the queue is half a round trip at most
   and a path that gets faster is noticed.
4. The round trip is the smallest of the last `MEMORY` seconds. When none of them was as small, or three rounds in a
   row were far above it, our own queue and a longer path look the same; so both ends halve their caps (QUIET) until
   the queues must be empty, and the smallest round trip of that time is believed whatever it is. With it the rate is
   taken anew: a slower path is noticed by its queue.

Nothing is done per frame and there is no timer: a comparison or two for each flush, the estimate with each answer.
"""

from __future__ import annotations

from collections import deque

KIB = 1024

FIRST = 128 * KIB
"""Bytes under way before anything was measured: 50 ms of 20 Mbit/s, and seven doublings below 16 MiB."""

FLOOR = 32 * KIB
"""Least cap, bytes: two frames of the smaller size."""

EXTRA = 8 * KIB
"""Bytes beyond the product, for the frame that is being cut."""

GROWING = 2.0
STEADY = 1.25
"""Times rate times round trip. Less lost throughput where counts come late; more is queue in front of a keystroke."""

PLATEAU = 3
"""Rounds without a rate a quarter higher, until the path counts as full."""

LEAST_ROUND_TRIP = 0.0015
"""Seconds, while a sparse stream sends beside bulk. Below it, schedulers and not the path are what delays an answer: a
smaller cap leaves processes idle that share two cores."""

BULK_ROUND_TRIP = 0.004
"""The same while only bulk is sent: no keystroke waits behind it, and five busy processes on two cores answer after
milliseconds. 1.5 ms cost a fifth of one stream's throughput there, 4 ms three times a keystroke's wait (decision 0008);
over 10 streams 1.5 ms and frames of 16 KiB moved 354 MB/s, 4 ms and large turns 564
(bench/results/2026-11-25-fresh-and-shared.json)."""

SPAN = 0.005
"""Least seconds over which a rate is measured, and the least of a round."""

STEP_SECONDS = 0.001
"""No more than one PING in as many seconds."""

ASKING = 1.5
"""The same, in one of `ROUNDS` rounds: a sender that never probes above its estimate measures its own limit and
shrinks."""

SHORT_FIRST = 256 * KIB
"""The first cap on a path whose handshake took no longer than `LEAST_ROUND_TRIP`: a stream's first credit."""

DELAY_LEAST, DELAY_MOST = 0.004, 0.016
"""Bounds, in seconds, of the delay beyond the usual round trip that shows a queue; between them it is an eighth of
that round trip (RFC 9406 §4.3 has the same figures). Each answer of at least `SPAN` has to show it: a scheduler delays
all that come at once."""

CONSERVATIVE_ROUNDS = 5
"""Rounds of slower growth until the path counts as full (RFC 9406 §4.3)."""

ROUNDS = 6
"""Rounds after which the best rate of the rounds before them begins to be forgotten."""

MEMORY = 10.0
"""Seconds for which a round trip counts."""

PATIENCE = 1.0
"""Least seconds between two halvings that slow answers cause."""


class CongestionWindow:
    """The cap of one connection's one direction. `now` is monotonic seconds and an argument."""

    __slots__ = (
        "_ack_burst",
        "_ack_burst_before",
        "_base",
        "_best",
        "_calm",
        "_conservative_rounds",
        "_delayed_from",
        "_earlier",
        "_full",
        "_got",
        "_grown",
        "_latest",
        "_most",
        "_older",
        "_pings",
        "_probe_from",
        "_probe_trip",
        "_probed_at",
        "_round_at",
        "_round_end",
        "_round_rate",
        "_round_trip",
        "_rounds",
        "_slow",
        "_stale",
        "_trip_at",
        "app_limited_until",
        "cap",
        "conservative",
        "growing",
        "interactive",
        "least",
        "left_at",
        "probing",
        "rate",
        "round_trip",
        "step",
    )

    def __init__(
        self,
        most: int,
        *,
        first: int = FIRST,
        sent: int = 0,
        now: float = 0.0,
        earlier: CongestionWindow | None = None,
    ) -> None:
        """`most`: the cap never exceeds it, bytes. `sent`: the count so far. `earlier`: that of the connection before,
        of which half counts again as soon as the path proves to be no longer (RFC 9040 §8.1)."""
        self._most = most
        self.cap = self.step = self.least = 0
        self.rate = 0.0
        """Bytes per second that the path delivers; 0 while unknown."""
        self.round_trip = 0.0
        """The smallest recent one, seconds; 0 while unknown."""
        self.interactive = False
        """Whether a sparse stream sends beside bulk (the session says so): its bytes wait behind the others'."""
        self.growing = True
        self._grown = min(first, most)
        """The cap that slow start came to, bytes."""
        self._earlier = (earlier.cap // 2, earlier.round_trip) if earlier is not None and earlier.rate else None
        """Half the cap of the connection before, bytes, and its round trip, seconds, until both were compared."""
        self.conservative = False
        """Whether answers show a queue, so that the cap grows more slowly."""
        self._delayed_from = 0.0
        """When the first of the latest answers that all show a queue came, monotonic seconds; 0: none did."""
        self._conservative_rounds = 0
        self.probing = False
        """The cap is halved for the sake of the round trip."""
        self._pings: deque[tuple[int, float, tuple[int, float, float], bool]] = deque()
        """Unanswered: count before it, when it left, `_base` then, whether the sender was app-limited."""
        self._base = (sent, now, now)
        """Of the latest PING whose answer gave a rate: count, when the answer came, when it had left."""
        self._got = sent
        """The peer's latest count."""
        self._ack_burst = self._ack_burst_before = 0
        """The most that one count added to the one before it, in these rounds and in those before."""
        self.app_limited_until = sent
        """Up to this count, the sender had nothing more to send."""
        self.left_at = now
        """When the latest flush left. The session writes it, and `app_limited_until`, at each flush."""
        self._best = self._older = self._latest = self._full = 0.0
        self._rounds = self._stale = self._slow = 0
        self._round_end, self._round_at = sent, now
        self._round_rate = self._round_trip = 0.0
        self._trip_at = self._probed_at = now
        self._probe_from = 0
        self._probe_trip = 0.0
        self._calm = 0
        self._set(min(first, most))

    def resume(self, sent: int, under_way: int, now: float) -> None:
        """The first flush after a pause is about to be counted; `sent` and `under_way` are without it."""
        if under_way < self.step:
            # What was sent long ago has arrived, though nobody has said so yet.
            self._base = (sent, now, now)
            self._got = sent

    def pinged(self, sent: int, now: float) -> None:
        """A PING leaves behind the bytes up to `sent`."""
        self._pings.append((sent, now, self._base, self.app_limited_until > self._base[0]))

    def confirmed(self, received: int, sent: int, now: float) -> float:
        """The peer's count rose to `received`; a new round trip, or 0."""
        pings = self._pings
        ack_burst, was_under_way = received - self._got, sent - self._got
        self._got = received
        if ack_burst > self._ack_burst:
            self._ack_burst = ack_burst
        if self.growing and not self.probing and was_under_way << 1 >= self.cap:
            self._grown = min(self._grown + (ack_burst >> 2 * self.conservative), self._most)
        if not pings or received <= pings[0][0]:
            if self.probing:
                self._look_calm(received, sent)
            elif self.growing:
                self._recap()
            return 0.0
        trip = 0.0
        while pings and received > pings[0][0]:
            at, left_at, (base, base_at, base_left_at), app_limited = pings.popleft()
            trip = max(now - left_at, 1e-6)
            span = max(now - base_at, left_at - base_left_at)
            if span >= SPAN:
                self._take_rate((at - base) / span, app_limited=app_limited)
                self._base = (at, now, left_at)
            if not self._round_trip or trip < self._round_trip:
                self._round_trip = trip
        if not self.round_trip or trip <= self.round_trip:
            self.round_trip, self._trip_at = trip, now
        elif trip <= 1.1 * self.round_trip + 0.0005:
            self._trip_at = now
        if self.probing:
            self._probe(received, sent, trip, now)
        elif self.growing:
            self._take_trip(trip, now)
        if received > self._round_end and now - self._round_at >= SPAN:
            self._end_round(sent, now)
        self._recap()
        return trip

    def begin_probe(self, now: float) -> bool:
        """Halve the cap until the queue is empty; false if that is under way, or was a moment ago."""
        if self.probing or now - self._probed_at < PATIENCE:
            return False
        self.probing = True
        self._probed_at = now
        self._probe_trip = 0.0
        self._probe_from = -1
        self._calm = 0
        self._slow = 0
        self._recap()
        return True

    @property
    def pace(self) -> int:
        """Bytes that the path takes in a millisecond; 0 while unknown."""
        return int(self.rate * STEP_SECONDS)

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _usual_trip(self) -> float:
        """Seconds that an answer takes without a queue, schedulers included."""
        return max(self.round_trip, LEAST_ROUND_TRIP if self.interactive else BULK_ROUND_TRIP)

    def _take_trip(self, trip: float, now: float) -> None:
        """A round trip while the cap grows: is there a queue, and is the path known?"""
        usual = self._usual_trip
        if trip <= usual + min(max(usual / 8, DELAY_LEAST), DELAY_MOST):
            self._delayed_from = 0.0
        elif not self._delayed_from:
            self._delayed_from = now
        self.conservative = 0.0 < self._delayed_from <= now - SPAN
        if trip <= LEAST_ROUND_TRIP:
            self._grown = max(self._grown, min(SHORT_FIRST, self._most))
        if self._earlier is not None and trip <= 1.25 * self._earlier[1] + 0.001:
            self._grown = max(self._grown, min(self._earlier[0], self._most))
            self._earlier = None

    def _take_rate(self, rate: float, *, app_limited: bool) -> None:
        if not app_limited:
            self._round_rate = max(self._round_rate, rate)
        if rate > self._best and not self.probing:
            self._best = rate
            self.rate = max(rate, self._older)

    def _end_round(self, sent: int, now: float) -> None:
        rate, trip = self._round_rate, self._round_trip
        self._round_end, self._round_at = sent, now
        self._round_rate = self._round_trip = 0.0
        usual = self._usual_trip
        self._conservative_rounds = self._conservative_rounds + 1 if self.conservative else 0
        if self.growing and trip > 1.5 * usual + 2 * SPAN:
            self._stale = PLATEAU  # a queue: the path is full
        elif self.growing and self._conservative_rounds >= CONSERVATIVE_ROUNDS:
            self._stale = PLATEAU
        elif self.rate >= 1.25 * self._full:
            self._full = self.rate
            self._stale = 0
            if not self.growing:
                self.growing, self._grown = True, self.cap
        elif rate and self.growing:
            self._stale += 1
        if self.growing and self.rate and self._stale >= PLATEAU:
            self.growing = False
            self._full = self.rate
            self.conservative, self._delayed_from, self._earlier = False, 0.0, None
        if rate and not self.probing:
            self._latest = rate
            self._rounds += 1
            if self._rounds >= ROUNDS:
                self._older, self._best, self._rounds = self._best, rate, 0
                self._ack_burst_before, self._ack_burst = self._ack_burst, 0
                self.rate = max(self._best, self._older)
                self._full = min(self._full, self.rate) if not self.growing else self._full
        self._slow = self._slow + 1 if trip > 2 * usual + 2 * SPAN else 0

    def wants_probe(self, now: float) -> bool:
        """Whether the round trip is in doubt."""
        if self.probing or not self.rate:
            return False
        if self._slow >= PLATEAU and not self.growing and now - self._probed_at >= PATIENCE:
            self._best, self._older, self._rounds = self._latest, 0.0, 0
            self.rate = self._full = self._latest
            return True
        return now - self._trip_at > MEMORY

    def _look_calm(self, received: int, sent: int) -> None:
        if self._probe_from < 0 and sent - received <= self.cap:
            self._probe_from = sent  # a PING that leaves from now on meets no queue of ours

    def _probe(self, received: int, sent: int, trip: float, now: float) -> None:
        if self._probe_from < 0:
            self._look_calm(received, sent)
            return
        beyond = received > self._probe_from
        if (beyond or self._calm) and (not self._probe_trip or trip < self._probe_trip):
            self._probe_trip = trip
        if not beyond:
            return
        if not self._calm:
            self._calm, self._probe_from = 1, sent  # one round more: the other end began later
            return
        self.probing = False
        self.round_trip, self._trip_at = self._probe_trip, now

    def _recap(self) -> None:
        product = self.rate * self._usual_trip
        if self.probing:
            cap = max(FLOOR, int(product / 2))
        elif self.growing:
            cap = max(FIRST, int((STEADY if self.conservative else GROWING) * product) + EXTRA)
            if not (self.interactive and self.rate):
                cap = max(cap, self._grown)
        else:
            # Counts that come in bursts let bytes leave in bursts: meanwhile as much more must be under way.
            ack_burst = min(max(self._ack_burst, self._ack_burst_before), int(product / 4))
            gain = STEADY if self._rounds else ASKING
            cap = max(FLOOR, int(gain * product) + ack_burst + EXTRA)
        self._set(min(cap, self._most))

    def _set(self, cap: int) -> None:
        self.cap = cap
        self.step = min(max(cap // (4 if self.growing else 16), int(self.rate * STEP_SECONDS)), cap // 2)
        """Bytes between two PINGs; at most half the cap, so that whoever is at the cap has one under way."""
        self.least = min(cap // 16, 64 * KIB)
        """Room below which no payload is sent: no frames of a few bytes."""
