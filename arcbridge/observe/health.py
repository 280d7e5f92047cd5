"""Readiness: named checks, each a function that returns nothing when all is well and else the reason.

Checks look at what *has recently worked* (a join, a control connection, a key set), not at whether a socket is
open: a process that accepts and never serves must not call itself ready. They only read state; none waits.
Liveness has no checks: it answers as long as the event loop turns, because restarting a pod helps against a dead
loop and against nothing else (an API server that is down makes an agent unready, never dead).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .untrusted_text import clean

Check = Callable[[], "str | None"]


class CheckResult(NamedTuple):
    """`reason` is None where the check passed."""

    name: str
    reason: str | None


class Checks:
    """The readiness checks of one process, in the order they were added."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def add(self, name: str, check: Check) -> None:
        """Add a check; the name is a short word for `/readyz?verbose`. Raises ValueError if it is taken."""
        if name in self._checks:
            raise ValueError(f"readiness check {name!r} is registered twice")
        self._checks[name] = check

    def run(self) -> list[CheckResult]:
        """Run all checks. One that raises has failed; its text may hold anything, so only the type is told."""
        return [CheckResult(name, _reason(check)) for name, check in list(self._checks.items())]

    def failures(self) -> dict[str, str]:
        """Return the reasons of the checks that fail now, by name; empty means ready."""
        return {result.name: result.reason for result in self.run() if result.reason is not None}


def _reason(check: Check) -> str | None:
    try:
        reason = check()
    except Exception as error:  # a broken check leaves the state unknown, which is not ready
        return f"the check itself failed ({type(error).__name__})"
    return None if reason is None else clean(reason, 256) or "no reason given"
