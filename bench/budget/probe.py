"""Counts what the main thread of a Python process calls and allocates, and reads it from outside.

A process that is started with `environment` loads `probe.c` at its start. Its counters lie in shared memory, so that
reading them asks nothing of the process: no wake-up, no system call, no line of Python.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from enum import IntEnum
from pathlib import Path

from bench.load.build import build

SOURCE = Path(__file__).with_name("probe.c")
SHARED = ("-shared", "-fPIC")
START = "import ctypes\nif ctypes.PyDLL({library!r}).begin(b'{directory}/%d' % os.getpid()):\n    os._exit(70)\n"
"""What a counted process runs before anything else, as its `sitecustomize`."""
_HEAD, _NAMES, _NAME, _EVENTS = 32, 1 << 14, 192, 1 << 20
_LOG = _HEAD + _NAMES * _NAME


class Phase(IntEnum):
    """What a probe counts. After ALLOCATIONS it counts no calls any more."""

    OFF = 0
    CALLS = 1
    ALLOCATIONS = 2


def environment(directory: Path) -> dict[str, str]:
    """Return the variables with which a process counts itself; its counters are a file in `directory`.

    Raises bench.load.build.NoCompiler.
    """
    start = START.format(library=str(build(SOURCE, SHARED)), directory=directory)
    (directory / "sitecustomize.py").write_text(f"import os\n{start}")
    # libuv asks io_uring, where the kernel lets it, for what is `epoll_ctl` elsewhere.
    return {
        "UV_USE_IO_URING": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH")))),
    }


class Probe:
    """The counters of one process."""

    def __init__(self, directory: Path, pid: int) -> None:
        with (directory / str(pid)).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def count(self, phase: Phase) -> None:
        """Count this from the next call on."""
        self._memory[:8] = struct.pack("Q", phase)

    @property
    def calls(self) -> int:
        """Calls of functions so far, those of Python and those of C."""
        return int(struct.unpack_from("Q", self._memory, 8)[0])

    @property
    def allocations(self) -> int:
        """Objects and buffers that were allocated so far, or allocated anew with another size."""
        return int(struct.unpack_from("Q", self._memory, 16)[0])

    def functions(self, begin: int, end: int) -> Counter[str]:
        """Return how often each function was called between two values of `calls`."""
        if end - begin > _EVENTS:
            raise OverflowError(f"an operation made {end - begin} calls")
        found = Counter(struct.unpack_from("H", self._memory, _LOG + 2 * (at % _EVENTS))[0] for at in range(begin, end))
        named: Counter[str] = Counter()
        for number, times in found.items():
            named[self._name(number)] += times
        return named

    def _name(self, number: int) -> str:
        at = _HEAD + _NAME * number
        return readable(self._memory[at : at + _NAME].partition(b"\0")[0].decode(errors="replace"))

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()


_BESIDE = f"{Path(__file__).parent}/"


def readable(name: str) -> str:
    """Return how a function is named in the budget: `wire/sender.py:Sender.send`, `ssl.py:…`, `list.append`."""
    module, _, function = name.removesuffix(":").rpartition(":")
    if module.startswith(_BESIDE):  # the client of the joins
        return f"bench/budget/{module.removeprefix(_BESIDE)}:{function}"
    for folder in ("/site-packages/", "/arcbridge/", "/lib/python3."):
        _, found, inside = module.rpartition(folder)
        if found:
            module = inside.partition("/")[2] if folder.startswith("/lib") else inside
            break
    return f"{module}:{function}" if module else function
