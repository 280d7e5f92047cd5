"""The background process's log: a file of a bounded size, and one that was before it.

A stream for `observe.logging`. What Python or a library writes to standard error comes there too, because the
descriptor is exchanged when the file is.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path

from arcbridge.pki.private_files import OPEN_SAFELY, ensure_private_directory

LOG_LIMIT = 2 * 1024 * 1024
"""Bytes after which a new file is begun; one former file is kept, so twice as much is the most on disk."""


class LogFile(io.TextIOBase):
    """Appends to `path`; after `limit` bytes the file becomes `path.1`. Raises StateError, OSError at the start."""

    def __init__(self, path: Path, *, limit: int = LOG_LIMIT, standard_error: bool = False) -> None:
        ensure_private_directory(path.parent)
        self._path = path
        self._limit = limit
        self._standard_error = standard_error
        """Whether file descriptors 1 and 2 lead to the file as well."""
        self._descriptor = -1
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | OPEN_SAFELY
        descriptor = os.open(self._path, flags, 0o600)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        if self._standard_error:
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "replace")
        if not os.fstat(self._descriptor).st_nlink:  # the file was removed, perhaps with its directory
            self._open()
        elif self._size and self._size + len(data) > self._limit:
            with suppress(FileNotFoundError):  # the user has given it another name
                os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
            self._open()
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._size += len(data)
        return len(text)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        super().close()
