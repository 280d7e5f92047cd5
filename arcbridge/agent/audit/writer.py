"""Writes sealed lines to a file or to standard output, in a thread of its own.

The event loop puts lines into a bounded queue and never waits. A line may have a `Waiter`, which is told once the line
was written (and has reached the disk, with `fsync`) or could not be. Lines that were refused by the disk are kept and
tried again each second; lines for which the queue has no room are counted, and a record says how many they are as soon
as there is room. A file that was renamed away (logrotate) is left for a new one of its name.

Invariants: a line is sealed once, in the order of writing; what is behind a line that could not be written is not
written before it.
"""

from __future__ import annotations

import collections
import hashlib
import os
import stat
import threading
import time
from typing import Protocol

import structlog

from arcbridge.agent.audit.chain import Chain, Head, read_line
from arcbridge.agent.audit.record import timestamp

QUEUE_CHARACTERS = 4 * 1024 * 1024
"""Characters that wait for a stalled or full disk: some ten thousand records."""
GATHER = 0.02
"""Seconds for which lines gather behind those that were written: woken for each, the thread would take the interpreter
from the event loop as often as there are requests. A line with a waiter does not wait for it to pass."""
RETRY = 1.0
"""Seconds between two attempts to write what the disk refused, and between two looks for a rotation."""
CLOSE_WAIT = 2.0
"""Seconds that the end of the process waits for a disk which does not take the last lines."""
HEAD_INTERVAL = 60.0
"""Seconds between two log lines with the chain's head, while records are written."""
_TAIL = 64 * 1024
"""Bytes at the end of a file in which its last line is looked for; a line has less than half of that."""
_STDOUT = 1

_log = structlog.get_logger("arcbridge.agent")


class Waiter(Protocol):
    """Is told of one line; called in the writer's thread."""

    def __call__(self, failure: str) -> None:
        """The line was written (`failure` empty), or the disk refused it for now."""


class AuditWriter:
    """The thread that writes, and its queue. `put` and `close` are called by one thread, the event loop's."""

    def __init__(self, file: str, *, instance: str = "", fsync: bool = False, queue: int = QUEUE_CHARACTERS) -> None:
        """Open the file (`-`: standard output) and begin its chain. Raises OSError."""
        self._name = file
        self._file = "" if file == "-" else file
        self._instance = instance
        self._fsync = fsync
        self._queue = queue
        self._gather_below = queue // 2
        """Lines gather while fewer characters than this wait."""
        self._lines: collections.deque[tuple[str, Waiter | None]] = collections.deque()
        self._entered = 0
        """Characters that were put into the queue since the start; the event loop's alone to change."""
        self._left = 0
        """Characters that have left it; the thread's alone to change."""
        self.dropped = 0
        """Records for which the queue had no room, since the start."""
        self._reported = 0
        """Those of them that a record has told of; the thread's alone to change."""
        self.failure = ""
        """Why nothing can be written now; empty while all is well."""
        self.failures = 0
        """Times that writing began to fail."""
        self.writing_since = 0.0
        """When the write that is under way began, monotonic seconds; 0 between two writes."""
        self._idle = False
        """The thread waits for the next line; while lines gather it is not woken for one."""
        self._closing = False
        self._look = False
        """The file's name is to be looked at now."""
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._held: list[str] = []
        """Lines that have left the queue and are not sealed yet."""
        self._held_characters = 0
        """Characters of lines that have left the queue and are not written yet."""
        self._pending = bytearray()
        """Sealed lines that are not written yet. It begins with the rest of a line where `_part` is not empty."""
        self._part = b""
        """What the file has of the first pending line already."""
        self._position = 0
        """Where the file ended after the last write."""
        self._looked_at = 0.0
        """When the file's name was looked at last, monotonic seconds."""
        self._ended = False
        """The last record of this file is sealed."""
        self._told: Head | None = None
        """The head that the log was told last."""
        self._told_at = 0.0
        """When that was, monotonic seconds."""
        self._descriptor = _STDOUT
        self._regular = False
        """The target is a file, and no pipe, terminal or device."""
        self._chain = Chain()
        self._begin("started", None)
        self._thread = threading.Thread(target=self._run, name="arcbridge-audit", daemon=True)
        self._thread.start()

    # -- called by the event loop ---------------------------------------------------------------------------------

    def put(self, line: str, waiter: Waiter | None = None) -> bool:
        """Queue one line; never waits. False where there is no room: the line is counted, and the waiter not called."""
        size = len(line)
        waiting = self._entered - self._left + size
        if waiting > self._queue or self._closing:
            self.dropped += 1
            return False
        self._entered += size
        self._lines.append((line, waiter))
        if self._idle or waiter is not None or waiting > self._gather_below:
            self._wake.set()
        return True

    def reopen(self) -> None:
        """Look for a rotation now, also where nothing is to be written."""
        self._look = True
        self._wake.set()

    def close(self) -> None:
        """Write what is queued (2 s at most) and close the file. The log says what is lost then."""
        self._closing = True
        self._stop.set()
        self._wake.set()
        self._thread.join(CLOSE_WAIT)
        if self._thread.is_alive():
            _log.warning("audit records lost", file=self._name, reason="it takes no data")

    @property
    def head(self) -> Head:
        """The record that was sealed last."""
        return self._chain.head

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            # A defect: without this, requests would go on and nothing would tell that they are not recorded.
            self.failure = f"the writer failed ({type(error).__name__})"
            raise

    def _serve(self) -> None:
        while True:
            if not (self._lines or self._held or self._pending or self.dropped != self._reported):
                self._wait()
            self._wake.clear()
            closing = self._closing  # before the queue is looked at: what was put before `close` is written
            if self._write():
                if closing:
                    break
                self._tell_head(HEAD_INTERVAL)
                if self._entered - self._left <= self._gather_below:
                    self._wake.wait(GATHER)
            elif closing:
                break
            else:
                self._stop.wait(RETRY)
        self._end()

    def _wait(self) -> None:
        """Wait for a line; a head that the log does not know yet is told in time."""
        self._idle = True
        if not self._lines and not self._closing and not self._look:
            told = self._told == self._chain.head
            left = None if told else max(0.0, self._told_at + HEAD_INTERVAL - time.monotonic())
            if not self._wake.wait(left):
                self._tell_head(0.0)
        self._idle = False

    def _write(self) -> bool:
        """Write all that there is, tell the waiters, and say whether it was written."""
        was, self.writing_since = self.failure, time.monotonic()
        waiters: list[Waiter] = []
        try:
            self._write_pending()  # what was refused before
            self._follow_rotation()
            self._take(waiters)
            self._seal()
            self._write_pending()
        except OSError as error:
            self._keep_whole_lines()
            self.failures += not was
            self.failure = error.strerror or type(error).__name__
            self._take(waiters)
        else:
            self.failure = ""
            self._left += self._held_characters
            self._held_characters = 0
        self.writing_since = 0.0
        for waiter in waiters:
            waiter(self.failure)
        if self.failure and not was:
            _log.warning("audit log cannot be written", file=self._name, reason=self.failure)
        elif was and not self.failure:
            _log.warning("audit log is written again", file=self._name, lost=self.dropped - self._reported)
        return not self.failure

    def _take(self, waiters: list[Waiter]) -> None:
        """Take the lines out of the queue; adds those who wait for them."""
        while self._lines:
            line, waiter = self._lines.popleft()
            self._held.append(line)
            self._held_characters += len(line)
            if waiter is not None:
                waiters.append(waiter)

    def _seal(self) -> None:
        if self.dropped != self._reported and not self.failure:
            missing, self._reported = self.dropped - self._reported, self.dropped
            self._held.append(f'{{"ts":"{timestamp()}","event":"audit-lost","records":{missing}}}')
        if self._held:
            seal = self._chain.seal
            self._pending += b"\n".join([*[seal(line) for line in self._held], b""])
            self._held.clear()

    def _write_pending(self) -> None:
        wrote = bool(self._pending)
        while self._pending:
            try:
                count = os.write(self._descriptor, self._pending)
            except BlockingIOError:  # standard output that another process has made non-blocking
                if self._closing:
                    raise
                time.sleep(GATHER)
                continue
            end = self._pending.rfind(b"\n", 0, count) + 1
            self._part = bytes(self._pending[end:count]) if end else self._part + bytes(self._pending[:count])
            self._position += count
            del self._pending[:count]
        if wrote and self._fsync and self._regular:
            os.fdatasync(self._descriptor)

    def _keep_whole_lines(self) -> None:
        """Take a line out of the file of which the disk took a part only: what follows may go to another file.

        Not where another process has written behind it, and not to a pipe: there the rest follows when there is room.
        """
        if not self._part or not self._regular:
            return
        try:
            if os.fstat(self._descriptor).st_size != self._position:
                return
            os.ftruncate(self._descriptor, self._position - len(self._part))
        except OSError:
            return
        self._position -= len(self._part)
        self._pending[:0] = self._part
        self._part = b""

    def _end(self) -> None:
        """The thread's last act."""
        lost = len(self._held) + self._pending.count(b"\n")
        if not self.failure:
            self._close_chain("stopped")
            try:
                self._write_pending()
            except OSError as error:
                self.failure = error.strerror or type(error).__name__
        if lost:
            self.dropped += lost
            _log.warning("audit records lost", file=self._name, records=lost, reason=self.failure)
        if self._file:
            os.close(self._descriptor)

    # -- the file -------------------------------------------------------------------------------------------------

    def _begin(self, cause: str, before: Head | None) -> None:
        """Open the file and begin its chain, behind `before` or behind the line that stands there."""
        if self._file:
            self._descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        status = os.fstat(self._descriptor)
        self._regular = stat.S_ISREG(status.st_mode) and bool(self._file)
        self._position, self._part, self._ended = status.st_size, b"", False
        self._looked_at = time.monotonic()
        self._begin_chain(cause, before)

    def _begin_chain(self, cause: str, before: Head | None) -> None:
        last, torn = _last_line(self._file, self._position) if self._regular else (None, 0)
        self._chain = Chain()
        line = self._chain.begin(cause, self._instance, before or last, torn)
        self._pending += b"\n" * bool(torn) + line + b"\n"

    def _follow_rotation(self) -> None:
        """Leave a file that was renamed or removed for a new one; begin a chain anew in one that was cut."""
        now = time.monotonic()
        if not self._file or (now - self._looked_at < RETRY and not self._ended and not self._look):
            self._look = False
            return
        self._looked_at, self._look = now, False
        try:
            named = os.stat(self._file)
        except FileNotFoundError:
            named = None
        status = os.fstat(self._descriptor)
        if named is None or (named.st_dev, named.st_ino) != (status.st_dev, status.st_ino):
            if not self._ended:
                self._close_chain("rotated")
            self._write_pending()
            left = self._descriptor
            self._begin("rotated", self._chain.head)
            os.close(left)
        elif self._regular and status.st_size < self._position:
            _log.warning("audit log was cut", file=self._name, reason="it is shorter than what was written to it")
            self._position = status.st_size
            self._begin_chain("cut", self._chain.head)

    def _close_chain(self, cause: str) -> None:
        """Seal the last record of a file: it shows that nothing behind it is missing."""
        self._pending += self._chain.seal(f'{{"ts":"{timestamp()}","event":"chain-end","cause":"{cause}"}}') + b"\n"
        self._ended = True
        self._tell_head(0.0)

    def _tell_head(self, interval: float) -> None:
        """Tell the log the chain's head, at most once in `interval` seconds: kept elsewhere, it shows a cut tail."""
        head, now = self._chain.head, time.monotonic()
        if head != self._told and now - self._told_at >= interval:
            self._told, self._told_at = head, now
            _log.info("audit head", chain=head.chain, record=head.sequence, hash=head.hash)


def _last_line(file: str, size: int) -> tuple[Head | None, int]:
    """Read the last whole line of a file, and the bytes behind it that have no line end. Raises OSError."""
    with open(file, "rb") as opened:
        opened.seek(max(0, size - _TAIL))
        tail = opened.read(_TAIL)
    whole, end, torn = tail.rpartition(b"\n")
    if not end:
        return None, len(torn)
    line = whole.rpartition(b"\n")[2]
    sealed = read_line(line)
    return sealed.head if sealed is not None else Head("", -1, hashlib.sha256(line).hexdigest()), len(torn)
