"""The audit log as a role sees it: `put_before` for what waits for its record, `put` for what has happened.

It decides what a log that cannot be written means: with `on_failure="refuse"` nothing that waits goes on, with
`"continue"` all goes on and what is missing is counted. It is used from one event loop. Invariant: with `"refuse"`,
what waited for its record and goes on has it in the file (handed to the kernel, and on the disk with `fsync`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import ClassVar, TypedDict

from arcbridge.audit.sinks.sender import Sinks
from arcbridge.audit.writer import AuditWriter, Waiter
from arcbridge.errors import ConfigError, StateError

STALL = 5.0
"""Seconds that a write may take, and that a request waits for its record: longer means that the disk hangs."""
ROUNDING = 0.001
"""Seconds by which uvloop's timers, of whole milliseconds, may be early: such a look would at once look again."""
CONTINUE, REFUSE = "continue", "refuse"

Recorded = Callable[[str], None]
"""Called once, in the event loop: what waits may go on (empty), or is refused for this reason."""


class LogOptions(TypedDict, total=False):
    """The arguments of `ChainedLog` that every role's log passes on."""

    on_failure: str
    fsync: bool
    instance: str
    sinks: Sinks


class ChainedLog:
    """Takes lines for a file (appended, mode 0600), for standard output (`-`), or for nothing (empty)."""

    refused_words: ClassVar[str]
    """The sentence for a caller whose request does not go on; `{}` is why the log cannot be written."""

    def __init__(
        self,
        file: str,
        *,
        on_failure: str = CONTINUE,
        fsync: bool = False,
        instance: str = "",
        sinks: Sinks | None = None,
    ) -> None:
        """Open the file at once. Raises ConfigError."""
        check_policy(on_failure)
        self.sinks = sinks or Sinks()
        """What carries the records on, once the role starts them."""
        self.refuses = on_failure == REFUSE
        """Whether what waits is refused while records cannot be written."""
        self.records = 0
        """Records made, of every stage."""
        self.unrecorded = 0
        """What went on before its record was written; always 0 where `refuses` is set."""
        self.refused = 0
        """What was refused because its record could not be written."""
        self._undecided: deque[_Waiting] = deque()
        """What waits for its record, in order; what was decided meanwhile is among it."""
        self._look_timer: asyncio.TimerHandle | None = None
        self._writer: AuditWriter | None = None
        if not file:
            return
        try:
            self._writer = AuditWriter(file, instance=instance, fsync=fsync, rotation=self.sinks.rotation)
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
        """Return the sentence for what must not go on now; empty where all goes on."""
        if not self.refuses or not (failure := self.failure):
            return ""
        self.refused += 1
        return self.refused_words.format(failure)

    def unready(self) -> str | None:
        """Return a reason, for the readiness check, only where requests are refused."""
        failure = self.failure if self.refuses else ""
        return f"the audit log cannot be written: {failure}" if failure else None

    # -- lines ----------------------------------------------------------------------------------------------------

    def put(self, line: str) -> bool:
        """Queue a line; never waits. False where there was no room: it is counted."""
        self.records += 1
        return self._writer is None or self._writer.put(line)

    def put_before(self, line: Callable[[], str], recorded: Recorded, begun: Callable[[bool], None]) -> None:
        """Write a line before what it is about: `begun` says at once whether it was queued, `recorded` says later how
        that goes on, perhaps at once."""
        if self._writer is None:
            self.records += 1
            begun(True)
            recorded("")
            return
        waiting, failure, written = _Waiting(self, recorded), self.failure, False
        if not (failure and self.refuses):
            text = line()
            self.records += 1
            written = self._writer.put(text, None if failure else waiting)
            begun(written)
        if written and not failure:
            self._watch(waiting)
        else:
            waiting.decide(failure or "its queue is full")

    async def put_or_fail(self, line: str) -> None:
        """Write a line. Raises StateError unless it is in the file, whatever a failure means for what waits."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[str] = loop.create_future()

        def written(failure: str) -> None:
            loop.call_soon_threadsafe(lambda: None if done.done() else done.set_result(failure))

        self.records += 1
        if self._writer is None or self.failure or not self._writer.put(line, written):
            raise StateError(f"the audit log cannot be written: {self.failure or 'its queue is full'}")
        if failure := await done:
            raise StateError(f"the audit log cannot be written: {failure}")

    async def put_and_wait(self, line: Callable[[], str]) -> None:
        """Write a line, and wait until that is done. Raises StateError where it is not written, and must be."""
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.put_before(line, lambda refusal: None if done.done() else done.set_result(refusal), lambda _: None)
        if refusal := await done:
            raise StateError(refusal)

    def reopen(self) -> None:
        """Leave a file that was renamed for a new one of its name, at once."""
        if self._writer is not None:
            self._writer.reopen()

    def close(self) -> None:
        """Write what is queued (2 s at most: call it at the very end) and close the file."""
        if self._look_timer is not None:
            self._look_timer.cancel()
        if self._writer is not None:
            self._writer.close()

    def _watch(self, waiting: _Waiting) -> None:
        """Let it wait for the writer, STALL seconds at most; one timer for all."""
        while self._undecided and self._undecided[0].recorded is None:
            self._undecided.popleft()
        self._undecided.append(waiting)
        if self._look_timer is None:
            self._look_timer = waiting.loop.call_later(STALL, self._look)

    def _look(self) -> None:
        self._look_timer, now = None, time.monotonic()
        overdue = []
        while self._undecided:
            first = self._undecided[0]
            left = first.since + STALL - now
            if left > 0.0 and first.recorded is not None:
                self._look_timer = first.loop.call_later(left + ROUNDING, self._look)
                break
            overdue.append(self._undecided.popleft())
        for one in overdue:  # behind the timer: what is called may raise, or have its next record wait
            try:
                one.decide("it takes no data")
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                one.loop.call_exception_handler({"message": "what waited for its record failed", "exception": error})


class _Waiting(Waiter):
    """What waits for its record."""

    __slots__ = ("_log", "loop", "recorded", "since")

    def __init__(self, log: ChainedLog, recorded: Recorded) -> None:
        self._log = log
        self.recorded: Recorded | None = recorded
        """None once it goes on, or was refused."""
        self.loop = asyncio.get_running_loop()
        self.since = time.monotonic()

    def __call__(self, failure: str) -> None:
        """Called in the writer's thread."""
        try:
            self.loop.call_soon_threadsafe(self.decide, failure)
        except RuntimeError:  # the loop has ended, and what waits with it
            return

    def decide(self, failure: str) -> None:
        """Let it go on, or refuse it; once."""
        recorded, self.recorded = self.recorded, None
        if recorded is None:
            return
        if failure and self._log.refuses:
            self._log.refused += 1
            recorded(self._log.refused_words.format(failure))
            return
        if failure:
            self._log.unrecorded += 1
        recorded("")


def check_policy(on_failure: str) -> None:
    """Raise ConfigError unless this is a policy for records that cannot be written."""
    if on_failure not in (CONTINUE, REFUSE):
        raise ConfigError(f'audit.on_failure: "{CONTINUE}" or "{REFUSE}" is needed')
