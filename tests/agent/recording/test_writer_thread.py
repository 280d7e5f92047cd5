"""One thread for all recordings: in order, what is urgent first, and it keeps no process from its end."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from arcbridge.agent.recording.writer_thread import WriterThread

HANGS = """
import asyncio, threading
from arcbridge.agent.recording.writer_thread import WriterThread

async def main():
    thread = WriterThread()
    thread.submit(threading.Event().wait)
    thread.close()

asyncio.run(main())
"""


async def test_work_is_done_in_order_and_what_is_urgent_first() -> None:
    thread, gate, done = WriterThread(), threading.Event(), list[int]()
    first = thread.submit(gate.wait)
    rest = [thread.submit(done.append, number) for number in (1, 2)]
    urgent = thread.submit(done.append, 0, urgent=True)
    before = thread.progress
    gate.set()
    assert await first
    for one in (*rest, urgent):
        await one
    assert done == [0, 1, 2]
    assert thread.progress >= before
    thread.close()


async def test_one_user_who_has_much_to_write_delays_another_by_one_piece() -> None:
    thread, gate, done = WriterThread(), threading.Event(), list[str]()
    thread.submit(gate.wait)
    heavy = [thread.submit(done.append, f"heavy {number}", user="heavy") for number in range(50)]
    light = [thread.submit(done.append, f"light {number}", user="light") for number in range(2)]
    gate.set()
    for one in (*heavy, *light):
        await one
    assert done[:4] == ["heavy 0", "light 0", "heavy 1", "light 1"]
    assert done[4:] == [f"heavy {number}" for number in range(2, 50)]
    thread.close()


async def test_an_error_is_that_of_its_work_and_work_that_nobody_waits_for_is_done() -> None:
    thread, gate, done = WriterThread(), threading.Event(), list[int]()
    with pytest.raises(ZeroDivisionError):
        await thread.submit(lambda: 1 // 0)
    thread.submit(gate.wait)
    thread.submit(done.append, 1).cancel()
    last = thread.submit(done.append, 2)
    gate.set()
    await last
    assert done == [1, 2]
    thread.close()


def test_a_directory_that_hangs_keeps_no_process() -> None:
    assert subprocess.run([sys.executable, "-c", HANGS], timeout=30).returncode == 0
