"""Writes the lines of the log to a stream that may stall, behind a queue that may not (`queued_writer`).

A terminal that was stopped with Ctrl-S, or a log collector that hangs, blocks `write`. Lines for which the queue has no
room are dropped and counted, and the next line that fits reports how many. A stream without a file descriptor (a test's
buffer) cannot stall and is written to directly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TextIO

from arcbridge.observe.queued_writer import CLOSE_WAIT, QUEUE, QueuedWriter


class LineSink(QueuedWriter[str]):
    """One stream and, where it has a file descriptor, the thread that writes to it.

    `notice` makes the line that reports dropped lines from their number.
    """

    def __init__(self, stream: TextIO, notice: Callable[[int], str], *, queue: int = QUEUE) -> None:
        super().__init__(queue)
        self.stream = stream
        self._notice = notice
        self._paused = False
        self._descriptor = _descriptor(stream)
        if self._descriptor is not None:
            self._start("arcbridge-log")

    def write(self, line: str) -> None:
        """Queue one line (without its newline); never waits for the stream."""
        if self._thread is None:
            self._emit(line + "\n")
        else:
            self._put(line, len(line) + 1)

    def pause(self, paused: bool) -> None:
        """Keep lines queued from now on, or write them again; a stream without a descriptor never waits."""
        self._paused = paused
        self._wake()

    def flush(self, timeout: float = CLOSE_WAIT) -> bool:
        """Wait until all lines are written, at most `timeout` seconds; return whether they are."""
        self._wake()
        return self._wait_written(timeout)

    def close(self, timeout: float = CLOSE_WAIT) -> bool:
        """Write what is queued, at most `timeout` seconds, and end the thread. Return whether all was written."""
        done = self.flush(timeout)
        self._end(timeout if done else 0.0)
        return done

    def _wanted(self) -> bool:
        return bool(self._queue) and not self._paused

    def _write(self, lines: list[str]) -> bool:
        unreported = self.dropped - self._reported
        self._reported += unreported
        if unreported:
            lines.append(self._notice(unreported))
        if lines:
            self._emit("\n".join([*lines, ""]))
        return True

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
            # Disk full, pipe closed, stream closed: the counter alone can tell. The role goes on.
            with self._changed:
                self.dropped += (lost := text.count("\n"))
                self._reported += lost


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
