"""Processes of a system under test: output to files, so that reading it costs the measurement nothing."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from bench.address import Address

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class NotReady(Exception):
    """A process ended, or did not do in time what was waited for; the message has the end of its output."""


class Role:
    """One running program."""

    def __init__(
        self, name: str, argv: Sequence[str | Path], directory: Path, *, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [os.fspath(part) for part in argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def wait_until(self, ready: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
        """Wait until `ready()`. Raises NotReady when the process ends first, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not ready():
            if self._process.poll() is not None:
                raise NotReady(f"{self.name} ended with {self._process.returncode} before {what}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise NotReady(f"{self.name}: not {what} within {timeout:.0f} s\n{self.tail()}")
            time.sleep(0.02)

    def said(self, text: str) -> bool:
        """Whether its output has `text`."""
        return text in self.log.read_text(errors="replace")

    def tail(self, lines: int = 20) -> str:
        """Return the end of the program's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def signal(self, number: int) -> None:
        """Send the signal if the process has not ended."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after 5 seconds, to this process; its children end with it."""
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


class Listening:
    """A program that says `PORT n` once it listens, and ends when its stdin is closed. Use as a context manager.

    Raises NotReady when it says anything else; its own words are on stderr.
    """

    def __init__(self, argv: Sequence[str | Path], *, stderr: IO[bytes] | None = None) -> None:
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        word = self._process.stdout.readline().split()
        if len(word) != 2 or word[0] != "PORT":
            self.close()
            raise NotReady(f"{Path(argv[0]).name} did not start")
        self.address = Address("127.0.0.1", int(word[1]))

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def close(self) -> None:
        """Close the program's stdin, which ends it and every connection through it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stop_all(roles: Sequence[Role]) -> None:
    """Stop roles, the last started first."""
    for role in reversed(roles):
        role.stop()


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
