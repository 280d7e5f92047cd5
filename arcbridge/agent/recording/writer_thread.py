"""Runs the work of all recordings in one thread, in order, but for what a session's beginning waits for.

It knows no files. The thread holds up no end of the process: a directory that hangs (NFS) would keep an executor's
thread, which the interpreter joins, until the process is killed. Invariant: what was submitted is run once, unless the
process ends before.
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
        self._jobs: deque[_Job | None] = deque()
        """None: the end."""
        self._ready = threading.Semaphore(0)
        """Counts the jobs of both."""
        threading.Thread(target=self._run, name="recordings", daemon=True).start()

    def submit(self, work: Callable[..., Any], *arguments: Any, urgent: bool = False) -> asyncio.Future[Any]:
        """Run `work` in the thread, before all that is not `urgent`."""
        loop = asyncio.get_running_loop()
        job = _Job(loop, loop.create_future(), work, arguments)
        (self._urgent if urgent else self._jobs).append(job)
        self._ready.release()
        return job.done

    def close(self) -> None:
        """End the thread behind what it has to do; waits for nothing."""
        self._jobs.append(None)
        self._ready.release()

    def _run(self) -> None:
        while True:
            self._ready.acquire()
            job = self._urgent.popleft() if self._urgent else self._jobs.popleft()
            if job is None:
                return
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
