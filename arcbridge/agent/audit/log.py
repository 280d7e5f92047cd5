"""The audit log as requests see it: `begin` before what lasts or changes something, `write` when a request is over.

It bounds what the records of one user take, and counts in the chain what is left out for that. Invariant: with
`on_failure="refuse"`, a request that was begun is in the file (`ChainedLog`) before its first byte leaves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Unpack

from arcbridge.agent.audit.budget import AuditBudget
from arcbridge.agent.audit.record import AuditRecord, left_out_line
from arcbridge.audit.log import ChainedLog, LogOptions, Recorded

LEFT_OUT_INTERVAL = 60.0
"""Seconds after which a record counts those that were left out, if the user has no other one meanwhile."""


class AuditLog(ChainedLog):
    """Takes the records of requests and sessions."""

    refused_words = (
        "the agent cannot write its audit log ({}), and by its settings no request goes on unrecorded; "
        "tell the operator of this cluster's agent"
    )

    def __init__(self, file: str, *, commands: bool = True, **options: Unpack[LogOptions]) -> None:
        """Open the file at once. Raises ConfigError."""
        super().__init__(file, **options)
        self.commands = commands
        """Whether command lines are recorded."""
        self.left_out = 0
        """Records that were left out because their user was over the bound on bytes of records."""
        self._left_out: set[AuditBudget] = set()
        """The users with records that were left out and are not counted in the chain yet."""
        self._left_out_timer: asyncio.TimerHandle | None = None

    def write(self, record: AuditRecord) -> None:
        """Queue the record of a request that is over; never waits. One that only read may be left out and counted."""
        now = time.monotonic()
        if self._writer is None:
            self.records += 1
            return
        line, budget = record.line(now), record.subject.budget
        if budget is not None:
            if not budget.admit(line, now):
                if not (record.begun or record.limit or self.refuses):
                    budget.leave_out(line)
                    self._leave_out(budget)
                    return
                budget.charge(line, now)  # authorize refuses what comes after too much of it
            if budget.records_left_out:
                self._count_left_out(budget)
        self.records += 1
        self._writer.put(line)

    def begin(
        self, record: AuditRecord, recorded: Recorded, line: Callable[[AuditRecord], str] = AuditRecord.begun_line
    ) -> None:
        """Write the record that a request begins; `recorded` says when the request may go on, perhaps at once."""

        def charged() -> str:
            text, budget = line(record), record.subject.budget
            if budget is not None:
                # Details may come an hour behind the request's beginning, whose time is the clock of a begun line.
                budget.charge(text, record.started if line is AuditRecord.begun_line else time.monotonic())
                if budget.records_left_out:
                    self._count_left_out(budget)
            return text

        self.put_before(charged, recorded, record.begin)

    def detail(self, record: AuditRecord, recorded: Recorded) -> None:
        """Write the record of what a request's body asks for; `recorded` says when its last byte may leave."""
        self.begin(record, recorded, AuditRecord.details_line)

    async def written(self, write: Callable[[AuditRecord, Recorded], None], record: AuditRecord) -> str:
        """`begin` or `detail`, and wait; return the refusal's reason, or an empty string."""
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        write(record, lambda refusal: None if done.done() else done.set_result(refusal))
        return await done

    def close(self) -> None:
        """Write what is queued (2 s at most: call it at the very end) and close the file."""
        self._count_all_left_out()
        super().close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _leave_out(self, budget: AuditBudget) -> None:
        self.left_out += 1
        self._left_out.add(budget)
        if self._left_out_timer is None:
            loop = asyncio.get_running_loop()
            self._left_out_timer = loop.call_later(LEFT_OUT_INTERVAL, self._count_all_left_out)

    def _count_left_out(self, budget: AuditBudget) -> None:
        """Write the record that says how many of a user's records were left out before it."""
        self._left_out.discard(budget)
        records, size = budget.take_left_out()
        if records and self._writer is not None and not self.put(left_out_line(budget.user, records, size)):
            self._writer.dropped += records - 1  # they are missing without a count of their own

    def _count_all_left_out(self) -> None:
        if self._left_out_timer is not None:
            self._left_out_timer.cancel()
            self._left_out_timer = None
        for budget in list(self._left_out):
            self._count_left_out(budget)
