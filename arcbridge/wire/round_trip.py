"""Decides when the smallest round trip is in doubt, and measures it anew.

A queue of one's own and a path that became longer look the same to a sender: both delay each answer. `RoundTripProbe`
says when that doubt arises and when, with both ends at half their caps, an answer met no queue. It sends nothing and
sets no cap. What it returns was measured behind a PING that left with the queue empty.
"""

from __future__ import annotations

from arcbridge.wire.rate_estimate import SPAN

LEAST_ROUND_TRIP = 0.001
"""Seconds, while a sparse stream sends beside bulk. Below it, schedulers and not the path are what delays an answer: a
smaller cap leaves processes idle that share two cores. With 1.5 ms a keystroke took 4.8 ms beside bulk both ways, with
1 ms 3.5, and bulk moved no less (`least-round-trip` in bench/results/2026-11-25-studies.json)."""

BULK_ROUND_TRIP = 0.004
"""The same while only bulk is sent: no keystroke waits behind it, and five busy processes on two cores answer after
milliseconds. 1.5 ms cost a fifth of one stream's throughput there, 4 ms three times a keystroke's wait (decision 0008);
over 10 streams 1.5 ms and frames of 16 KiB moved 354 MB/s, 4 ms and large turns 564
(`fresh-and-shared` in bench/results/2026-11-25-studies.json)."""

SLOW_ROUNDS = 3
"""Rounds in a row with answers far above the usual round trip, until that is in doubt."""

PROBE_INTERVAL = 1.0
"""Least seconds between two probes."""


class RoundTripProbe:
    """The probes of one direction, one after the other."""

    def __init__(self, now: float) -> None:
        self.active = False
        """Whether a probe runs, for which the cap is halved."""
        self._began_at = now
        """When the latest probe began, monotonic seconds; at first, when the connection did."""
        self._drained_at = -1
        """Bytes that were sent when the queue was empty, or a round after that; -1: it is not empty yet."""
        self._confirmed_once = False
        """Whether a PING that met no queue of ours was answered. The other end may have begun later: its queue is empty
        a round later."""
        self._least = 0.0
        """The smallest round trip since the queue was empty, seconds; 0: none."""
        self._slow_rounds = 0
        """Rounds in a row whose smallest round trip was far above the usual one."""

    def begin(self, now: float) -> bool:
        """Begin a probe; false if one runs, or began less than `PROBE_INTERVAL` ago."""
        if self.active or now - self._began_at < PROBE_INTERVAL:
            return False
        self.active, self._began_at = True, now
        self._drained_at, self._confirmed_once, self._least = -1, False, 0.0
        self._slow_rounds = 0
        return True

    def end_round(self, trip: float, usual: float) -> None:
        """Take the smallest round trip of a round, seconds, where `usual` is one without a queue."""
        self._slow_rounds = self._slow_rounds + 1 if trip > 2 * usual + 2 * SPAN else 0

    def doubts(self, now: float) -> bool:
        """Return whether rounds were slow for so long that the round trip is in doubt, and a probe may begin."""
        return self._slow_rounds >= SLOW_ROUNDS and not self.active and now - self._began_at >= PROBE_INTERVAL

    def take_count(self, received: int, sent: int, cap: int) -> None:
        """Take a count of the peer during a probe: `received` of `sent` bytes, where `cap` bytes may be under way."""
        if self._drained_at < 0 and sent - received <= cap:
            self._drained_at = sent  # a PING that leaves from now on meets no queue of ours

    def take_trip(self, trip: float, received: int, sent: int, cap: int) -> float:
        """Take a count that answers a PING after `trip` seconds; the new round trip, which ends the probe, or 0."""
        if self._drained_at < 0:
            self.take_count(received, sent, cap)
            return 0.0
        confirmed = received > self._drained_at
        if (confirmed or self._confirmed_once) and (not self._least or trip < self._least):
            self._least = trip
        if not confirmed:
            return 0.0
        if not self._confirmed_once:
            self._confirmed_once, self._drained_at = True, sent
            return 0.0
        self.active = False
        return self._least
