"""Charges the event loop's time to those whose bytes it works on, and finds who takes more than a share of it.

Work is measured where callbacks and steps of tasks begin and end. Nothing here slows or refuses a payer: a `LoopTime`
that is over its share calls back. The decisions read no clock but the thread's CPU time; each call is given the time in
monotonic seconds. Invariant: a payer owes nothing unless its own CPU time made the loop late and another payer used it
in the last second: an only user may take all of it, short turns cost a payer nothing, nor does what others do. Why:
docs/decisions/0030-loop-time.md.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Generator, Hashable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar, cast

from arcbridge.limiters import TokenBucket

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)

BURST: Final = 2.0
"""Seconds of its share that a payer may take at once."""
RECENT: Final = 1.0
"""Seconds for which a payer counts as late, and another one as one that waits; means are those of so long."""
LATE: Final = 0.02
"""CPU seconds of a payer in a callback, or in a turn of the loop, that keep others waiting. Bulk has turns of 3 ms."""
STOPPED: Final = 0.1
"""Part of a late callback that its thread has to run for: else the machine or the process stood still, and that is
no payer's doing. On a machine that is busy with others wall time counts: there is less of the loop to share."""
LOOK: Final = 0.001
"""Seconds until one looks at what a payer took: one turn of the loop, or less."""
QUANTUM: Final = 0.005
"""Seconds of the loop that are added up before they are judged, so that a short callback costs two additions."""
HEAVY: Final = 0.1
"""Part of the loop, in a second's mean, above which a payer has to share its share with the others that take as much:
two users, or two names of one, do not get two halves. Who takes less CPU time is not refused."""
MAX_WAIT: Final = 5.0
"""Seconds that a payer is slowed down for at most; as much is owed at most: far below the 25 s after which the other
end of a connection takes it for dead."""
REFUSED_AFTER: Final = 5.0
"""Seconds for which a payer was slowed down again and again, after which its new work is refused as well, where single
callbacks of it are late and it took its full share all the time."""
ROUNDING: Final = 1e-6
"""Seconds that are more than the error of floating point in what was charged."""
ALIKE: Final = 0.0001
"""Seconds that a callback counts at most for those like it that were not measured: it may have been interrupted."""


class LoopShares:
    """The time of one event loop, as all payers share it."""

    __slots__ = ("_cpu_at", "_cpu_mark", "_heavy", "_light", "_light_at", "cpu", "inner", "look_later", "over", "total")

    def __init__(
        self,
        *,
        cpu: Callable[[], float] = time.thread_time,
        look_later: Callable[[Callable[[float], None]], object] | None = None,
    ) -> None:
        """`cpu`: the CPU seconds of the loop's thread. `look_later(look)` calls `look(then)` in a later turn, with the
        time then."""
        self.total = 0.0
        """Seconds that were charged to all payers. To measure, a callback remembers it at its beginning."""
        self.inner = 0.0
        """Seconds of these that were for what another payer began: no sign that another one waits."""
        self.over = 0.0
        """Seconds that payers took beyond their shares while others waited."""
        self.cpu = cpu
        self._cpu_mark, self._cpu_at = cpu(), float("-inf")
        self.look_later = look_later or _look_later
        self._heavy: dict[LoopTime, float] = {}
        """Until when payers count as heavy, monotonic seconds."""
        self._light, self._light_at = 0.0, float("-inf")
        """Seconds that the others had spent when they were found to spend last, and when that was."""

    def take_cpu(self, now: float, since: float) -> float:
        """Return the CPU seconds of the loop's thread since the last call; infinite where that was after `since`, in a
        measurement within the one that is judged."""
        before, self._cpu_mark = self._cpu_mark, self.cpu()
        taken_at, self._cpu_at = self._cpu_at, now
        return self._cpu_mark - before if taken_at <= since else math.inf

    def weigh_heavy(self, payer: LoopTime, share: float, now: float, until: float) -> float:
        """Count `payer` among those that take much until then; return how many times its seconds count.

        They have one share together, or the whole loop where no other payer wants it: the loop is not to stand still.
        """
        self._heavy = {one: ends for one, ends in self._heavy.items() if ends > now}
        self._heavy[payer] = until
        light = self.total - self.inner - sum(one.spent - one.inner for one in self._heavy)
        if light - self._light > ROUNDING:
            self._light_at = now
        self._light = light
        count = len(self._heavy)
        return count if now - self._light_at <= RECENT else max(count * share, 1.0)


@dataclass(slots=True, eq=False, repr=False)
class LoopTime:
    """The loop's time that one payer takes: a user, an address.

    `on_over(seconds)` is called when it is over its share while others wait: nothing of it is to be worked on for so
    long. It may be called again before they have passed.
    """

    shares: LoopShares
    on_over: Callable[[float], None]
    spent: float = 0.0
    """Seconds of the loop since the payer is known."""
    inner: float = 0.0
    """Seconds of these for what another payer began."""
    held_until: float = 0.0
    """Until when nothing is to be worked on, monotonic seconds."""
    refused_until: float = 0.0
    """Until when new work is refused, monotonic seconds."""
    _bucket: TokenBucket | None = None
    """Seconds of the loop that it may take; None: any number."""
    _mean: float = 0.0
    _cpu: float = 0.0
    """Seconds of the loop, and of its thread's CPU, in the last second: older ones fade."""
    _late_until: float = 0.0
    """Until when it counts as one that made the loop late, monotonic seconds."""
    _looking: bool = False
    _settled: float = 0.0
    """What was spent when the bucket was charged last."""
    _settled_at: float = float("-inf")
    """When that was, monotonic seconds."""
    _settle_at: float = QUANTUM
    """At what it is charged next."""
    _over_since: float = 0.0
    """Since when it is slowed down again and again, monotonic seconds."""
    _over_spent: float = 0.0
    """What was spent before that."""
    _others: float = field(init=False)
    """Seconds that others had spent when they were found to spend last."""
    _others_at: float = float("-inf")

    def __post_init__(self) -> None:
        self._others = self.shares.total - self.shares.inner

    def set_share(self, now: float, share: float) -> None:
        """Let the payer take `share` of the loop (0 to 1) while others wait, from now on; 0: as much as it wants."""
        if not share:
            self._bucket, self.held_until, self.refused_until = None, 0.0, 0.0
        elif self._bucket is None:
            self._bucket = TokenBucket(share * BURST, share)
        else:
            self._bucket.change(now, share * BURST, share)

    def charge(self, now: float, began: float, before: float) -> None:
        """Charge the time since `began`, when `shares.total` was `before`, without what was charged meanwhile."""
        shares = self.shares
        seconds = now - began - (shares.total - before)
        shares.total += seconds
        self.spent = spent = self.spent + seconds
        if spent >= self._settle_at:
            self._settle(now, seconds)

    def run(self, work: Callable[[], T]) -> T:
        """Call `work` and charge it, however it ends."""
        began, before = time.monotonic(), self.shares.total
        try:
            return work()
        finally:
            self.charge(time.monotonic(), began, before)

    def run_sample(self, work: Callable[[], None], alike: int) -> None:
        """Call `work`, the one that is measured of `alike` callbacks, and charge all of them."""
        began, before = time.monotonic(), self.shares.total
        work()
        now = time.monotonic()
        self.charge(now, began, before)
        others = min(now - began, ALIKE) * (alike - 1)
        self.shares.total += others
        self.spent += others

    def steps(self, coroutine: Coroutine[Any, Any, T], *, inner: bool = False) -> Coroutine[Any, Any, T]:
        """Return a coroutine of which each step is charged. `inner`: another payer began it, as an address does the
        join of its user, and does not count this one as one that waits."""
        return _ChargedSteps(self, coroutine, inner)

    def _settle(self, now: float, last: float) -> None:
        """Judge what was spent since the last time; `last` seconds of it by the callback that has just ended."""
        shares = self.shares
        cpu = shares.take_cpu(now, now - last)
        amount = self.spent - self._settled
        is_late = min(last, cpu) > LATE
        if is_late:
            self._late_until = now + RECENT
        if last > LATE and cpu < last * STOPPED:
            amount -= last - cpu
        fade = math.exp((self._settled_at - now) / RECENT)
        self._mean = self._mean * fade + amount
        self._cpu = self._cpu * fade + min(amount, cpu)
        bucket = self._bucket
        weight = 1.0
        if self._mean > HEAVY * RECENT:
            until = now + RECENT * math.log(self._mean / (HEAVY * RECENT))
            weight = shares.weigh_heavy(self, bucket.rate if bucket else 1.0, now, until)
        self._settled, self._settled_at, self._settle_at = self.spent, now, self.spent + QUANTUM
        others = shares.total - shares.inner - (self.spent - self.inner)
        if others - self._others > ROUNDING:
            self._others, self._others_at = others, now
        if bucket is None or bucket.take(now, amount * weight):
            return
        if now - self._others_at > RECENT or not self._is_late(now):
            bucket.give(bucket.wait(now, 0.0) * bucket.rate)
            return
        shares.over += amount
        wait = bucket.wait(now, 0.0)
        if wait > MAX_WAIT:
            bucket.give((wait - MAX_WAIT) * bucket.rate)
            wait = MAX_WAIT
        # The full share, and not the part of it that it has while others are heavy, too.
        took_share = self.spent - self._over_spent > bucket.rate * (now - self._over_since)
        if now > self.held_until + RECENT or not took_share:
            self._over_since, self._over_spent = now, self.spent - amount
        self.held_until = now + wait
        if is_late and now - self._over_since >= REFUSED_AFTER and self._cpu > HEAVY * RECENT:
            self.refused_until = self.held_until + RECENT
        self.on_over(wait)

    def _is_late(self, now: float) -> bool:
        """Return whether it made the loop late in the last second; else find out whether it does by many callbacks."""
        if now < self._late_until:
            return True
        if not self._looking:
            self._looking = True
            spent, cpu = self.spent, self.shares.cpu()

            def look(then: float) -> None:
                self._looking = False
                if min(self.spent - spent, self.shares.cpu() - cpu) > LATE:
                    self._late_until = then + RECENT

            self.shares.look_later(look)
        return False


class LoopTimes(Generic[Key]):
    """The loop's time of many payers, by key; beyond `size` the one that was asked for longest ago is forgotten."""

    __slots__ = ("_payers", "_share", "_size", "shares")

    def __init__(self, share: float, *, size: int, shares: LoopShares | None = None) -> None:
        """`shares`: those of payers with other keys in the same loop."""
        self.shares = shares or LoopShares()
        self._share = share
        self._size = size
        self._payers: OrderedDict[Key, LoopTime] = OrderedDict()

    def of(self, key: Key, now: float) -> LoopTime:
        """Return the payer of a key. The part that gives it work asks for its `held_until`, or sets `on_over`."""
        payer = self._payers.get(key)
        if payer is None:
            payer = self._payers[key] = LoopTime(self.shares, no_call)
            payer.set_share(now, self._share)
            if len(self._payers) > self._size:
                self._payers.popitem(last=False)
        else:
            self._payers.move_to_end(key)
        return payer

    def change(self, share: float, now: float) -> None:
        """Let each payer take `share` of the loop from now on."""
        self._share = share
        for payer in self._payers.values():
            payer.set_share(now, share)


class _ChargedSteps(Coroutine[Any, Any, T]):
    """A coroutine that charges each of its steps; a task runs it, and another coroutine awaits it, as any other."""

    __slots__ = ("_coroutine", "_inner", "_payer")

    def __init__(self, payer: LoopTime, coroutine: Coroutine[Any, Any, T], inner: bool) -> None:
        self._payer = payer
        self._coroutine = coroutine
        self._inner = inner

    def send(self, value: Any) -> Any:
        return self._step(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._coroutine.throw, *error)

    def __next__(self) -> Any:
        return self._step(self._coroutine.send, None)  # what a task and `await` call

    def _step(self, resume: Callable[..., Any], *values: Any) -> Any:
        payer = self._payer
        shares, spent = payer.shares, payer.spent
        before, began = shares.total, time.monotonic()
        try:
            return resume(*values)
        finally:
            payer.charge(time.monotonic(), began, before)
            if self._inner:
                payer.inner += payer.spent - spent
                shares.inner += payer.spent - spent

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        # An iterator with `send` and `throw` is all that `await` asks for.
        return cast("Generator[Any, Any, T]", self)


def no_call(seconds: float) -> None:
    """Do nothing when a payer is over its share: those that give it work ask."""


def _look_later(look: Callable[[float], None]) -> None:
    asyncio.get_running_loop().call_later(LOOK, lambda: look(time.monotonic()))


__all__ = ["LoopShares", "LoopTime", "LoopTimes", "no_call"]
