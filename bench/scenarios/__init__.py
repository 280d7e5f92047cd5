"""What is measured: one file and one class each. A new one is a file here and a line in `SCENARIOS`."""

from __future__ import annotations

from bench.scenarios.base import Effort, Metrics, Scenario, Way
from bench.scenarios.bulk import Bulk
from bench.scenarios.concurrent import Concurrent, Concurrent256
from bench.scenarios.echo import Echo
from bench.scenarios.keystroke import Keystroke
from bench.scenarios.last_mile import LastMile
from bench.scenarios.long_path import LongPath, LongPath200
from bench.scenarios.open import Open
from bench.scenarios.resumption import Resumption
from bench.scenarios.streams import Streams
from bench.scenarios.transfer import Transfer

SCENARIOS: dict[str, type[Scenario]] = {
    scenario.name: scenario
    for scenario in (
        Bulk,
        Transfer,
        Resumption,
        Echo,
        Concurrent,
        Concurrent256,
        Open,
        Keystroke,
        LastMile,
        LongPath,
        LongPath200,
        Streams,
    )
}
"""By name, in the order of the report."""

QUICK = ("bulk", "resumption", "echo", "concurrent", "open")
"""The scenarios of `--quick`."""

__all__ = ["QUICK", "SCENARIOS", "Effort", "Metrics", "Scenario", "Way"]
