"""Progress of long work: on a terminal one line that is rewritten, elsewhere only the beginning and the end.

    with Progress("building helm", total=812, unit="packages") as progress:
        progress.show(12)

As a program, for work of other languages, it runs a command and shows the last line of its output, and the whole output
if the command fails: `python tests/support/progress.py TITLE -- COMMAND…`. It imports nothing that is not Python's own,
because `make` runs it before anything is installed.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

EVERY = 0.1
"""Seconds between two versions of the line."""
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f]")


def clock(seconds: float) -> str:
    """Return a duration as it is read: `8 s`, `2 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class StatusLine:
    """The last line of a terminal, which is rewritten; where stderr is no terminal it does not appear."""

    def __init__(self) -> None:
        self._shown = False

    @property
    def appears(self) -> bool:
        """Whether there is a terminal for it."""
        return sys.stderr.isatty()

    @property
    def columns(self) -> int:
        """What of a line can be seen. One less than the terminal has: some wrap a full line."""
        return shutil.get_terminal_size().columns - 1

    def show(self, text: str) -> None:
        """Write the line anew."""
        if self.appears:
            self._shown = True
            sys.stderr.write(f"\r\x1b[K{_cut(_UNPRINTABLE.sub('', text), self.columns)}")
            sys.stderr.flush()

    def say(self, text: str) -> None:
        """Write text that stays, in place of the line."""
        start = "\r\x1b[K" if self._shown and self.appears else ""
        self._shown = False
        print(f"{start}{text}", file=sys.stderr, flush=True)


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: max(columns - 1, 0)] + "…"


class Progress:
    """The progress of one piece of work. Use as a context manager: its end says whether the work was done."""

    def __init__(self, title: str, *, total: int = 0, unit: str = "") -> None:
        """`title` says what is done, as `building helm`; `total` is how many `unit` there are, or 0."""
        self.title = title
        self.total = total
        self.unit = unit
        self._status = StatusLine()
        self._begun = time.monotonic()
        self._shown = 0.0
        """When the line was written last, monotonic seconds."""

    def line(self, done: int, detail: str, columns: int) -> str:
        """Return the line of this moment, at most `columns` long: the detail gives way first, and then the title."""
        count = f", {done} of {self.total} {self.unit}" if self.total else ""
        facts = f": {clock(time.monotonic() - self._begun)}{count}"
        title = _cut(self.title, columns - len(facts))
        return _cut(f"{title}{facts}, {detail}" if detail else f"{title}{facts}", columns)

    def show(self, done: int = 0, detail: str = "") -> None:
        """Rewrite the line, on a terminal, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._shown >= EVERY:
            self._shown = now
            self._status.show(self.line(done, detail, self._status.columns))

    def __enter__(self) -> Self:
        if not self._status.appears:
            self._status.say(f"{self.title}: {self.total} {self.unit} ..." if self.total else f"{self.title} ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = "done in" if kind is None else "not done after"
        self._status.say(f"{self.title}: {end} {clock(time.monotonic() - self._begun)}")


def follow(process: subprocess.Popen[bytes], heard: Callable[[str], None], *, timeout: float = 3600) -> str:
    """Read a process's standard output to its end and return it.

    `heard` is called for each line, and with "" for each second without one. Raises subprocess.TimeoutExpired
    after `timeout` seconds. Whatever ends this also ends the process.
    """
    assert process.stdout is not None
    deadline = time.monotonic() + timeout
    output, partial = bytearray(), b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise subprocess.TimeoutExpired(process.args, timeout, bytes(output))
                if not selector.select(min(left, 1.0)):
                    heard("")
                    continue
                chunk = os.read(process.stdout.fileno(), 65536)
                output += chunk
                *lines, partial = (partial + chunk).split(b"\n")
                for line in lines if chunk else [partial]:
                    heard(line.decode(errors="replace").rsplit("\r", 1)[-1])
                if not chunk:
                    break
        process.wait(max(deadline - time.monotonic(), 0.1))
    except BaseException:
        process.kill()
        raise
    finally:
        process.stdout.close()
        process.wait()
    return output.decode(errors="replace")


def main(argv: Sequence[str]) -> int:
    """Run a command and show the last line of its output. Returns its exit code, 130 after Ctrl-C."""
    if len(argv) < 3 or argv[1] != "--":
        print("usage: progress.py TITLE -- COMMAND...", file=sys.stderr)
        return 2
    title, _, *command = argv
    if sys.platform == "win32":  # where nothing waits for a pipe
        print(f"{title} ...", file=sys.stderr, flush=True)
        return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    output = ""
    try:
        with Progress(title) as progress:
            last = ""

            def heard(line: str) -> None:
                nonlocal last
                last = line.strip() or last
                progress.show(detail=last)

            output = follow(process, heard)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command)
    except subprocess.CalledProcessError as error:
        print(output.rstrip(), file=sys.stderr)
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
