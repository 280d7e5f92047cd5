"""Where log lines go: a stream that may stall, behind a queue that may not.

A terminal that was stopped with Ctrl-S, or a log collector that hangs, blocks `write`. The event loop must not
wait for it, so lines go through a bounded queue to one thread. When the queue is full lines are dropped
and counted, and the next line that fits says how many. A stream without a file descriptor (a test's buffer)
cannot stall and is written to directly.

The thread writes the first line at once and then lets lines gather for a moment: woken for each, it would take the
interpreter from the event loop as often as there are requests.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable
from typing import Final, TextIO

QUEUE_BYTES: Final = 4 * 1024 * 1024
"""Characters waiting for a stalled stream: minutes of ordinary logging, and nothing next to a session's buffers."""

CLOSE_WAIT: Final = 2.0
"""Seconds that the end of the process waits for a stream which does not take its lines."""

GATHER: Final = 0.02
"""Seconds for which lines gather behind those that were written; `flush` and `close` do not wait for it to pass."""


class LineSink:
    """One stream and, where it has a file descriptor, the thread that writes to it.

    `notice` makes the line that reports dropped lines from their number.
    """

    def __init__(self, stream: TextIO, notice: Callable[[int], str], *, queue_bytes: int = QUEUE_BYTES) -> None:
        self.stream = stream
        self.dropped = 0
        """Lines dropped since the start; read by the metrics."""
        self._notice = notice
        self._free = queue_bytes
        """Characters that the queue still takes."""
        self._gather_above = queue_bytes // 2
        """Lines gather while more characters than this are free."""
        self._lines: collections.deque[str] = collections.deque()
        self._unreported = 0
        self._busy = False
        self._idle = False
        """The thread waits for the next line; while lines gather it is not woken for one."""
        self._flushing = 0
        """Calls of `flush` that wait for the queue to be written."""
        self._closing = False
        self._paused = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._descriptor = _descriptor(stream)
        if self._descriptor is not None:
            self._thread = threading.Thread(target=self._run, name="arcbridge-log", daemon=True)
            self._thread.start()

    def write(self, line: str) -> None:
        """Queue one line (without its newline); never waits for the stream."""
        if self._thread is None:
            self._emit(line + "\n")
            return
        with self._changed:
            if len(line) + 1 > self._free or self._closing:
                self.dropped += 1
                self._unreported += 1
                return
            self._free -= len(line) + 1
            self._lines.append(line)
            if self._idle or self._free < self._gather_above:
                self._changed.notify_all()

    def pause(self, paused: bool) -> None:
        """Keep lines queued from now on, or write them again; a stream without a descriptor never waits."""
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    def flush(self, timeout: float = CLOSE_WAIT) -> bool:
        """Wait until all lines are written, at most `timeout` seconds; say whether they are."""
        if self._thread is None:
            return True
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._lines and not self._busy, timeout)
            finally:
                self._flushing -= 1

    def close(self, timeout: float = CLOSE_WAIT) -> bool:
        """Write what is queued, at most `timeout` seconds, and end the thread. Say whether everything was written."""
        done = self.flush(timeout)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if done and self._thread is not None:
            self._thread.join(timeout)
        return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle = True
                self._changed.wait_for(lambda: (self._lines and not self._paused) or self._closing)
                self._idle = False
                if not self._lines:
                    return
                batch = list(self._lines)
                self._lines.clear()
                unreported, self._unreported = self._unreported, 0
                self._busy = True
            if unreported:
                batch.append(self._notice(unreported))
            self._emit("\n".join(batch) + "\n")
            with self._changed:
                self._free += sum(len(line) + 1 for line in batch) - (len(batch[-1]) + 1 if unreported else 0)
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(self._pressed, GATHER)

    def _pressed(self) -> bool:
        """Return whether the next lines must not wait for more."""
        return self._closing or self._flushing > 0 or self._free < self._gather_above

    def _emit(self, text: str) -> None:
        try:
            if self._descriptor is None:
                self.stream.write(text)
                self.stream.flush()
            else:
                # Not through the stream's own buffer: what a full disk refused would come back with every later write.
                data = memoryview(text.encode("utf-8", "replace"))
                while data:
                    data = data[os.write(self._descriptor, data) :]
        except (OSError, ValueError):
            # Disk full, pipe closed, stream closed: there is nowhere to say so but the counter. The role goes on.
            self.dropped += text.count("\n")


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
