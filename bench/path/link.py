"""Starts the link (link.c): a TCP proxy that adds a round trip, a rate and a queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as File

from bench.address import Address
from bench.load.build import build
from bench.process import Listening

SOURCE = File(__file__).with_name("link.c")


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


class Link(Listening):
    """One path to one address. Use as a context manager."""

    def __init__(self, path: Path, to: Address, *, report_ms: int = 0, report: File | None = None) -> None:
        """`report_ms`: how often the link writes a line of JSON about what it holds to `report` (a debugging aid).

        Raises bench.process.NotReady.
        """
        self.path = path
        self._report = report.open("wb") if report is not None else None
        super().__init__(
            [
                *(str(build(SOURCE)), to.host, str(to.port)),
                *("--delay-us", f"{path.round_trip_ms * 500:.0f}"),
                *("--bits-per-s", f"{path.mbit_per_s * 1e6:.0f}"),
                *("--queue-bytes", str(path.queue_bytes)),
                *("--report-ms", str(report_ms)),
            ],
            stderr=self._report,
        )

    def close(self) -> None:
        super().close()
        if self._report is not None:
            self._report.close()
