"""A role looks at itself: checks that ask what it depends on, again and again, at little cost.

Each check asks one thing (the API server, the issuers' keys) and yields `Finding`s; it runs about once a minute, at
random so that the pods of a cluster do not all ask in one instant, sooner and sooner again while it fails, and at once
when the role has just seen that something is wrong (`look_soon`). What changes is logged once; the rest reads the last
findings: one metric per check, readiness where the check gates it, and `doctor`. This module knows nothing of what is
asked. Invariant: a check that hangs or raises has failed, and holds up no other.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.untrusted_text import clean
from arcbridge.tasks import in_time

from .diagnosis import Finding, FindingState, failed

EVERY: Final = 60.0
"""Seconds between two looks, on average."""
SPREAD: Final = 0.25
"""By which share of its interval a look comes earlier or later."""
AGAIN: Final = 5.0
"""Seconds after a failure; doubled with each further one, up to `EVERY`."""
SOONEST: Final = 1.0
"""Seconds between two looks that were asked for: a flood of failing requests asks for one."""
DEADLINE: Final = 20.0
"""Seconds for one look: above any connect deadline below it."""

AGENT_CHECKS: Final = (
    "api_server", "credential", "impersonation", "reload", "issuers", "groups", "audit", "relays", "certificate",
    "elevation",
)  # fmt: skip
"""The names of an agent's self-checks: what a relay shows of them is one of these."""

_DETAIL: Final = 400
"""Bytes of a detail as it is logged and shown."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """One thing to look at."""

    name: str
    """A word: the value of the metric's label, and the check's name in `/readyz?verbose`."""
    look: Callable[[], Awaitable[Sequence[Finding]]]
    gates: Callable[[], bool] | bool = False
    """Whether the role is not ready while this has failed; a function is asked then."""


class SelfChecks:
    """The checks of one process. `run()` is a task of the role's; everything else reads."""

    def __init__(self, checks: Sequence[SelfCheck], log: Any, *, every: float = EVERY) -> None:
        """`log`: the role's logger."""
        self._checks = {check.name: check for check in checks}
        self._log = log
        self._every = every
        self._found: dict[str, tuple[Finding, ...]] = {}
        self._wanted = {name: asyncio.Event() for name in self._checks}

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the checks, in their order."""
        return tuple(self._checks)

    def findings(self) -> list[Finding]:
        """Return what was found last, in the order of the checks; what has not been looked at yet is skipped."""
        return [finding for name in self._checks for finding in self._found.get(name, ())]

    def failed(self, name: str) -> Finding | None:
        """Return the finding with which a check has failed; None where it has not, or has not ended yet."""
        return next((one for one in self._found.get(name, ()) if one.state is FindingState.FAILED), None)

    def unready(self, name: str) -> str | None:
        """Return why the role is not ready as far as this check tells, or None."""
        check = self._checks[name]
        if check.gates is False:
            return None
        if name not in self._found:
            return "not looked at yet"
        finding = self.failed(name)
        if finding is None or not (check.gates if isinstance(check.gates, bool) else check.gates()):
            return None
        return f"{finding.detail} ({finding.code})"

    def register(self, metrics: Metrics, checks: Checks) -> None:
        """Tell metrics and readiness where to read."""
        metrics.gauge(
            "check_ok",
            "0 while a self-check fails; its log line `check failed` says why.",
            {"check": self.names},
            lambda: {name: int(self.failed(name) is None) for name in self.names},
        )
        for name, check in self._checks.items():
            if check.gates is not False:
                checks.add(name, lambda name=name: self.unready(name))  # type: ignore[misc]

    # -- looking --------------------------------------------------------------------------------------------------

    def look_soon(self, *names: str) -> None:
        """Look at these things at once, because something has just gone wrong; all of them without a name."""
        for name in names or self._checks:
            self._wanted[name].set()

    async def run(self) -> None:
        """Look at everything until cancelled."""
        async with asyncio.TaskGroup() as group:
            for name in self._checks:
                group.create_task(self._watch(name), name=f"check-{name}")

    async def look(self) -> list[Finding]:
        """Look at everything once, one after the other; for a `doctor`."""
        for name in self._checks:
            self._found[name] = await self._look(self._checks[name])
        return self.findings()

    async def _watch(self, name: str) -> None:
        failures = 0
        while True:
            self._wanted[name].clear()
            self._note(name, await self._look(self._checks[name]))
            # What could not be looked at yet is looked at soon, too.
            wanting = any(one.state in (FindingState.FAILED, FindingState.SKIPPED) for one in self._found[name])
            failures = failures + 1 if wanting else 0
            wait = min(AGAIN * 2.0 ** min(failures - 1, 16), self._every) if failures else self._every
            wait *= 1 - SPREAD + 2 * SPREAD * random.random()
            await asyncio.sleep(min(SOONEST, wait))
            await in_time(self._wanted[name].wait(), max(wait - SOONEST, 0.0))

    async def _look(self, check: SelfCheck) -> tuple[Finding, ...]:
        try:
            async with asyncio.timeout(DEADLINE):
                found = await check.look()
        except TimeoutError:
            found = [failed(check.name, f"no answer within {DEADLINE:.0f} s", "", f"{check.name}_slow")]
        except Exception as error:  # a broken check leaves the state unknown; its text may hold anything
            found = [failed(check.name, f"the check itself failed ({type(error).__name__})", "", "check")]
        return tuple(
            replace(one, detail=clean(one.detail, _DETAIL), remedy=clean(one.remedy, _DETAIL)) for one in found
        )

    def _note(self, name: str, found: tuple[Finding, ...]) -> None:
        """Keep what was found, and log what has changed since."""
        before = {one.hop: one for one in self._found.get(name, ())}
        self._found[name] = found
        for one in found:
            known = before.get(one.hop)
            bad = one.state in (FindingState.FAILED, FindingState.WARNING)
            if bad and (known is None or (known.state, known.code) != (one.state, one.code)):
                tell = self._log.error if one.state is FindingState.FAILED else self._log.warning
                event = "check failed" if one.state is FindingState.FAILED else "check warns"
                tell(event, check=name, code=one.code, hop=one.hop, reason=one.detail, remedy=one.remedy)
            elif not bad and known is not None and known.state in (FindingState.FAILED, FindingState.WARNING):
                self._log.info("check passed", check=name, hop=one.hop)
