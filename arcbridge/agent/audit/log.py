"""The audit log as requests see it: `begin` before what lasts or changes something, `write` when a request is over.

It decides what a log that cannot be written means: with `on_failure="refuse"` no request goes on, with `"continue"`
requests go on and what is missing is counted. It is used from one event loop. Invariant: with `"refuse"`, a request
that was begun is in the file (handed to the kernel, and on the disk with `fsync`) before its first byte leaves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from arcbridge.agent.audit.budget import AuditBudget
from arcbridge.agent.audit.record import AuditRecord, left_out_line
from arcbridge.agent.audit.writer import AuditWriter, Waiter
from arcbridge.errors import ConfigError

STALL = 5.0
"""Seconds that a write may take, and that a request waits for its record: longer means that the disk hangs."""
LEFT_OUT_INTERVAL = 60.0
"""Seconds after which a record counts those that were left out, if the user has no other one meanwhile."""
CONTINUE, REFUSE = "continue", "refuse"

Recorded = Callable[[str], None]
"""Called once, in the event loop: the request may go on (empty), or is refused for this reason."""


class AuditLog:
    """Takes records for a file (appended, mode 0600), for standard output (`-`), or for nothing (empty)."""

    def __init__(
        self, file: str, *, on_failure: str = CONTINUE, commands: bool = True, fsync: bool = False, instance: str = ""
    ) -> None:
        """Open the file at once. Raises ConfigError."""
        check_policy(on_failure)
        self.commands = commands
        """Whether command lines are recorded."""
        self.refuses = on_failure == REFUSE
        """Whether requests are refused while records cannot be written."""
        self.records = 0
        """Records made, of every stage."""
        self.unrecorded = 0
        """Requests that went on before their `begun` record was written; always 0 where `refuses` is set."""
        self.refused = 0
        """Requests that were refused because their record could not be written."""
        self.left_out = 0
        """Records that were left out because their user was over the bound on bytes of records."""
        self._left_out: set[AuditBudget] = set()
        """The users with records that were left out and are not counted in the chain yet."""
        self._left_out_timer: asyncio.TimerHandle | None = None
        self._writer: AuditWriter | None = None
        if not file:
            return
        try:
            self._writer = AuditWriter(file, instance=instance, fsync=fsync)
        except OSError as error:
            raise ConfigError(f"audit.file: {file} cannot be opened: {error.strerror}") from error

    # -- state ----------------------------------------------------------------------------------------------------

    @property
    def dropped(self) -> int:
        """Records that are missing from the log since the start."""
        return self._writer.dropped if self._writer is not None else 0

    @property
    def failures(self) -> int:
        """Times that writing began to fail."""
        return self._writer.failures if self._writer is not None else 0

    @property
    def failure(self) -> str:
        """Why records cannot be written now; empty while all is well."""
        writer = self._writer
        if writer is None:
            return ""
        if writer.failure:
            return writer.failure
        since = writer.writing_since
        return "it takes no data" if since and time.monotonic() - since > STALL else ""

    @property
    def chain_records(self) -> int:
        """The number of the present file's newest record."""
        return max(0, self._writer.head.sequence) if self._writer is not None else 0

    def refusal(self) -> str:
        """Return the sentence for a request that must not go on now; empty where requests go on."""
        if not self.refuses or not (failure := self.failure):
            return ""
        self.refused += 1
        return refusal_text(failure)

    def unready(self) -> str | None:
        """Return a reason, for the readiness check, only where requests are refused."""
        failure = self.failure if self.refuses else ""
        return f"the audit log cannot be written: {failure}" if failure else None

    # -- records --------------------------------------------------------------------------------------------------

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

    def begin(self, record: AuditRecord, recorded: Recorded) -> None:
        """Write the record that a request begins; `recorded` says when the request may go on, perhaps at once."""
        self._write_before(record, AuditRecord.begun_line, recorded)

    def detail(self, record: AuditRecord, recorded: Recorded) -> None:
        """Write the record of what a request's body asks for; `recorded` says when its last byte may leave."""
        self._write_before(record, AuditRecord.details_line, recorded)

    async def written(self, write: Callable[[AuditRecord, Recorded], None], record: AuditRecord) -> str:
        """`begin` or `detail`, and wait; return the refusal's reason, or an empty string."""
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        write(record, lambda refusal: None if done.done() else done.set_result(refusal))
        return await done

    def reopen(self) -> None:
        """Leave a file that was renamed for a new one of its name, at once."""
        if self._writer is not None:
            self._writer.reopen()

    def close(self) -> None:
        """Write what is queued (2 s at most: call it at the very end) and close the file."""
        self._count_all_left_out()
        if self._writer is not None:
            self._writer.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _write_before(self, record: AuditRecord, line: Callable[[AuditRecord], str], recorded: Recorded) -> None:
        """Write a record before what it is about; `recorded` says how that goes on."""
        if self._writer is None:
            self.records += 1
            record.begin()
            recorded("")
            return
        waiting, failure, written = _Waiting(self, recorded), self.failure, False
        if not (failure and self.refuses):
            text, budget = line(record), record.subject.budget
            if budget is not None:
                budget.charge(text, time.monotonic())
                if budget.records_left_out:
                    self._count_left_out(budget)
            self.records += 1
            written = self._writer.put(text, None if failure else waiting)
            record.begin(written)
        if written and not failure:
            waiting.start()
        else:
            waiting.decide(failure or "its queue is full")

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
        if records and self._writer is not None:
            self.records += 1
            if not self._writer.put(left_out_line(budget.user, records, size)):
                self._writer.dropped += records - 1  # they are missing without a count of their own

    def _count_all_left_out(self) -> None:
        if self._left_out_timer is not None:
            self._left_out_timer.cancel()
            self._left_out_timer = None
        for budget in list(self._left_out):
            self._count_left_out(budget)


class _Waiting(Waiter):
    """A request that waits for its record."""

    __slots__ = ("_log", "_loop", "_recorded", "_timer")

    def __init__(self, log: AuditLog, recorded: Recorded) -> None:
        self._log = log
        self._recorded: Recorded | None = recorded
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Wait for the writer, STALL seconds at most."""
        self._timer = self._loop.call_later(STALL, self.decide, "it takes no data")

    def __call__(self, failure: str) -> None:
        """Called in the writer's thread."""
        try:
            self._loop.call_soon_threadsafe(self.decide, failure)
        except RuntimeError:  # the loop has ended, and the request with it
            return

    def decide(self, failure: str) -> None:
        """Let the request go on, or refuse it; once."""
        recorded, self._recorded = self._recorded, None
        if self._timer is not None:
            self._timer.cancel()
        if recorded is None:
            return
        if failure and self._log.refuses:
            self._log.refused += 1
            recorded(refusal_text(failure))
            return
        if failure:
            self._log.unrecorded += 1
        recorded("")


def check_policy(on_failure: str) -> None:
    """Raise ConfigError unless this is a policy for records that cannot be written."""
    if on_failure not in (CONTINUE, REFUSE):
        raise ConfigError(f'audit.on_failure: "{CONTINUE}" or "{REFUSE}" is needed')


def refusal_text(failure: str) -> str:
    """Return the sentence for the caller."""
    return (
        f"the agent cannot write its audit log ({failure}), and by its settings no request goes on unrecorded; "
        "tell the operator of this cluster's agent"
    )
