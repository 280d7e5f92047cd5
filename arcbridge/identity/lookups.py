"""Bounded look-ups of names at one other server, for all callers together.

Of one key there is one look-up at a time, and its result is remembered for a while, a failure for a shorter one.
Look-ups at once, those that wait, the time of one, remembered keys and the memory of what is remembered are bounded,
for each server by itself: one that stalls fills its own bounds alone. It knows nothing of what is looked up, or where.
Invariant: what was found for one key is never given for another one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from functools import partial

from arcbridge.identity.refusal import GroupsUnavailable, TokenRefused

AT_ONCE = 8
"""Requests to the other server at a time."""
WAITING = 64
"""Further keys that may wait for their turn; beyond them a caller has to come back."""
DEADLINE = 6.0
"""Seconds for one look-up, the wait for its turn included: an AUTH has ten."""
KEEP_FAILURE = 5.0
"""Seconds for which a failure is remembered: a client that comes back at once costs the other server nothing. A failure
for which that server was not asked is not remembered."""
ENTRIES = 4096
MEMORY = 24 << 20
"""Bytes of the names of all entries together: 200,000 ids of Entra ID's groups, or fewer names that are longer."""
_NAME = 80
"""Bytes that a name takes besides its characters, of which each takes up to four."""

Look = Callable[[], Awaitable[tuple[str, ...]]]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What came of a look-up: names, or why there are none. `until`: monotonic seconds."""

    until: float
    names: tuple[str, ...] = ()
    failure: Callable[[], TokenRefused | GroupsUnavailable] | None = None
    """Makes the error. One that was raised holds the frames that it passed, with tokens in them, and is not kept."""

    @property
    def size(self) -> int:
        """Bytes of its names, about."""
        return sum(_NAME + (len(name) if name.isascii() else 4 * len(name)) for name in self.names)

    def result(self) -> tuple[str, ...]:
        if self.failure is not None:
            raise self.failure()
        return self.names


class Lookups:
    """See the module's docstring. `keep`: seconds for which names are remembered; `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float], keep: float, *, deadline: float = DEADLINE) -> None:
        self._clock = clock
        self._keep = keep
        self._deadline = deadline
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._running: dict[Hashable, asyncio.Task[_Entry]] = {}
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._size = 0
        self.asked = 0
        """Look-ups that were begun."""
        self.failed = 0
        """Those of them that found nothing."""

    def forget(self) -> None:
        """Forget what is remembered; what is being looked up goes on."""
        self._entries.clear()
        self._size = 0

    async def get(self, key: Hashable, look: Look, where: str) -> tuple[str, ...]:
        """Return the names for `key`, remembered or by `look`. `where` is asked, for messages.

        Raises GroupsUnavailable, also where `look` takes too long, and TokenRefused as `look` does. A cancelled call
        leaves the look-up running for others.
        """
        entry = self._entries.get(key)
        if entry is not None and self._clock() < entry.until:
            self._entries.move_to_end(key)
            return entry.result()
        task = self._running.get(key)
        if task is None:
            if len(self._running) >= AT_ONCE + WAITING:
                raise GroupsUnavailable(f"too many look-ups at {where} are under way")
            task = asyncio.get_running_loop().create_task(self._look(key, look, where), name="groups-lookup")
            self._running[key] = task
        return (await asyncio.shield(task)).result()

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _look(self, key: Hashable, look: Look, where: str) -> _Entry:
        self.asked += 1
        try:
            async with asyncio.timeout(self._deadline), self._turns:
                names = await look()
            entry = _Entry(self._clock() + self._keep, names)
        except TimeoutError:
            entry = self._failure(f"{where} did not answer within {self._deadline:.0f} s")
        except GroupsUnavailable as error:
            entry = self._failure(error.why, error.detail)
            if not error.asked:
                return entry  # it saves no request, and would outlast the cause
        except TokenRefused as error:
            entry = _Entry(self._clock() + KEEP_FAILURE, failure=partial(TokenRefused, error.rule, error.message))
        finally:
            self._running.pop(key, None)
        self._remember(key, entry)
        return entry

    def _failure(self, why: str, detail: str = "") -> _Entry:
        self.failed += 1
        return _Entry(self._clock() + KEEP_FAILURE, failure=partial(GroupsUnavailable, why, detail=detail))

    def _remember(self, key: Hashable, entry: _Entry) -> None:
        former = self._entries.pop(key, None)
        self._size += entry.size - (0 if former is None else former.size)
        self._entries[key] = entry
        while len(self._entries) > ENTRIES or self._size > MEMORY:
            _, oldest = self._entries.popitem(last=False)
            self._size -= oldest.size
