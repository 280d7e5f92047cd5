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
from concurrent.futures import Future, wait
from contextlib import suppress
from importlib import metadata
from io import RawIOBase
from pathlib import Path
from threading import Event, Lock, Thread
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
ERRORS: Final = 4096
"""Bytes from the end of standard error."""
ENDING: Final = 1.0
"""Seconds for a program to end that was killed, or that has closed its output."""
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
        self._closed = Event()
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
            self._closed.clear()
            try:
                source = _in_thread(read)
                if wait((source,), seconds).done:
                    found[file] = source.result()
                else:
                    missing[file] = f"no answer within {seconds:.0f} s"
            except Exception as error:  # whatever is wrong with one source, the bundle is made
                missing[file] = self._reason(error)
            finally:
                self._end_programs()
            if len(found.get(file, b"")) > FILE:
                missing[file] = f"it has {len(found.pop(file))} bytes, more than the {FILE} of one file"
        return found, missing

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[bytes, str]:
        """Return what a program writes on standard output and, where it says itself that it has failed, the end of
        what it writes on standard error.

        Called in a source's thread. Raises OSError, and SourceFailed for more than `OUTPUT` bytes.
        """
        pipe = subprocess.PIPE
        with self._lock:
            if self._closed.is_set():
                raise SourceFailed("it was given up")
            program = subprocess.Popen(
                command, bufsize=0, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
                start_new_session=True,
            )  # fmt: skip
            self._programs.append(program)
        if self._closed.is_set():
            _end(program)
        # Both at once: a program that fills one of its pipes waits for the reader. In memory, because the root of an
        # agent's pod takes no temporary file.
        errors = bytearray()
        reader = Thread(target=_read_end, args=(program, errors), name="bundle-errors", daemon=True)
        reader.start()
        assert program.stdout is not None
        output = bytearray()
        while chunk := program.stdout.read(65536):
            output += chunk
            if len(output) > OUTPUT:
                raise SourceFailed(f"it writes more than {OUTPUT} bytes")
        reader.join(ENDING)  # a child may keep standard error open
        said = bytes(errors) if _has_failed(program) else b""
        return bytes(output), said.decode("utf-8", "replace")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, SourceFailed):
            return clean(error.message)
        if isinstance(error, ArcbridgeError):
            return self._contents.text(error.message) or "left out: it may have names"
        if isinstance(error, TimeoutError):  # a deadline of its own
            return error.strerror or "what it asks does not answer"
        return getattr(error, "strerror", "") or f"internal error ({type(error).__name__})"

    def _end_programs(self) -> None:
        self._closed.set()
        held = self._lock.acquire(timeout=ENDING)  # a start may hang too: `run` ends that program
        try:
            for program in self._programs:
                _end(program)
            self._programs.clear()
        finally:
            if held:
                self._lock.release()


def _read_end(program: subprocess.Popen[bytes], end: bytearray) -> None:
    """Keep the last `ERRORS` bytes of standard error in `end`."""
    assert program.stderr is not None
    with suppress(OSError):
        while chunk := program.stderr.read(65536):
            end += chunk
            del end[:-ERRORS]


def _has_failed(program: subprocess.Popen[bytes]) -> bool:
    """Return whether a program has ended by itself, with an exit code other than 0. Waits `ENDING` seconds for it."""
    if sys.platform == "win32":
        with suppress(subprocess.TimeoutExpired):
            return program.wait(ENDING) > 0
        return False
    if sys.platform == "darwin":  # Python 3.13 is the first that has waitid there
        time.sleep(0.1)
        _end(program)
        return (program.returncode or 0) > 0
    until = time.monotonic() + ENDING
    while time.monotonic() < until:
        # It stays a zombie, whose number no other group has, for `_end`.
        ended = os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is not None:
            return ended.si_code == os.CLD_EXITED and ended.si_status > 0
        time.sleep(0.01)
    return False


def _end(program: subprocess.Popen[bytes]) -> None:
    """End a program and its children; also where it has ended, because they may live."""
    if program.returncode is None:  # until `wait` no other group has its number
        with suppress(OSError):
            if sys.platform == "win32":
                program.kill()
            else:
                os.killpg(program.pid, signal.SIGKILL)
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
