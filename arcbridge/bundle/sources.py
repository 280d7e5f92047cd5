"""Asks each source of a bundle in its turn, each with its own deadline, and keeps going where one does not answer.

A source is a program, whose output is read and bounded, or a function that reads files. A program is ended with all
that it has started; a function that hangs in the kernel is left behind in a thread that holds nothing up. Nothing is
known here of what may stand in a bundle (`bundle.contents`), and a source that fails costs nothing but itself.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib import metadata
from io import RawIOBase
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Final

from arcbridge.build import build
from arcbridge.bundle.contents import Contents
from arcbridge.errors import ArcbridgeError
from arcbridge.observe.untrusted_text import clean
from arcbridge.units import rfc3339

OUTPUT: Final = 16 * 1024 * 1024
"""Bytes that a program may write; a list of ten thousand sessions has four million."""
FILE: Final = 4 * 1024 * 1024
"""Bytes of one file in a bundle, before it is compressed."""
TAIL: Final = 1024 * 1024
"""Bytes from the end of a log that are read."""
ENTRIES: Final = 1000
"""Files of a state directory that are listed."""
DEADLINE: Final = 15.0
"""Seconds for one source."""
ENDING: Final = 1.0
"""Seconds for a program to end that was killed."""
BUDGET: Final = 120.0
"""Seconds for all sources together."""


class SourceFailed(ArcbridgeError):
    """A source has nothing to give; the message has no name in it."""


class Collector:
    """Asks sources, one at a time: an agent's pod has memory for one command beside the agent."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._programs: list[subprocess.Popen[bytes]] = []
        self._lock = Lock()
        """Makes the start of a program and its entry in the list one step for what ends programs."""
        self._closed = False
        """No program may start: a source that was given up goes on in its thread."""

    def collect(
        self, sources: Mapping[str, Callable[[], bytes]], deadlines: Mapping[str, float], budget: float = BUDGET
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """Return what was available, by file, and why the rest was not; takes `budget` seconds at most.

        A source returns its bytes, in a thread of its own; it may raise anything. `deadlines`: seconds, where they are
        not `DEADLINE`.
        """
        found: dict[str, bytes] = {}
        missing: dict[str, str] = {}
        ends = time.monotonic() + budget
        for file, read in sources.items():
            seconds = min(deadlines.get(file, DEADLINE), max(ends - time.monotonic(), 0.0))
            if seconds <= 0:
                missing[file] = "no time was left for it"
                continue
            self._closed = False
            try:
                found[file] = _in_thread(read).result(seconds)
            except TimeoutError:
                missing[file] = f"no answer within {seconds:.0f} s"
            except Exception as error:  # whatever is wrong with one source, the bundle is made
                missing[file] = self._reason(error)
            finally:
                self._end_programs()
            if len(found.get(file, b"")) > FILE:
                missing[file] = f"it has {len(found.pop(file))} bytes, more than the {FILE} of one file"
        return found, missing

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[bytes, str]:
        """Return what a program writes on standard output, and the end of what it writes on standard error.

        Called in a source's thread. Raises OSError, and SourceFailed for more than `OUTPUT` bytes.
        """
        pipe = subprocess.PIPE
        with self._lock:
            if self._closed:
                raise SourceFailed("it was given up")
            program = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
            )
            self._programs.append(program)
        if self._closed:
            _end(program)
        assert program.stdout is not None
        assert program.stderr is not None
        # A program that fills standard error meanwhile waits, until its deadline ends it.
        output = program.stdout.read(OUTPUT + 1)
        if len(output) > OUTPUT:
            raise SourceFailed(f"it writes more than {OUTPUT} bytes")
        return output, program.stderr.read(OUTPUT)[-4096:].decode("utf-8", "replace")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, SourceFailed):
            return clean(error.message)
        if isinstance(error, ArcbridgeError):
            return self._contents.text(error.message) or "left out: it may have names"
        return getattr(error, "strerror", "") or f"internal error ({type(error).__name__})"

    def _end_programs(self) -> None:
        self._closed = True
        held = self._lock.acquire(timeout=ENDING)  # a start may hang too: `run` ends that program
        try:
            for program in self._programs:
                _end(program)
            self._programs.clear()
        finally:
            if held:
                self._lock.release()


def _end(program: subprocess.Popen[bytes]) -> None:
    """End a program and its children; also where it has ended, because they may live."""
    with suppress(OSError):  # until `wait` no other group has its number
        program.kill() if sys.platform == "win32" else os.killpg(program.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one in the kernel, as at a file server that is gone
        program.wait(ENDING)


def _in_thread(work: Callable[[], bytes]) -> Future[bytes]:
    """Begin `work` in a thread that the end of the process does not wait for."""
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="bundle-source", daemon=True).start()
    return future


# -- what is read here -------------------------------------------------------------------------------------------------


def read_tail(file: RawIOBase) -> bytes:
    """Return the end of a file or of a pipe. Raises OSError."""
    if file.seekable():
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
    data = b""
    while chunk := file.read(TAIL):
        data = (data + chunk)[-TAIL:]
    return data


def versions() -> dict[str, Any]:
    """Return what runs here: this program, Python, its libraries and the system."""
    libraries = {}
    with suppress(metadata.PackageNotFoundError):  # the single file has no metadata
        for text in metadata.requires("arcbridge") or ():
            name = re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0]
            with suppress(metadata.PackageNotFoundError):
                libraries[name] = metadata.version(name)
    return {
        "arcbridge": build(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "openssl": ssl.OPENSSL_VERSION,
        "processors": os.cpu_count(),
        "libraries": libraries,
    }


def listing(directories: Mapping[str, Path], contents: Contents) -> list[dict[str, Any]]:
    """Return the files of directories: names, sizes, modes, owners and ages. None is opened, and no link followed."""
    found: list[dict[str, Any]] = []
    for label, top in directories.items():
        faults: list[OSError] = []
        for place, folders, names in os.walk(top, onerror=faults.append):
            here = [""] if place == str(top) else []
            for path in (Path(place, name) for name in (*here, *sorted((*folders, *names)))):
                if len(found) >= ENTRIES:
                    return [*found, {"error": f"only the first {ENTRIES} are listed"}]
                with suppress(FileNotFoundError):  # one that is gone meanwhile
                    status = path.lstat()
                    entry = {"in": label, "name": contents.path(path.relative_to(top).parts), "bytes": status.st_size}
                    entry |= {"mode": f"{status.st_mode:o}", "owner": status.st_uid}
                    found.append(entry | {"changed": rfc3339(status.st_mtime)})
        for error in faults:
            parts = Path(error.filename).relative_to(top).parts
            found.append({"in": label, "name": contents.path(parts), "error": error.strerror})
    return found
