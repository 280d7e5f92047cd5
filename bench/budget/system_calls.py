"""Counts the system calls of processes that run, by strace: names, bytes that they copy, and wake-ups.

A wake-up is a return of epoll that has something. Each thread has a file of its own: the budget is that of the event
loop's thread, because what other threads gather depends on how fast they are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.budget.comparison import Cost

COPYING = ("read", "readv", "recvfrom", "recvmsg", "write", "writev", "sendto", "sendmsg", "splice", "sendfile")
BY_CHANCE = ("futex", "clock_gettime")
"""How threads met, and the clock that tells how long a turn of the loop took: both depend on time, and do not count."""
_LINE = re.compile(r"^([0-9.]+) (\w+)\(.* = (-?\d+)")
TIMEOUT = 20.0
"""Seconds until strace has attached to all threads."""


class NoStrace(Exception):
    """System calls cannot be counted here; the message says what to do."""


def read(lines: Sequence[str], begins: Sequence[float]) -> list[Cost]:
    """Return the system calls of each interval between two of `begins`; a call belongs where it began."""
    found = [Cost() for _ in begins[1:]]
    for line in lines:
        if (match := _LINE.match(line)) is None:
            continue  # a signal, or a call that strace left alone when it ended
        at = bisect_left(begins, float(match[1])) - 1
        name, result = match[2], int(match[3])
        if name in BY_CHANCE or not 0 <= at < len(found):
            continue
        found[at].system_calls[name] += 1
        if result > 0:
            found[at].bytes += result if name in COPYING else 0
            found[at].wake_ups += name.startswith("epoll_") and "wait" in name
    return found


@contextmanager
def traced(pids: Mapping[str, int], directory: Path) -> Iterator[None]:
    """Have strace write down the system calls of a process of each role: a file for each thread. Raises NoStrace."""
    program = shutil.which("strace")
    if program is None:
        raise NoStrace("system calls are counted by strace: install it (Debian, Ubuntu: apt-get install strace)")
    with ExitStack() as stack:
        for role, pid in pids.items():
            argv = [program, "-f", "-ff", "-qq", "-ttt", "-s", "0", "-o", str(directory / role), "-p", str(pid)]
            process = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
            stack.callback(process.terminate)
            deadline = time.monotonic() + TIMEOUT
            while not _is_traced(pid):
                if process.poll() is not None or time.monotonic() > deadline:
                    process.terminate()
                    assert process.stderr is not None
                    raise NoStrace(f"strace could not attach: {process.stderr.read().decode().strip()}")
                time.sleep(0.005)  # between two looks
        yield


def _is_traced(pid: int) -> bool:
    return not any("TracerPid:\t0\n" in status for status in of_threads(pid, "status"))


def of_threads(pid: int, name: str) -> list[str]:
    """Return a file of /proc for each thread of a process that has not ended meanwhile."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob(f"*/{name}"):
        try:
            found.append(path.read_text())
        except OSError:
            pass  # the thread has just ended
    return found
