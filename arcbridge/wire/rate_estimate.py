"""The rate at which a path delivers, and how many bytes one count of the peer adds.

`RateEstimate` is fed with samples and with the ends of rounds; it chooses no cap and reads no clock. Both estimates are
maxima over the last `ROUNDS` to twice as many rounds: a round without a sample changes nothing, and a path that became
slower is believed after at most two such periods.
"""

from __future__ import annotations

SPAN = 0.005
"""Least seconds over which a rate is measured, and the least of a round."""

ROUNDS = 6
"""Rounds after which the best rate of the rounds before them begins to be forgotten."""


class RateEstimate:
    """The delivery rate of one direction of a connection."""

    def __init__(self) -> None:
        self.rate = 0.0
        """Bytes per second that the path delivers, the best of this period and the one before; 0 while unknown."""
        self.round_rate = 0.0
        """The best sample of the current round that was not app-limited, bytes per second; 0: there was none."""
        self.rounds = 0
        """Rounds of the current period that gave a rate."""
        self.ack_burst = 0
        """The most that one count of the current period added to the one before it, bytes. The window raises it with
        each count."""
        self.ack_burst_before = 0
        """The same of the period before, bytes."""
        self._best = 0.0
        """The best sample of the current period, bytes per second."""
        self._best_before = 0.0
        """The best sample of the period before, bytes per second."""
        self._latest = 0.0
        """The rate of the latest round that gave one, bytes per second."""

    def take(self, rate: float, app_limited: bool, probing: bool) -> None:
        """Take a sample of `rate` bytes per second.

        An app-limited one says only that the path carries at least so much; one of a halved cap (`probing`) says
        nothing of the best.
        """
        if not app_limited and rate > self.round_rate:
            self.round_rate = rate
        if rate > self._best and not probing:
            self._best = rate
            self.rate = max(rate, self._best_before)

    def end_round(self, probing: bool) -> bool:
        """End a round; true when a period ended with it, so that `rate` may have fallen."""
        rate, self.round_rate = self.round_rate, 0.0
        if not rate or probing:
            return False
        self._latest = rate
        self.rounds += 1
        if self.rounds < ROUNDS:
            return False
        self._best_before, self._best, self.rounds = self._best, rate, 0
        self.ack_burst_before, self.ack_burst = self.ack_burst, 0
        self.rate = max(self._best, self._best_before)
        return True

    def restart(self) -> float:
        """Forget all but the latest round, whose rate counts from now on; that rate, bytes per second."""
        self.rate = self._best = self._latest
        self._best_before, self.rounds = 0.0, 0
        return self.rate
