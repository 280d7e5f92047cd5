"""Keeps the directory of recordings within its bound, and finishes what a former agent process left.

It runs in the recorder's thread. A file counts from its first byte on; what others remove from the directory is noticed
when there seems to be no room. Invariant: a file whose writer lives is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from arcbridge.agent.recording.cast import broken_off
from arcbridge.agent.recording.sealed_file import ENDING, PART, FinishedFile, RecordingFile
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.sealing.recipients import Recipient

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

    def create(self, name: str) -> RecordingFile:
        """Make the file of a recording. Raises OSError, DirectoryFull."""
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
        self.used = sum(_size(path) for path in self.directory.iterdir() if _is_recording(path))

    def finished(self) -> list[Path]:
        """Return the files that are finished, the oldest first. Raises OSError."""
        return sorted(path for path in self.directory.iterdir() if path.name.endswith(ENDING))

    def recover(self) -> Iterator[FinishedFile]:
        """Finish the files whose writers are gone, with a mark where each broke off. Raises OSError."""
        for part in sorted(self.directory.glob("*" + ENDING + PART)):
            path = part.with_name(part.name.removesuffix(PART))
            try:
                if (file := RecordingFile.reopen(path, self.recipients)) is not None:
                    file.append(broken_off())
                    yield file.finish()
            except OSError as error:
                log.warning("recording not finished", file=part.name, reason=error.strerror)


def _is_recording(path: Path) -> bool:
    return path.name.endswith((ENDING, ENDING + PART))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed meanwhile
        return 0
