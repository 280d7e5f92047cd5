"""Renames an audit log at a size, for a role that has no logrotate, and removes renamed files at their bounds.

It acts in the writer's thread. What a removed file holds that a sink has not delivered is counted in the chain first.
Invariant: only files are removed that have a name which this module gives, never the file that is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from arcbridge.audit.chain import Head
from arcbridge.audit.query import with_rotated

PRUNE_INTERVAL: Final = 600.0
"""Seconds between two looks at the age of renamed files, while records are written."""
log = structlog.get_logger("arcbridge.audit")
_NAMED: Final = re.compile(r"-\d{8}T\d{6}Z-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class RotationBounds:
    """What the settings say; 0: no bound."""

    rotate: int = 0
    """Bytes at which the file is renamed."""
    keep: int = 0
    """Bytes of renamed files."""
    age: float = 0.0
    """Seconds."""


class FileRotation:
    """Renames and removes the files of one log."""

    def __init__(self, bounds: RotationBounds, lost: Callable[[Iterable[Path]], list[str]] = lambda _: []) -> None:
        """`lost` makes the records that count what the sinks have not delivered of files that are removed."""
        self._bounds = bounds
        self._lost = lost
        self._looked_at = float("-inf")
        """When files were removed last, monotonic seconds."""
        self.failure = ""
        """Why the file could not be renamed; empty while it can."""

    def rename(self, path: str, size: int, head: Head) -> None:
        """Rename a file that has reached its size; `head` is its newest record. Where that fails the file grows on."""
        if not self._bounds.rotate or size < self._bounds.rotate:
            return
        was, self.failure = self.failure, ""
        try:
            os.rename(path, f"{path}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{head.chain}")
        except OSError as error:
            self.failure = error.strerror or type(error).__name__
            if not was:
                log.warning("audit log cannot be renamed", file=path, reason=self.failure)
            return
        self._looked_at = float("-inf")

    def surplus(self, path: str) -> tuple[list[Path], list[str]]:
        """Return the files to remove, and the records to write before that; mostly none."""
        if not self._bounds.rotate or (now := time.monotonic()) - self._looked_at < PRUNE_INTERVAL:
            return [], []
        self._looked_at = now
        named = [one for one in with_rotated(Path(path)) if _NAMED.fullmatch(one.name.removeprefix(Path(path).name))]
        doomed, total = [], 0
        try:
            status = sorted(((one.stat(), one) for one in named), key=lambda pair: -pair[0].st_mtime)
            for found, one in status:
                total += found.st_size
                too_old = self._bounds.age and time.time() - found.st_mtime > self._bounds.age
                if total > self._bounds.keep or too_old:
                    doomed.append(one)
            return doomed, self._lost(doomed) if doomed else []
        except OSError as error:
            log.warning("old audit files not removed", file=path, reason=error.strerror)
            return [], []

    def remove(self, files: Iterable[Path]) -> None:
        """Remove files whose records are counted; one that cannot be removed is tried again, and counted again."""
        for path in files:
            with contextlib.suppress(OSError):
                path.unlink()
