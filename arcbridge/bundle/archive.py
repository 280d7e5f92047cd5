"""Packs a bundle into one compressed tar archive, with a manifest, and writes it where nothing is.

tar, because each system that a role runs on can unpack it: servers without a desktop have no unzip, and Windows has tar
since 2018. Invariant: the file is new, of this user alone (0600) from its first byte, and whole or absent.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from arcbridge.errors import StateError
from arcbridge.pki.private_files import OPEN_SAFELY

DIRECTORY: Final = "arcbridge-bundle"
"""The one directory in the archive."""


def pack(files: Mapping[str, bytes], now: float) -> bytes:
    """Return the archive of these files; `now`: unix seconds."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"{DIRECTORY}/{name}")
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(now)
            archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(out.getvalue(), mtime=int(now))


def try_directory(path: Path) -> None:
    """Make a file without a name where `path` will be, so that a directory which takes none is found before the work.
    Raises `StateError`."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _not_written(path, error) from error


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet. Raises `StateError`."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_SAFELY, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> StateError:
    return StateError(
        f"cannot write {path}: {error.strerror}; give a file in another directory, or - for standard output"
    )
