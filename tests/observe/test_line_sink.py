"""The stream of the log may stall; the event loop does not wait for it (docs/threats.md#O6)."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

from arcbridge.observe.line_sink import LineSink


def test_lines_reach_a_file_in_order(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        sink = LineSink(stream, str)
        for number in range(1000):
            sink.write(f"line {number}")
        assert sink.close(30)
    assert (tmp_path / "log").read_text().splitlines() == [f"line {number}" for number in range(1000)]
    assert sink.dropped == 0


def test_a_stream_without_descriptor_is_written_at_once() -> None:
    stream = io.StringIO()
    sink = LineSink(stream, str)
    sink.write("now")
    assert stream.getvalue() == "now\n"
    assert sink.close(30)


def test_lines_wait_while_it_is_paused(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        sink = LineSink(stream, str)
        sink.pause(True)
        sink.write("behind the question")
        assert not sink.flush(0.05)
        assert (tmp_path / "log").read_text() == ""
        sink.pause(False)
        assert sink.flush(30)
        assert (tmp_path / "log").read_text() == "behind the question\n"
        assert sink.close(30)


class Drain:
    """Reads a pipe to its end in a thread, so that the test itself never waits for it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.text = ""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with os.fdopen(self._descriptor, "rb") as reader:
            self.text = reader.read().decode()

    def result(self) -> str:
        self._thread.join(30)
        return self.text


def test_a_stalled_stream_costs_lines_and_no_time() -> None:
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    sink = LineSink(stream, lambda count: f"dropped {count}", queue=100_000)
    for _ in range(5000):
        sink.write("x" * 99)  # never waits: the pipe would stay full for ever
    assert not sink.flush(0.05)  # without a reader the pipe holds 64 KiB, the queue the rest
    lost = sink.dropped
    assert lost > 3000
    drain = Drain(reading)
    assert sink.flush(30)
    sink.write("after")
    assert sink.close(30)
    stream.close()
    text = drain.result().splitlines()
    assert text.count("x" * 99) + lost == 5000
    # In one line, or in two where the pipe took some in between.
    assert sum(int(line.removeprefix("dropped ")) for line in text if line.startswith("dropped ")) == lost
    assert "after" in text


def test_a_closed_stream_is_counted_not_raised(tmp_path: Path) -> None:
    stream = (tmp_path / "log").open("w")
    sink = LineSink(stream, str)
    stream.close()
    sink.write("lost")
    assert sink.close(30)
    assert sink.dropped == 1


def test_a_full_disk_is_counted_and_does_not_come_back() -> None:
    with open("/dev/full", "w") as stream:
        sink = LineSink(stream, str)
        sink.write("lost")
        assert sink.flush(30)
        sink.write("lost too")
        assert sink.close(30)
        assert sink.dropped == 2


def test_close_gives_up_on_a_stream_that_stays_stalled() -> None:
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    sink = LineSink(stream, str)
    sink.write("x" * 1_000_000)
    assert not sink.close(0.1)  # where it waited for the stream, it would wait for ever: nobody reads yet
    drain = Drain(reading)
    assert sink.close(30)
    stream.close()
    assert len(drain.result()) == 1_000_001
