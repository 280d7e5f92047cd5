"""The queue of lines: what is written at once, what gathers, and what wakes the thread; through the log's sink.

Order, bounds and refused writes are tested at `LineSink` and at the agent's `AuditWriter`.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable

import pytest

from arcbridge.observe import queued_writer
from arcbridge.observe.line_sink import LineSink
from arcbridge.observe.queued_writer import QueuedWriter


class Descriptor(io.StringIO):
    """A stream with a pipe's descriptor, so that the writes that reach it can be counted."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor


def test_the_first_line_is_written_at_once_and_those_behind_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued_writer, "GATHER", 3600.0)
    reading, writing = os.pipe()
    sink = LineSink(Descriptor(writing), str)
    sink.write("first")
    assert os.read(reading, 100) == b"first\n"
    sink.write("second")
    sink.write("third")
    assert sink.flush(30), "a flush does not wait for more lines"
    assert os.read(reading, 100) == b"second\nthird\n"
    sink.write("last")
    assert sink.close(30), "nor does the end"
    assert os.read(reading, 100) == b"last\n"
    os.close(writing)
    os.close(reading)


def test_a_queue_that_is_half_full_is_written_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued_writer, "GATHER", 3600.0)
    reading, writing = os.pipe()
    sink = LineSink(Descriptor(writing), str, queue=1000)
    sink.write("first")
    assert os.read(reading, 100) == b"first\n"
    sink.write("x" * 400)
    sink.write("y" * 200)
    assert len(os.read(reading, 2000)) == 602
    assert sink.close(30)
    os.close(writing)
    os.close(reading)


def test_a_line_that_comes_as_the_patience_ends_is_written() -> None:
    """Between the end of the wait and the lock: it is in the queue, and the wait had found none."""
    written: list[str] = []
    waited = threading.Event()

    class Impatient(QueuedWriter[str]):
        def _patience(self) -> float | None:
            return None if waited.is_set() else 0.0

        def _wait(self, until: Callable[[], bool], seconds: float | None) -> bool:
            holds = super()._wait(until, seconds)
            if seconds == 0.0:
                assert not holds
                assert self._put("late", 4)
                waited.set()
            return holds

        def _write(self, lines: list[str]) -> bool:
            written.extend(lines)
            return True

    writer = Impatient(100)
    writer._start("test")
    assert waited.wait(30)
    assert writer._end(30)
    assert written == ["late"]
    assert writer._free == 100, "its room is free again"


def test_a_line_of_a_finalizer_that_runs_within_another_ones_put() -> None:
    """The lock lets the same thread in again, so that both may ring between two calls of C."""
    writer: QueuedWriter[str] = QueuedWriter(100)
    writer._idle = True

    class Bell:
        """A lock behind whose `locked` a finalizer runs."""

        def __init__(self) -> None:
            self._lock = threading.Lock()
            self._lock.acquire()
            self._finalizers = ["within"]

        def locked(self) -> bool:
            locked = self._lock.locked()
            while self._finalizers:
                assert writer._put(self._finalizers.pop(), 6)
            return locked

        def release(self) -> None:
            self._lock.release()

    writer._bell = Bell()
    assert writer._put("outer", 5)
    assert sorted(writer._queue) == ["outer", "within"]
    assert not writer._bell.locked()
