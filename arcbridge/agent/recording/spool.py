"""Keeps the directory of recordings within its bound, and finishes what a former agent process left.

It runs in the recorder's thread, `remove` in the bucket's, and `recover` in one of its own. A file counts from its
first byte on; what others write to the directory or remove from it is noticed each `MEASURE` seconds, and when there
seems to be no room. Invariant: a file whose writer lives is never touched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from arcbridge.agent.recording.cast import broken_off
from arcbridge.agent.recording.sealed_file import ENDING, PART, FinishedFile, RecordingFile, reason_of
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.sealing.recipients import Recipient

MEASURE: Final = 10.0
"""Seconds after which the directory is measured again before a new recording: other agents may write to it, too."""

log = structlog.get_logger("arcbridge.recording")


class DirectoryFull(ArcbridgeError):
    """The directory has as many bytes as it may have."""


class Spool:
    """The directory of one agent, or of several."""

    def __init__(self, directory: Path, most: int, recipients: Sequence[Recipient]) -> None:
        """Make the directory where it is missing. `most`: bytes of all recordings in it. Raises ConfigError."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"recording.directory: {directory} cannot be made: {error.strerror}") from error
        self.directory = directory
        self.recipients = recipients
        self._most = most
        self.used = 0
        """Bytes of recordings, as far as this process knows."""
        self.unfinished = 0
        """Files that a former process left and this one could not finish."""
        self._lock = threading.Lock()
        """Held while `used` changes."""
        self._measured = -MEASURE
        """When the directory was measured, in monotonic seconds."""

    def create(self, name: str) -> RecordingFile:
        """Make the file of a recording. Raises OSError, DirectoryFull."""
        if time.monotonic() - self._measured >= MEASURE:
            self.measure()
        self.make_room(0)
        return RecordingFile.create(self.directory / (name + ENDING), self.recipients)

    def make_room(self, size: int) -> None:
        """Raise DirectoryFull where so many bytes more are too many."""
        if self.used + size < self._most:
            return
        self.measure()
        if self.used + size >= self._most:
            raise DirectoryFull(
                f"the recordings in {self.directory} have {self.used} bytes, and may have {self._most}: move some "
                "away, or raise recording.directory_bytes"
            )

    def measure(self) -> None:
        """Count the bytes of all recordings. Raises OSError."""
        with self._lock:  # a file that is removed meanwhile would be taken off twice
            self.used = sum(_size(path) for path in self.directory.iterdir() if _is_recording(path))
            self._measured = time.monotonic()

    def append(self, file: RecordingFile, text: bytes) -> None:
        """Append to a file, and count it. Raises OSError, SealingError."""
        with self._lock:
            self.used += file.append(text)

    def discard(self, file: RecordingFile) -> None:
        """Remove a file that is being written. Raises OSError."""
        with self._lock:
            file.discard()
            self.used = max(0, self.used - file.size)

    def remove(self, path: Path, size: int) -> None:
        """Remove a finished file of so many bytes. Raises OSError."""
        with self._lock:
            path.unlink(missing_ok=True)
            self.used = max(0, self.used - size)

    def finished(self) -> list[Path]:
        """Return the files that are finished, the oldest first. Raises OSError."""
        return sorted(path for path in self.directory.iterdir() if path.name.endswith(ENDING))

    def left(self) -> list[Path]:
        """Return the files that are not published, those of living writers included. Raises OSError."""
        return sorted(self.directory.glob("*" + ENDING + PART))

    def recover(self, part: Path) -> tuple[RecordingFile, FinishedFile] | None:
        """Finish a file whose writer is gone, with a mark where it broke off; None where that is not to be done."""
        try:
            file = RecordingFile.reopen(part.with_name(part.name.removesuffix(PART)), self.recipients)
            if file is None:
                return None
            if not file.whole:
                try:
                    file.append(broken_off())
                except (ArcbridgeError, OSError) as error:  # without the mark it says by its end that it broke off
                    log.warning("recording not finished", file=part.name, reason=reason_of(error))
                    return file, file.finish(whole=False)
            return file, file.finish()
        except FileNotFoundError:  # its writer has published it
            return None
        except OSError as error:
            self.unfinished += 1
            log.warning("recording not finished", file=part.name, reason=reason_of(error))
            return None


def _is_recording(path: Path) -> bool:
    return path.name.endswith((ENDING, ENDING + PART))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed meanwhile
        return 0
