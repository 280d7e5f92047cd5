"""Writes sealed lines to a file or to standard output, in a thread of its own (`observe.queued_writer`).

A line may have a `Waiter`, which is called once the line was written (and has reached the disk, with `fsync`) or could
not be. Lines that were refused by the disk are kept and tried again each second; lines for which the queue has no room
are counted, and a record says how many they are as soon as there is room. A file that was renamed away (logrotate) is
left for a new one of its name.

Invariants: a line is sealed once, in the order of writing; what is behind a line that could not be written is not
written before it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from arcbridge.audit.chain import Chain, Head, read_line, timestamp
from arcbridge.audit.rotation import FileRotation, RotationBounds
from arcbridge.observe.queued_writer import CLOSE_WAIT, GATHER, QUEUE, RETRY, QueuedWriter

HEAD_INTERVAL = 60.0
"""Seconds between two log lines with the chain's head, while records are written."""
_TAIL = 64 * 1024
"""Bytes at the end of a file in which its last line is looked for; a line has less than half of that."""
_STDOUT = 1

log = structlog.get_logger("arcbridge.audit")


class Waiter(Protocol):
    """Is told of one line; called in the writer's thread."""

    def __call__(self, failure: str) -> None:
        """The line was written (`failure` empty), or the disk refused it for now."""


class AuditWriter(QueuedWriter[tuple[str, Waiter | None]]):
    """The queue of one file, and what its writing has come to. `put` and `close` are called by the event loop alone."""

    def __init__(
        self,
        file: str,
        *,
        instance: str = "",
        fsync: bool = False,
        queue: int = QUEUE,
        rotation: FileRotation | None = None,
    ) -> None:
        """Open the file (`-`: standard output) and begin its chain. Raises OSError."""
        super().__init__(queue)
        self._rotation = rotation or FileRotation(RotationBounds())
        self._name = file
        self.failure = ""
        """Why nothing can be written now; empty while all is well."""
        self.failures = 0
        """Times that writing began to fail."""
        self.writing_since = 0.0
        """When the write that is under way began, monotonic seconds; 0 between two writes."""
        self._look = False
        """The file's name is to be looked at now."""
        self._held: list[str] = []
        """Lines that have left the queue and are not sealed yet."""
        self._logged: Head | None = None
        """The head that was logged last."""
        self._logged_at = 0.0
        """When that was, monotonic seconds."""
        self._file = SealedFile(
            "" if file == "-" else file,
            instance,
            fsync,
            self._rotation,
            closing=lambda: self._closing,
            on_end=self._log_head,
        )
        self._start("arcbridge-audit")

    # -- called by the event loop ---------------------------------------------------------------------------------

    def put(self, line: str, waiter: Waiter | None = None) -> bool:
        """Queue one line; never waits. False where there is no room: the line is counted, and the waiter not called."""
        return self._put((line, waiter), len(line), urgent=waiter is not None)

    def reopen(self) -> None:
        """Look for a rotation now, also where nothing is to be written."""
        self._look = True
        self._wake()

    def close(self) -> None:
        """Write what is queued (2 s at most) and close the file. The log says what is lost then."""
        if not self._end(CLOSE_WAIT):
            log.warning("audit records lost", file=self._name, reason="it takes no data")

    @property
    def head(self) -> Head:
        """The record that was sealed last."""
        return self._file.chain.head

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            super()._run()
            self._finish()
        except BaseException as error:
            # A defect: without this, what is to be recorded would go on, and nothing would tell that it is not.
            self.failure = f"the writer failed ({type(error).__name__})"
            raise

    def _wanted(self) -> bool:
        return bool(self._queue or self._look or self._held or self._file.pending) or self.dropped != self._reported

    def _patience(self) -> float | None:
        """Return the seconds until a head that the log does not know yet is logged."""
        return None if self._logged == self.head else max(0.0, self._logged_at + HEAD_INTERVAL - time.monotonic())

    def _idled(self) -> None:
        self._log_head()

    def _write(self, lines: list[tuple[str, Waiter | None]]) -> bool:
        """Write all that there is, call the waiters, and return whether it was written."""
        now = time.monotonic()
        was, self.writing_since = self.failure, now
        self._held += [line for line, _ in lines]
        look, self._look = self._look, False
        surplus, counted = self._rotation.surplus(self._name)
        self._held += counted
        try:
            if self._file.pending:
                self._file.write()  # what was refused before
            self._file.follow_rotation(look)
            self._seal()
            self._file.write()
            if surplus:
                self._rotation.remove(surplus)
        except OSError as error:
            self._file.keep_whole_lines()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._rotation.remove(surplus)  # else there would never be room; what they had is counted with the next
            self.failures += not was
            self.failure = error.strerror or type(error).__name__
        else:
            self.failure = ""
        self.writing_since = 0.0
        for _, waiter in lines:
            if waiter is not None:
                waiter(self.failure)
        if self.failure and not was:
            log.warning("audit log cannot be written", file=self._name, reason=self.failure)
        elif was and not self.failure:
            log.warning("audit log is written again", file=self._name, lost=self.dropped - self._reported)
        if not self.failure and now - self._logged_at >= HEAD_INTERVAL:
            self._log_head()
        return not self.failure

    def _seal(self) -> None:
        if self.dropped != self._reported and not self.failure:
            missing, self._reported = self.dropped - self._reported, self.dropped
            self._held.append(f'{{"ts":"{timestamp()}","event":"audit-lost","records":{missing}}}')
        self._file.seal(self._held)
        self._held.clear()

    def _finish(self) -> None:
        """Close the file: the thread's last act."""
        lost = len(self._held) + self._file.pending.count(b"\n")
        if not self.failure:
            self._file.end("stopped")
            try:
                self._file.write()
            except OSError as error:
                self.failure = error.strerror or type(error).__name__
        if lost:
            self.dropped += lost
            log.warning("audit records lost", file=self._name, records=lost, reason=self.failure)
        self._file.close()

    def _log_head(self) -> None:
        """Log the chain's head, unless it was: kept elsewhere, it shows a cut tail."""
        head = self.head
        if head != self._logged:
            self._logged, self._logged_at = head, time.monotonic()
            log.info("audit head", chain=head.chain, record=head.sequence, hash=head.hash)


class SealedFile:
    """A file, or standard output, with the chain of its lines: what is sealed is written in order, or kept here.

    Every method may raise OSError, but `seal` and `keep_whole_lines`.
    """

    def __init__(
        self,
        path: str,
        instance: str,
        fsync: bool,
        rotation: FileRotation,
        *,
        closing: Callable[[], bool],
        on_end: Callable[[], None],
    ) -> None:
        """`path` empty: standard output, for which no write waits while `closing`. `on_end` is called when the last
        record of a file is sealed."""
        self._path = path
        self._instance = instance
        self._fsync = fsync
        self._rotation = rotation
        self._closing = closing
        self._on_end = on_end
        self.pending = bytearray()
        """Sealed lines that are not written yet. It begins with the rest of a line where `_part` is not empty."""
        self._part = b""
        """What the file has of the first pending line already."""
        self._position = 0
        """Where the file ended after the last write."""
        self._looked_at = 0.0
        """When the file's name was looked at last, monotonic seconds."""
        self._ended = False
        """The last record of this file is sealed."""
        self._descriptor = _STDOUT
        self._regular = False
        """The target is a file, and no pipe, terminal or device."""
        self.chain = Chain()
        self._begin("started", None)

    def seal(self, lines: list[str]) -> None:
        """Seal these lines, in this order."""
        seal = self.chain.seal
        self.pending += b"\n".join([*map(seal, lines), b""]) if lines else b""

    def write(self) -> None:
        """Write what is pending."""
        wrote = bool(self.pending)
        while self.pending:
            try:
                count = os.write(self._descriptor, self.pending)
            except BlockingIOError:  # standard output that another process has made non-blocking
                if self._closing():
                    raise
                time.sleep(GATHER)
                continue
            end = self.pending.rfind(b"\n", 0, count) + 1
            self._part = bytes(self.pending[end:count]) if end else self._part + bytes(self.pending[:count])
            self._position += count
            del self.pending[:count]
        if wrote and self._fsync and self._regular:
            os.fdatasync(self._descriptor)

    def keep_whole_lines(self) -> None:
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
        self.pending[:0] = self._part
        self._part = b""

    def _begin(self, cause: str, before: Head | None) -> None:
        """Open the file and begin its chain, behind `before` or behind the line that stands there. A failure changes
        nothing: the next call begins anew."""
        descriptor, last, torn = self._descriptor, None, 0
        if self._path:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(descriptor)
            regular = stat.S_ISREG(status.st_mode) and bool(self._path)
            if regular:
                last, torn = _last_line(self._path, status.st_size)
        except BaseException:
            if self._path:
                os.close(descriptor)
            raise
        self._descriptor, self._regular, self._ended = descriptor, regular, False
        self._looked_at = time.monotonic()
        self._begin_chain(cause, before or last, torn, status.st_size)

    def _begin_chain(self, cause: str, before: Head | None, torn: int, size: int) -> None:
        self._position, self._part, self.chain = size, b"", Chain()
        line = self.chain.begin(cause, self._instance, before, torn)
        self.pending += b"\n" * bool(torn) + line + b"\n"

    def follow_rotation(self, look: bool) -> None:
        """Leave a file that was renamed or removed for a new one; begin a chain anew in one that was cut."""
        now = time.monotonic()
        if not self._path or (now - self._looked_at < RETRY and not self._ended and not look):
            return
        self._looked_at = now
        named, status = self._named(), os.fstat(self._descriptor)
        if named is not None and os.path.samestat(named, status) and self._regular and not self.pending:
            self._rotation.rename(self._path, status.st_size, self.chain.head)
            named = self._named()
        if named is None or not os.path.samestat(named, status):
            if not self._ended:
                self.end("rotated")
            self.write()
            left = self._descriptor
            self._begin("rotated", self.chain.head)
            os.close(left)
        elif self._regular and status.st_size < self._position:
            _, torn = _last_line(self._path, status.st_size)  # where it fails, the next look finds the cut again
            log.warning("audit log was cut", file=self._path, reason="it is shorter than what was written to it")
            self._begin_chain("cut", self.chain.head, torn, status.st_size)

    def _named(self) -> os.stat_result | None:
        try:
            return os.stat(self._path)
        except FileNotFoundError:
            return None

    def end(self, cause: str) -> None:
        """Seal the last record of a file: it shows that nothing behind it is missing."""
        self.pending += self.chain.seal(f'{{"ts":"{timestamp()}","event":"chain-end","cause":"{cause}"}}') + b"\n"
        self._ended = True
        self._on_end()

    def close(self) -> None:
        """Close the file; standard output stays open."""
        if self._path:
            os.close(self._descriptor)


def _last_line(file: str, size: int) -> tuple[Head | None, int]:
    """Read the last record of a file, which may lack its line end alone, and the bytes that have none. Raises
    OSError."""
    with open(file, "rb") as opened:
        opened.seek(max(0, size - _TAIL))
        tail = opened.read(_TAIL)
    whole, end, torn = tail.rpartition(b"\n")
    line = whole.rpartition(b"\n")[2]
    sealed = read_line(torn) or read_line(line)
    if not end and sealed is None:
        return None, len(torn)
    return sealed.head if sealed is not None else Head("", -1, hashlib.sha256(line).hexdigest()), len(torn)
