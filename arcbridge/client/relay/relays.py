"""The relays of the settings, any of which serves: which is tried first, which next, and when beside a slow one.

The order of one attempt:

1. the one that worked last, so that clients stay where they are, unless another one is to be preferred by now;
2. the others, near ones first (`net.nearest`), equals in random order, so that clients spread;
3. those that failed lately, the one whose failure is oldest first;
4. the one that the caller wants to leave.

The next one is tried when one fails, and beside it when it has not succeeded within `HEAD_START`: a relay that drops
packets must not use up the deadline of the others. The first success counts, later ones are disposed of.
"""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from arcbridge.client.relay.path_lengths import PathLengths
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.errors import ArcbridgeError, ConfigError, StateError, Unauthenticated
from arcbridge.net.address import parse_address
from arcbridge.net.round_trips import RoundTrips
from arcbridge.pki.succession import SuccessionStore
from arcbridge.settings.config import ClientConfig

HEAD_START = 2.0
"""Seconds. Longer than a join over a slow but working link takes; what a silent relay costs an attempt."""
FAILED_LATELY = 60.0
"""Seconds during which a relay that failed is tried after the others."""

T = TypeVar("T")


class RelaysFailed(Exception):
    """Every relay failed: the errors of all, in the order of the attempt. It never leaves this role's own modules."""

    def __init__(self, failures: list[tuple[RelayAccess, ArcbridgeError]]) -> None:
        super().__init__(f"{len(failures)} relays failed")
        self.failures = failures

    def summed_up(self, rank: Callable[[ArcbridgeError], int]) -> ArcbridgeError:
        """Return the failure of the highest rank, the earliest of such, with a word on how many were tried.

        It has a `retry_after` only when every relay gave one: else another relay may work sooner.
        """
        telling = max((error for _, error in self.failures), key=rank)
        if len(self.failures) == 1:
            return telling
        hints = [error.retry_after for _, error in self.failures]
        error = copy.copy(telling)
        error.message = f"{telling.message} ({len(self.failures)} relays were tried)"
        error.args = (error.message,)
        error.retry_after = (
            min((hint for hint in hints if hint is not None), default=None) if None not in hints else None
        )
        error.__cause__ = telling
        return error


class Relays:
    """One user's relays as one session knows them: which failed for it, and which worked last."""

    def __init__(
        self,
        relays: Sequence[RelayAccess],
        *,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
        lengths: PathLengths | None = None,
    ) -> None:
        """`draw` returns floats in [0, 1). `lengths`: how far the relays are; None: all are equally far."""
        # One that is named twice is tried once.
        self.all = list({relay.address: relay for relay in relays}.values())
        if not self.all:
            raise Unauthenticated(
                "you are logged in at no relay, and no setting names one; run `arcbridge login https://RELAY`, or give "
                "--relay https://host:port"
            )
        self._draw = draw
        self.lengths = lengths or PathLengths(self.all, None)
        self._clock = clock
        self._failed: dict[RelayAccess, float] = {}
        self.in_use: RelayAccess | None = None
        """The one that worked last."""

    @classmethod
    def of(
        cls, config: ClientConfig, successions: SuccessionStore | None = None, round_trips: Path | None = None
    ) -> Relays:
        """Return the relays of the settings; `successions`: as in `RelayAccess`, `round_trips`: the file where they are
        kept. Raises Unauthenticated where there are none, ConfigError."""
        access = partial(RelayAccess, ca_file=config.relay_ca_file, ca_pin=config.relay_ca_pin, successions=successions)
        relays = [access(url) for url in config.relay_urls()]
        if len(relays) < 2:
            return cls(relays)
        region = frozenset(parse_address(url) for url in config.region_urls())
        return cls(relays, lengths=PathLengths(relays, RoundTrips(round_trips), region=region))

    def with_own_record(self, cluster: str) -> Relays:
        """Return the same relays as the way to one cluster, with a record of their own of which failed and which
        worked."""
        return Relays(self.all, draw=self._draw, clock=self._clock, lengths=self.lengths.of_cluster(cluster))

    def only(self, relay: RelayAccess) -> Relays:
        """Return one of the relays, for an attempt that no other one is to take the place of."""
        return Relays([relay], clock=self._clock, lengths=self.lengths)

    @property
    def names(self) -> tuple[str, ...]:
        """`host:port` of each, in the order of the settings."""
        return tuple(str(relay.address) for relay in self.all)

    def __len__(self) -> int:
        return len(self.all)

    def failed(self, relay: RelayAccess) -> None:
        """Note that an attempt through this relay failed just now: the relay is tried last for a while."""
        self._failed[relay] = self._clock()
        if self.in_use is relay:
            self.in_use = None

    def works(self, relay: RelayAccess) -> None:
        self._failed.pop(relay, None)
        self.in_use = relay

    def order(self, leaving: RelayAccess | None = None) -> list[RelayAccess]:
        """Return every relay once, in the order to try them now."""
        if len(self.all) == 1:
            return list(self.all)
        since = self._clock() - FAILED_LATELY

        def place(relay: RelayAccess) -> tuple[bool, float]:
            return relay is leaving, max(self._failed.get(relay, since), since)

        nearest = self.lengths.nearest
        good = [relay for relay in self.all if self._failed.get(relay, since) <= since]
        first = nearest.chosen([self.in_use], good, 1, self._draw) if self.in_use is not None else []
        rest = [relay for relay in self.all if relay not in first]
        return sorted(first + nearest.ranked(rest, self._draw), key=place)

    async def first_of(
        self,
        attempt: Callable[[RelayAccess], Coroutine[Any, Any, T]],
        dispose: Callable[[T], None] = lambda result: None,
        *,
        leaving: RelayAccess | None = None,
    ) -> tuple[RelayAccess, T]:
        """Return the first success of `attempt` over the relays, each tried once, and whose it was.

        `dispose` gets the results that come too late; attempts that are not needed any more are cancelled. Raises
        RelaysFailed, or at once what would be the same at every relay (`concerns_all`).
        """
        waiting = self.order(leaving)
        failures: list[tuple[RelayAccess, ArcbridgeError]] = []
        running: dict[asyncio.Task[T], RelayAccess] = {}
        try:
            while waiting or running:
                # A further round begins when a relay has failed, or when the head start of the last one is over.
                if waiting:
                    relay = waiting.pop(0)
                    if not waiting and not running:
                        # No other relay can be tried beside this one, so it needs no task.
                        try:
                            result = await attempt(relay)
                        except ArcbridgeError as error:
                            self._note(relay, error, failures)
                            break
                        self.works(relay)
                        return relay, result
                    running[asyncio.get_running_loop().create_task(attempt(relay))] = relay
                done, _ = await asyncio.wait(
                    running, timeout=HEAD_START if waiting else None, return_when=asyncio.FIRST_COMPLETED
                )
                winner = self._settle(done, running, failures, dispose)
                if winner is not None:
                    for late in running.values():
                        self.failed(late)  # it has not answered though it had a head start
                    return winner
        finally:
            # No await here: a cancellation that hit it would lose the winner. A cancelled attempt closes its socket
            # in the loop's next turns, one that has just succeeded is disposed of by the callback.
            for task in running:
                task.add_done_callback(lambda task: _dispose_of(task, dispose))
                task.cancel()
        raise RelaysFailed(failures)

    def _settle(
        self,
        done: set[asyncio.Task[T]],
        running: dict[asyncio.Task[T], RelayAccess],
        failures: list[tuple[RelayAccess, ArcbridgeError]],
        dispose: Callable[[T], None],
    ) -> tuple[RelayAccess, T] | None:
        """Take the ended attempts out of `running`; the one that won, if any."""
        winner: tuple[RelayAccess, T] | None = None
        fatal: BaseException | None = None
        for task in done:
            relay = running.pop(task)
            error = task.exception()
            if error is None and winner is None:
                winner = relay, task.result()
            elif error is None:
                dispose(task.result())
            else:
                try:
                    self._note(relay, error, failures)
                except BaseException as found:
                    fatal = found
        if winner is not None:
            self.works(winner[0])
            return winner
        if fatal is not None:
            raise fatal
        return None

    def _note(
        self, relay: RelayAccess, error: BaseException, failures: list[tuple[RelayAccess, ArcbridgeError]]
    ) -> None:
        if not isinstance(error, ArcbridgeError) or concerns_all(error):
            raise error
        self.failed(relay)
        failures.append((relay, error))


def concerns_all(error: ArcbridgeError) -> bool:
    """Return whether another relay would say the same: the token is not taken, or this machine's settings are wrong.

    "You may not" is not among them: relays that share no registry know a cluster only once its agent has come to
    them, and answer for an unknown cluster with just these words.
    """
    return isinstance(error, Unauthenticated | ConfigError | StateError)


def _dispose_of(task: asyncio.Task[T], dispose: Callable[[T], None]) -> None:
    if not task.cancelled() and task.exception() is None:
        dispose(task.result())
