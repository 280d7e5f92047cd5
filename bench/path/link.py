"""Starts the link (link.c): a TCP proxy that adds a round trip, a rate and a queue."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path as File
from types import TracebackType
from typing import Self

from bench.address import Address
from bench.load.build import build

SOURCE = File(__file__).with_name("link.c")


class LinkFailed(Exception):
    """The link did not start; its own words are on stderr."""


@dataclass(frozen=True, slots=True)
class Path:
    """What lies between a client and its relay."""

    name: str
    round_trip_ms: float
    """Added by the link, half of it each way; never less."""
    mbit_per_s: float = 0
    """Payload, 10^6 bits per second, each way, for all connections together. 0: not shaped."""
    queue_bytes: int = 0
    """What waits for the link before its senders are held back, each way. Nothing is lost. 0: four times what is on
    the way within one direction, and 4 MiB at least."""


class Link:
    """One path to one address. Use as a context manager."""

    def __init__(self, path: Path, to: Address, *, report_ms: int = 0, report: File | None = None) -> None:
        """`report_ms`: how often the link writes a line of JSON about what it holds to `report` (a debugging aid)."""
        argv = [
            *(str(build(SOURCE)), to.host, str(to.port)),
            *("--delay-us", f"{path.round_trip_ms * 500:.0f}"),
            *("--bits-per-s", f"{path.mbit_per_s * 1e6:.0f}"),
            *("--queue-bytes", str(path.queue_bytes)),
            *("--report-ms", str(report_ms)),
        ]
        self.path = path
        self._report = report.open("wb") if report is not None else None
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._report,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        word = self._process.stdout.readline().split()
        if len(word) != 2 or word[0] != "PORT":
            self.close()
            raise LinkFailed(f"the link of {path} did not start")
        self.address = Address("127.0.0.1", int(word[1]))

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def close(self) -> None:
        """Close its stdin, which ends it and every connection through it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        if self._report is not None:
            self._report.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
