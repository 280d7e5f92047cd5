"""Files that hold keys and pins: private from their first byte, replaced whole, one writer at a time.

A file is written beside its place under a temporary name with mode 0600 (given to `open`, so that no moment exists
in which the umask decides), synced, renamed over the old one, and its directory is synced: after a crash there is
the old file or the new one, never half of either.

Root gives what it makes to the owner of the directory: an operator who runs `token create` with sudo before the first
start of the relay must not leave files behind that the relay's own user cannot read.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arcbridge.errors import StateError

LOCK_RETRY = 0.01
"""Seconds between two attempts to get a lock that another process or thread holds; locks are held for milliseconds."""


def ensure_private_directory(directory: Path) -> None:
    """Make `directory` (0700) and its parents if they are missing; raises `StateError`."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"cannot make the directory {directory}: {error.strerror}") from error


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` (a link itself, not what it points to) by `data`, 0600, durably; raises `StateError`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _give_to_owner(file.fileno(), path.parent)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}") from error


def make_private(path: Path) -> None:
    """Make `path` an empty file with mode 0600 if it is missing; raises `StateError`."""
    try:
        os.close(_open_or_make(path))
    except OSError as error:
        raise StateError(f"cannot open {path}: {error.strerror}") from error


def read_file(path: Path, *, limit: int = 1024 * 1024) -> bytes | None:
    """The bytes of `path`, or None when it is absent; raises `StateError` when unreadable or over `limit` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise StateError(
            f"cannot read {path}: {error.strerror}; it has to belong to the user who runs arcbridge (chown)"
        ) from error
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise StateError(f"{path} is larger than {limit} bytes: it is not a file of arcbridge")
    return data


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the lock file `path` (made 0600); blocks while another process or thread holds it.

    The file stays: removing it would let two holders lock two different files of one name.
    """
    from filelock import lock_descriptor  # 15 ms: only what locks pays for it

    try:
        descriptor = _open_or_make(path)
    except OSError as error:
        raise StateError(f"cannot open the lock file {path}: {error.strerror}") from error
    try:
        try:
            lock_descriptor(descriptor, poll_interval=LOCK_RETRY)
        except OSError as error:
            raise StateError(f"cannot lock {path}: {error.strerror}") from error
        yield
    finally:
        os.close(descriptor)


def _open_or_make(path: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    # Only what was made here: a file that was there may be a hard link to another user's.
    _give_to_owner(descriptor, path.parent)
    return descriptor


def _give_to_owner(descriptor: int, directory: Path) -> None:
    if os.geteuid() == 0:
        owner = directory.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
