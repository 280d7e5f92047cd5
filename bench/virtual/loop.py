"""An event loop without sockets, threads or a clock: where nothing is ready, its time jumps to the next timer."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import Context
from typing import TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class VirtualLoop(asyncio.BaseEventLoop):
    """asyncio's own loop, but for how it waits. What an executor is given runs at once, in the loop's thread.

    Timers of one instant fire in the order in which they were set.
    """

    _ready: deque[asyncio.Handle]

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        """Virtual seconds."""
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_at(
        self, when: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_later(
        self, delay: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        while timers and (timers[0][0] <= self.now or not ready):
            when, _, timer = heapq.heappop(timers)
            if not timer.cancelled():
                self.now = max(self.now, when)
                ready.append(timer)
        if not ready:
            raise RuntimeError("the virtual loop has nothing left to do, and waits for something")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: it is passed over when its time has come."""

    def _write_to_self(self) -> None:
        """Do nothing: no thread wakes this loop."""


def now() -> float:
    """Return the virtual time, seconds."""
    return asyncio.get_running_loop().time()
