"""Writes the file of one recording: a tar archive whose members are age files, each of which can be opened alone.

A member has what came in a second, because an age file cannot be flushed: its chunks are of 64 KiB
(docs/decisions/0062-sealed-recordings.md). All members opened and joined are the recording. A file has the ending
`.part` and a lock of its writer until it is published. It runs in the recorder's thread. Invariants: nothing is written
that is not sealed; behind a write that failed the file is what it was before; a file with its own name has no writer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from arcbridge.errors import ArcbridgeError
from arcbridge.sealing.age import seal
from arcbridge.sealing.recipients import Recipient

ENDING: Final = ".cast.age.tar"
PART: Final = ".part"
BLOCK: Final = 512
"""Bytes of a block of a tar archive (POSIX.1-1988, ustar)."""
MAX_MEMBER: Final = 4 * 1024 * 1024
"""Bytes of a member that is read; those that are written stay far below."""
_READ: Final = 1024 * 1024
_END: Final = bytes(2 * BLOCK)


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """A file that is whole."""

    name: str
    sha256: str
    size: int


class RecordingFile:
    """A file that is being written."""

    def __init__(self, path: Path, recipients: Sequence[Recipient], descriptor: int) -> None:
        """Write on at `descriptor`, which is at the end of the file `path` with the ending `.part`."""
        self.path = path
        self._recipients = recipients
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self.size = 0
        self._members = 0
        self.whole = False
        """A file that was reopened has the end of its archive: its writer had nothing to add."""

    @classmethod
    def create(cls, path: Path, recipients: Sequence[Recipient]) -> RecordingFile:
        """Make the file. Raises OSError, also where another agent of the directory took it for one that was left."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(_part(path), flags, 0o600)
        if not _lock(descriptor):
            os.close(descriptor)
            raise BlockingIOError(errno.EAGAIN, "another agent has locked the new file")
        return cls(path, recipients, descriptor)

    @classmethod
    def reopen(cls, path: Path, recipients: Sequence[Recipient]) -> RecordingFile | None:
        """Open a file whose writer is gone, and cut what is no whole member of it; None where the writer lives, or has
        published it meanwhile.

        Raises OSError.
        """
        descriptor = os.open(_part(path), os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        try:
            if not _lock(descriptor) or not os.path.samestat(os.fstat(descriptor), _part(path).stat()):
                os.close(descriptor)
                return None
            file = cls(path, recipients, descriptor)
            file._read_again()
        except BaseException:
            os.close(descriptor)
            raise
        return file

    def append(self, text: bytes) -> int:
        """Seal a text as the next member; return its bytes in the file. Raises OSError: then nothing was written."""
        sealed = seal(self._recipients, text)
        member = tarfile.TarInfo(f"{self._members + 1:06d}.cast.age")
        member.size, member.mode, member.mtime = len(sealed), 0o600, int(time.time())
        data = member.tobuf(tarfile.USTAR_FORMAT) + sealed + bytes(-len(sealed) % BLOCK)
        self._write(data)
        self._members += 1
        return len(data)

    def finish(self, *, whole: bool = True) -> FinishedFile:
        """End the archive; the file keeps its lock and the ending `.part` until `publish`. Raises OSError.

        Where the disk is full, or the last line is not in it (`whole`), the archive has no end. Readers of tar take
        that, and `reopen` knows by it that the writer had more to say.
        """
        if whole and not self.whole:
            with contextlib.suppress(OSError):
                self._write(_END)
            if os.fstat(self._descriptor).st_size != self.size:
                raise OSError(errno.EIO, "what was written in part cannot be cut")
        return FinishedFile(self.path.name, self._digest.hexdigest(), self.size)

    def publish(self) -> None:
        """Give the file its name, and close it: the index has it. Raises OSError."""
        try:
            os.replace(_part(self.path), self.path)
        finally:
            self.leave()

    def leave(self) -> None:
        """Close the file as it is, once: the next agent that starts finishes it."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def discard(self) -> None:
        """Remove and close the file: nothing was recorded."""
        try:
            _part(self.path).unlink(missing_ok=True)
        finally:
            self.leave()

    def _write(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            os.lseek(self._descriptor, self.size, os.SEEK_SET)
            raise
        self._digest.update(data)
        self.size += len(data)

    def _read_again(self) -> None:
        """Take the whole members that the file has, and cut what stands behind them."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            for data in members(file):
                self._digest.update(data)
                self.size += len(data)
                self._members += 1
            file.seek(self.size)
            if file.read(len(_END) + 1) == _END:
                self._digest.update(_END)
                self.size += len(_END)
                self.whole = True
        os.ftruncate(self._descriptor, self.size)
        os.lseek(self._descriptor, self.size, os.SEEK_SET)


def members(file: BinaryIO) -> Iterator[bytes]:
    """Yield the whole members of an archive, each with its head and padding, and stop where none begins."""
    while len(head := file.read(BLOCK)) == BLOCK:
        try:
            size = tarfile.TarInfo.frombuf(head, "ascii", "strict").size
        except (tarfile.HeaderError, UnicodeDecodeError):
            return
        if not 0 <= size <= MAX_MEMBER:
            return
        body = file.read(size + -size % BLOCK)
        if len(body) < size + -size % BLOCK:
            return
        yield head + body


def sealed_part(member: bytes) -> bytes:
    """Return the age file in a member."""
    size = tarfile.TarInfo.frombuf(member[:BLOCK], "ascii", "strict").size
    return member[BLOCK : BLOCK + size]


def sha256_of(path: Path) -> tuple[str, int]:
    """Return the SHA-256 of a file and its bytes. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(_READ):
            digest.update(data)
            size += len(data)
    return digest.hexdigest(), size


def reason_of(error: BaseException) -> str:
    """Return why a recording cannot be written, as a log has it."""
    if isinstance(error, ArcbridgeError):
        return error.message
    return error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__


def _part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def _lock(descriptor: int) -> bool:
    """Lock a file for its writer; return whether no other process has."""
    from filelock import lock_descriptor

    return bool(lock_descriptor(descriptor, blocking=False))
