"""A directory of one command: its kubeconfig and kubectl's cache, for this user alone and gone with the command.

It is made in XDG_RUNTIME_DIR, else in the system's directory for temporary files, 0700 under a name that cannot be
guessed; its files are 0600. Who made it holds a lock in it, which the kernel gives up when the process ends, however
that ends: `sweep` finds the directories of processes that were killed and removes them. It touches what belongs to
this user and to no process, and follows no link (docs/threats.md#W20). Nothing of the user's own kubeconfig is read.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from arcbridge.errors import StateError

PREFIX = "arcbridge-run-"
KUBECONFIG = "kubeconfig"
LOCK = "lock"
_BEING_MADE_FOR = 600.0
"""Seconds after which a directory without a kubeconfig is no longer one that is just being made."""


def place(environment: Mapping[str, str]) -> Path:
    """Return where the directories are made."""
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    # After `su` the variable may name another user's directory, who could put a file of his in the place of ours.
    if runtime.startswith("/") and os.access(runtime, os.W_OK | os.X_OK) and _is_own(runtime):
        return Path(runtime)
    return Path(tempfile.gettempdir())


def _is_own(directory: str) -> bool:
    return sys.platform == "win32" or os.stat(directory).st_uid == os.geteuid()


@contextmanager
def private_directory(environment: Mapping[str, str], kubeconfig: str) -> Iterator[Path]:
    """Give a directory with `kubeconfig` in it, and remove it with all that is in it then. Raises StateError."""
    from filelock import FileLock  # 15 ms: only a command pays for it

    where = place(environment)
    try:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
    except OSError as error:
        raise StateError(
            f"cannot make a private directory in {where}: {error.strerror}; set TMPDIR to one that is writable"
        ) from error
    try:
        with FileLock(directory / LOCK, mode=0o600):
            try:
                descriptor = os.open(directory / KUBECONFIG, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(kubeconfig)
            except OSError as error:
                raise StateError(f"cannot write {directory / KUBECONFIG}: {error.strerror}") from error
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def sweep(environment: Mapping[str, str]) -> int:
    """Remove what commands of this user left that were killed; return how many. It raises nothing."""
    removed = 0
    try:
        found = [entry for entry in os.scandir(place(environment)) if entry.name.startswith(PREFIX)]
    except OSError:
        return 0
    if not found:
        return 0
    from filelock import FileLock, Timeout  # 15 ms: `status` pays for it only where there is something

    for entry in found:
        directory = Path(entry.path)
        try:
            if not _is_ours(directory):
                continue
            if not (directory / KUBECONFIG).exists() and time.time() - directory.stat().st_mtime < _BEING_MADE_FOR:
                continue  # it may be just being made: its process has no lock yet
            if not (directory / LOCK).exists():
                shutil.rmtree(directory, ignore_errors=True)
            else:
                with FileLock(directory / LOCK, timeout=0, mode=0o600):
                    shutil.rmtree(directory, ignore_errors=True)
        except (OSError, Timeout):
            continue  # a process has it, or another sweep was quicker
        removed += not directory.exists()
    return removed


def _is_ours(directory: Path) -> bool:
    status = directory.lstat()
    return stat.S_ISDIR(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())
