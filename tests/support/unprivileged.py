"""Directories that a user may not search, also where the tests are root's: root is kept out of no directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNPRIVILEGED = 65534


@contextmanager
def closed_directory() -> Iterator[Path]:
    """A directory in one that every user may search; closed to all but root by `as_unprivileged_user`."""
    whole = Path(tempfile.mkdtemp(prefix="arcbridge-closed-"))
    closed = whole / "closed"
    try:
        whole.chmod(0o755)
        closed.mkdir()
        yield closed
    finally:
        closed.chmod(0o700)
        shutil.rmtree(whole)


@contextmanager
def as_unprivileged_user(closed: Path) -> Iterator[None]:
    """Be a user who may not search `closed`."""
    closed.chmod(0o700 if os.geteuid() == 0 else 0)
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        os.seteuid(0)
