"""Writes lines in a thread of its own, behind a bounded queue, so that no caller waits for a stream or a disk.

Subclasses write: `LineSink` the log, the agent's `AuditWriter` sealed records. Lines for which the queue has no room
are dropped and counted. The thread writes the first line at once and then lets lines gather for a moment: woken for
each, it would take the interpreter from the event loop as often as there are requests.

Invariant: lines are handed to `_write` in the order of `put`, each once.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

QUEUE: Final = 4 * 1024 * 1024
"""Characters that wait for a stalled stream or a full disk: minutes of ordinary logging, some ten thousand records."""
GATHER: Final = 0.02
"""Seconds for which lines gather behind those that were written, unless one of them is urgent."""
RETRY: Final = 1.0
"""Seconds between two attempts to write what was refused."""
CLOSE_WAIT: Final = 2.0
"""Seconds that the end of the process waits for a stream or a disk which does not take the last lines."""

Line = TypeVar("Line")


class QueuedWriter(Generic[Line]):
    """The queue and its thread. A subclass has `_write`, and starts the thread when that may be called."""

    def __init__(self, queue: int) -> None:
        """`queue`: characters of lines that wait at most, those included that are being written."""
        self.dropped = 0
        """Lines that were dropped, since the start."""
        self._reported = 0
        """Those of them that need no report any more; the thread's alone to change."""
        self._limit = queue
        self._free = queue
        """Characters that the queue still takes."""
        self._queue: collections.deque[Line] = collections.deque()
        self._idle = False
        """The thread waits for the next line; while lines gather it is not woken for one."""
        self._urgent = False
        """What is queued does not wait for more."""
        self._closing = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        """For those that wait until all is written."""
        self._awaited = False
        """Whether there ever were any: few logs have one before their end."""
        self._bell = threading.Lock()
        """The thread waits for it in one call of C: a condition of Python took half of what a line cost."""
        self._bell.acquire()
        self._thread: threading.Thread | None = None

    def _start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _put(self, line: Line, size: int, *, urgent: bool = False) -> bool:
        """Queue one line; never waits for what it is written to. False where there is no room: the line is counted."""
        with self._lock:  # the condition's own, without its two calls for each line
            if size > self._free or self._closing:
                self.dropped += 1
                return False
            self._free -= size
            self._queue.append(line)
            if urgent:
                self._urgent = True
            if self._idle or urgent or self._free < self._limit // 2:
                self._ring()
        return True

    def _wake(self) -> None:
        """Have the thread write now."""
        with self._lock:
            self._urgent = True
            self._ring()

    def _end(self, timeout: float) -> bool:
        """Have the thread write what is queued and end; return whether it has ended within `timeout` seconds."""
        with self._lock:
            self._closing = True
            self._ring()
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def _ring(self) -> None:
        """Have the thread look; the lock is held, perhaps by what a finalizer or signal handler has interrupted."""
        if self._bell.locked():
            try:
                self._bell.release()
            except RuntimeError:  # the finalizer rang in between
                pass

    def _wait_written(self, timeout: float) -> bool:
        """Wait until all is written, at most `timeout` seconds; return whether it is."""
        with self._changed:
            self._awaited = True
            return self._changed.wait_for(lambda: self._free == self._limit, timeout)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _write(self, lines: list[Line]) -> bool:
        """Write these lines; return whether they need not be kept. Where not, it is called again after `RETRY`."""
        raise NotImplementedError

    def _wanted(self) -> bool:
        """Return whether there is something to write."""
        return bool(self._queue)

    def _patience(self) -> float | None:
        """Return the seconds after which the thread calls `_idled`, though there is nothing to write."""
        return None

    def _idled(self) -> None:
        """Called where nothing was to be written for `_patience`."""

    def _pressed(self) -> bool:
        """Return whether the next lines must not wait for more."""
        return self._closing or self._urgent or self._free < self._limit // 2

    def _run(self) -> None:
        closing = False
        while not closing:
            self._idle = True
            if not (self._wanted() or self._closing):  # else its patience needs no thought
                self._wait(lambda: self._wanted() or self._closing, self._patience())
            with self._lock:
                # Asked anew: a line may have come since the wait ended, and `_idled` would not write it.
                wanted = self._wanted() or self._closing
                self._idle = self._urgent = False
                # Read with the queue, so that what was put before the end is written.
                closing = self._closing
                lines, taken = list(self._queue), self._limit - self._free
                self._queue.clear()
            if not wanted:
                self._idled()
                continue
            written = self._write(lines)
            with self._changed:
                self._free += taken if written else 0
                if self._awaited:
                    self._changed.notify_all()
            if written:
                self._wait(self._pressed, GATHER)
            else:
                self._wait(lambda: self._closing, RETRY)

    def _wait(self, until: Callable[[], bool], seconds: float | None) -> bool:
        """Wait for `until`, at most so long; return whether it holds."""
        ends = None if seconds is None else time.monotonic() + seconds
        while not until():
            left = -1.0 if ends is None else ends - time.monotonic()
            if ends is not None and left <= 0.0:
                return False
            self._bell.acquire(timeout=left)
        return True
