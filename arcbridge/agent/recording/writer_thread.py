"""Runs the work of all recordings in one thread, first what a session's beginning waits for, then one of each user.

It knows no files. The thread holds up no end of the process: a directory that hangs (NFS) would keep an executor's
thread, which the interpreter joins, until the process is killed. Invariants: what was submitted is run once, unless the
process ends before; the work of one user is run in order, and before each piece come beginnings of sessions and one
piece of each other user at most.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple


class _Job(NamedTuple):
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


class WriterThread:
    """The thread of one recorder; it runs from the beginning to `close`."""

    def __init__(self) -> None:
        self.waiting = 0
        """Bytes of all sessions that are not written yet; the sessions count them, in the event loop."""
        self.progress = time.monotonic()
        """When the thread last finished something, in monotonic seconds."""
        self._urgent: deque[_Job] = deque()
        self._jobs: dict[str, deque[_Job]] = {}
        """By user, in the order of their turns; a user without a job is not in it."""
        self._lock = threading.Lock()
        """Held while either changes."""
        self._ready = threading.Semaphore(0)
        """Counts the jobs of both, and the end."""
        threading.Thread(target=self._run, name="recordings", daemon=True).start()

    def submit(
        self, work: Callable[..., Any], *arguments: Any, user: str = "", urgent: bool = False
    ) -> asyncio.Future[Any]:
        """Run `work` in the thread when it is the turn of `user` (empty: the agent itself), or before all that is not
        `urgent`."""
        loop = asyncio.get_running_loop()
        job = _Job(loop, loop.create_future(), work, arguments)
        with self._lock:
            (self._urgent if urgent else self._jobs.setdefault(user, deque())).append(job)
        self._ready.release()
        return job.done

    def close(self) -> None:
        """End the thread behind what it has to do; waits for nothing."""
        self._ready.release()

    def _next(self) -> _Job | None:
        """Return what is to be run; None where nothing is left at the end."""
        self._ready.acquire()
        with self._lock:
            if self._urgent:
                return self._urgent.popleft()
            user = next(iter(self._jobs), None)
            if user is None:
                return None
            jobs = self._jobs.pop(user)
            job = jobs.popleft()
            if jobs:
                self._jobs[user] = jobs  # behind all others
            return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
            result, error = None, None
            try:
                result = job.work(*job.arguments)
            except BaseException as raised:
                error = raised
            self.progress = time.monotonic()
            try:
                job.loop.call_soon_threadsafe(_settle, job.done, result, error)
            except RuntimeError:  # the loop is closed, and what waited with it
                return
            del job, result, error


def _settle(done: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
