"""Sends what an audit log's file has to one collector, batch after batch, in a thread and an event loop of its own.

A collector that is slow or away holds up this thread alone. A batch is sent again until the collector has it; how far a
sink has got is kept on disk behind each batch, so that a restart repeats one batch at most. Of several processes that
share a file one sends. Invariants: records arrive in the order of the file; one that is given up is counted in the
chain before the sink goes on behind it; a collector that refuses everything makes no log grow on which nothing else is
recorded.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import structlog

from arcbridge.audit.chain import Head, timestamp
from arcbridge.audit.rotation import FileRotation, RotationBounds
from arcbridge.audit.sinks.collector import HTTP, SYSLOG, RecordsRefused, Transport
from arcbridge.audit.sinks.tail import (
    EVENT,
    Batch,
    LogFiles,
    LogRecord,
    LostRecords,
    Position,
    lock_file,
    lost_with,
    position_file,
    read_position,
    write_position,
)
from arcbridge.errors import ArcbridgeError, StateError
from arcbridge.net.backoff import Backoff
from arcbridge.observe.queued_writer import GATHER
from arcbridge.observe.untrusted_text import clean
from arcbridge.pki.private_files import remove_replacements, try_lock
from arcbridge.settings.config import AuditFilesConfig, AuditSinkConfig
from arcbridge.tasks import in_time

FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Bounds of the first and of the longest pause after failures, in seconds."""
MOST_PATIENCE: Final = 300
"""Seconds that a collector may ask for with Retry-After."""
REFUSALS: Final = 5
"""Times that a collector refuses one and the same record before that is given up."""
REFUSED_AGAIN: Final = 5.0
"""Seconds between these times at least: a collector that refuses everything by mistake costs three records a minute at
most until that is seen."""
FLUSH: Final = 3.0
"""Seconds at the end of the process for what is not delivered; a restart goes on with the rest."""
LATE: Final = 900.0
"""Seconds from which on an undelivered record makes the self-check warn."""
_STDOUT: Final = 1
_ANSWERED: Final = 15.0
"""Seconds for the record that counts what is lost."""

log = structlog.get_logger("arcbridge.audit")

Record = Callable[[str], "Future[None]"]
"""Has a line recorded; the result is there once it is written."""


class SinkSender:
    """One sink. Its thread writes its attributes, but what the writer's thread counts; metrics and checks read them."""

    def __init__(self, name: str, settings: AuditSinkConfig, path: Path, transport: Transport) -> None:
        self.name = name
        self.delivered = 0
        self.dropped = 0
        """Records that were given up."""
        self.failures = 0
        """Batches that were not delivered."""
        self.failure = ""
        """Why records are not delivered now; empty while they are."""
        self.readable = True
        """Whether the log's files could be read at the last look."""
        self.last_success = 0.0
        """Unix time at which everything there was had been delivered last, or a batch was."""
        self.waiting_bytes = 0
        """Bytes of the file and its rotated ones that are not delivered."""
        self._oldest = ""
        """The time of the oldest record that is not delivered; empty: there is none."""
        self._settings = settings
        self._path = path
        self._transport = transport
        self.counted: Head | None = None
        """The last record of the files that the role has removed and counted itself; written by the writer's thread."""
        self._most = settings.batch_records
        """Records of the next batch: fewer after a refusal, to find the one that is refused."""
        self._refused = 0
        """Times that the next record was refused alone."""
        self._position: Position | None = None
        """None while another process sends, or before the first look."""
        self._files = LogFiles(path)
        self._unsaved = ""
        """Why the position could not be kept."""
        self._closing = threading.Event()
        self._wake: Callable[[], object] = lambda: None
        self._record: Record | None = None
        self._thread = threading.Thread(target=self._run, name=f"audit-sink-{name}", daemon=True)

    @property
    def lag(self) -> float:
        """Seconds since the oldest record that is not delivered was made; 0 where there is none."""
        try:
            return max(0.0, time.time() - datetime.fromisoformat(self._oldest).timestamp()) if self._oldest else 0.0
        except ValueError:
            return 0.0

    def start(self, record: Record) -> None:
        """Begin to send. `record` is for what is lost."""
        self._record = record
        self._thread.start()

    def close(self) -> None:
        """Have the thread deliver what is there and end, at its first failure at the latest."""
        self._closing.set()
        self._wake()

    def join(self, seconds: float) -> bool:
        """Wait for the end; return whether the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        loop, wake = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.is_closed() or loop.call_soon_threadsafe(wake.set)
        backoff = Backoff(first=FIRST_DELAY, cap=LONGEST_DELAY)
        lock: int | None = None
        try:
            while True:
                wait = self._settings.interval
                try:
                    if lock is None and (lock := try_lock(lock_file(self._path, self.name))) is not None:
                        remove_replacements(position_file(self._path, self.name))
                    found, more = await self.step() if lock is not None else (0, False)
                except Exception as error:
                    wait = self._failed(error, backoff)
                    if self._closing.is_set():
                        return
                else:
                    backoff.reset()
                    if self._closing.is_set() and not found:
                        return
                    wait = 0.0 if more else wait
                if not self._closing.is_set() and wait:
                    await in_time(wake.wait(), wait)
        finally:
            await self._transport.close()
            self._files.close()
            if lock is not None:
                os.close(lock)

    async def step(self) -> tuple[int, bool]:
        """Deliver one batch; return how many records it had, and whether more wait. Raises what reading and delivering
        raise."""
        if self._position is None:
            self._position = read_position(self._path, self.name)
        position = self._position
        self.readable = False
        try:
            batch = self._files.read(position, self._most, self._settings.batch_bytes, self.counted)
        except OSError as error:
            self._oldest = self._oldest or timestamp()  # what is there is not known; it is late from now on
            reason = error.strerror or type(error).__name__
            raise StateError(f"{error.filename or self._path} cannot be read: {reason}") from error
        self.readable = True
        self.waiting_bytes = batch.waiting
        if batch.records:
            self._oldest = str(batch.records[0].sealed.fields.get("ts", ""))
        elif not self._oldest and batch.waiting:
            self._oldest = timestamp()
        if batch.missing is not None:
            count, last, at_least = batch.missing
            behind = f"{position.chain}/{position.sequence}"
            await self._lose(LostRecords(self.name, count, behind, last, "their files are gone", at_least))
            self._move(batch.begin)  # so that they are counted once
        end = await self._send(batch) if batch.records else batch.end
        self._move(end)
        size = sum(len(one.text) + 1 for one in batch.records)
        self.waiting_bytes = max(0, batch.waiting - size)
        if not self.waiting_bytes:
            self._oldest = ""
        self._succeeded(len(batch.records))
        # What waits in further files without a record here is in one that may still be written: no reason to hurry.
        return len(batch.records), bool(batch.records and self.waiting_bytes)

    async def _send(self, batch: Batch) -> Position:
        """Deliver a batch, or give up its one record; return where to go on. Raises where it is to be tried again."""
        records = batch.records
        try:
            async with asyncio.timeout(self._settings.timeout):
                await self._transport.send(records)
        except RecordsRefused as error:
            if len(records) > 1:
                self._most = max(1, len(records) // 2)
                raise _Smaller(error.message) from error
            self._refused += 1
            if self._refused < REFUSALS or (refused := self._refused_behind(batch)) is None:
                raise
            await self._lose(_given_up(self.name, refused.records, error.message))
            batch = refused
        else:
            self.delivered += len(records)
        self._refused = 0
        self._most = min(self._settings.batch_records, self._most * 2)
        return batch.end

    def _refused_behind(self, batch: Batch) -> Batch | None:
        """Return what is given up with the one record of a batch; None: it is tried further.

        A record that counts lost ones is a reason for no other one: those that stand together are given up together,
        once something else is behind them.
        """
        begin, most = batch.begin, self._settings.batch_bytes
        found = self._files.read(begin, self._settings.batch_records, most)
        counts = list(itertools.takewhile(_counts_lost, found.records))
        if not counts:
            return batch
        size = sum(len(one.text) + 1 for one in counts)
        return None if found.waiting <= size else self._files.read(begin, len(counts), most)

    async def _lose(self, lost: LostRecords) -> None:
        """Count records in the chain. Raises where that is not possible now: then they are lost later."""
        if self._record is None or self._closing.is_set():
            raise ArcbridgeError("the process ends before lost records are counted")
        async with asyncio.timeout(_ANSWERED):
            await asyncio.wrap_future(self._record(lost.line()))
        self.dropped += lost.records - lost.counted

    def _move(self, position: Position) -> None:
        if position == self._position:
            return
        self._position, was = position, self._unsaved
        try:
            write_position(self._path, self.name, position)
            self._unsaved = ""
        except OSError as error:
            # What was delivered since comes again after a restart; nothing is missing.
            self._unsaved = error.strerror or type(error).__name__
            if not was:
                log.warning("audit sink's position not kept", sink=self.name, reason=self._unsaved)

    def _succeeded(self, records: int) -> None:
        self.last_success = time.time()
        if self.failure:
            self.failure = ""
            log.info("audit sink delivers again", sink=self.name, records=records)

    def _failed(self, error: Exception, backoff: Backoff) -> float:
        """Note a failure; return the seconds to the next attempt."""
        if isinstance(error, _Smaller):
            return 0.0
        self.failures += 1
        was, self.failure = self.failure, clean(words_of(error), 400)
        if not was:
            expected = isinstance(error, ArcbridgeError | OSError | EOFError)
            log.warning("audit sink failing", sink=self.name, reason=self.failure, exc_info=not expected)
        hint = float(error.retry_after or 0) if isinstance(error, ArcbridgeError) else 0.0
        if isinstance(error, RecordsRefused):
            hint = max(hint, REFUSED_AGAIN)
        return backoff.next_delay(hint=min(hint, MOST_PATIENCE))


class Sinks:
    """All sinks of one audit log, and what renames its file; neither without settings."""

    def __init__(self, settings: AuditFilesConfig | None = None, path: Path = Path(), role: str = "") -> None:
        """Raises ConfigError."""
        settings = settings or AuditFilesConfig()
        bounds = RotationBounds(settings.rotate_bytes, settings.keep_bytes, settings.keep_age)
        self._path = path
        self.senders = [SinkSender(name, one, path, _transport(one, role)) for name, one in settings.sinks.items()]
        self.rotation = FileRotation(bounds, self.lost)

    def start(self, put: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """Begin to send; `put` records a line, in the event loop that runs now, and waits until it is written."""
        loop = asyncio.get_running_loop()
        for sender in self.senders:
            sender.start(lambda line: asyncio.run_coroutine_threadsafe(put(line), loop))

    def lost(self, removed: Iterable[Path]) -> list[str]:
        """Return the records that count what files hold which are about to be removed and were not delivered."""
        found = lost_with(self._path, removed, [sender.name for sender in self.senders])
        for sender in self.senders:
            for one in found:
                if one.sink == sender.name:
                    sender.dropped += one.records - one.counted
                    sender.counted = one.last
        return [one.line() for one in found]

    def close(self) -> None:
        """Deliver what is written, FLUSH seconds at most: call it once the log is closed."""
        until = time.monotonic() + FLUSH
        for sender in self.senders:
            sender.close()
        for sender in self.senders:
            if not sender.join(until - time.monotonic()):
                log.warning("audit sink not at its end", sink=sender.name, reason="the collector takes its time")


class StdoutTransport:
    """Writes lines to standard output, for what collects a pod's output; a role's own log goes to standard error. Where
    the output takes nothing, the thread hangs in the write until the process ends."""

    def __init__(self) -> None:
        self._torn = False
        """A batch broke off: perhaps in the middle of a line, which must not run into the next one."""

    async def send(self, records: Sequence[LogRecord]) -> None:
        data = b"\n" * self._torn + b"".join(record.text + b"\n" for record in records)
        self._torn = True
        while data:
            try:
                data = data[os.write(_STDOUT, data) :]
            except BlockingIOError:  # another process has made it non-blocking
                await asyncio.sleep(GATHER)
        self._torn = False

    async def close(self) -> None:
        return


class _Smaller(Exception):
    """A batch was refused, and a part of it is tried."""


def _transport(settings: AuditSinkConfig, role: str) -> Transport:
    if settings.kind == HTTP:
        from arcbridge.audit.sinks.http import HttpTransport

        return HttpTransport(settings)
    if settings.kind == SYSLOG:
        from arcbridge.audit.sinks.syslog import SyslogTransport

        return SyslogTransport(settings, role)
    return StdoutTransport()


def _counts_lost(record: LogRecord) -> bool:
    return record.sealed.fields.get("event") == EVENT


def _given_up(sink: str, records: Sequence[LogRecord], reason: str) -> LostRecords:
    own = (one.sealed.fields for one in records if _counts_lost(one) and one.sealed.fields.get("sink") == sink)
    counted = sum(number for fields in own if isinstance(number := fields.get("records"), int))
    last = records[-1].sealed.head
    return LostRecords(sink, len(records) + counted, "", last, f"it is refused: {reason}", counted=counted)


def words_of(error: Exception) -> str:
    """Return why a delivery failed, in few words."""
    if isinstance(error, ArcbridgeError):
        return error.message
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror if isinstance(error, OSError) else "") or type(error).__name__
