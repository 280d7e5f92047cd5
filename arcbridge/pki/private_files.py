"""Files that hold keys and pins: private from their first byte, replaced whole, one writer at a time.

A file is written beside its place under a temporary name with mode 0600 (given to `open`, so that no moment exists
in which the umask decides), synced, renamed over the old one, and its directory is synced: after a crash there is
the old file or the new one, never half of either.

Root gives what it makes to the owner of the directory: an operator who runs `token create` with sudo before the first
start of the relay must not leave files behind that the relay's own user cannot read.

What another user of the machine has put in the place of a file is never used (docs/threats.md#W11): a file is read only
when it belongs to this user or to root, and directories are made so that no other user can put anything there.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arcbridge.errors import StateError

LOCK_RETRY = 0.01
"""Seconds between two attempts to get a lock that another process or thread holds; locks are held for milliseconds."""


MAX_LINKS = 40
"""Symbolic links in one path, as in the kernel."""

_OWNER = "run this as its owner or as root; where it should be yours, chown it"
"""In this order: an operator who forgot `sudo` would take a relay's files from the relay by `chown`."""

OPEN_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Flags of each `os.open`: follow no link, hand the descriptor to no other program; Windows has neither, and would
change the ends of lines."""


def ensure_private_directory(directory: Path, named_by: str = "--state-dir, of a relay --data-dir") -> None:
    """Make `directory` and those of its parents that are missing, each 0700; raises `StateError`. `named_by`: what
    names another one."""
    try:
        make_directories(directory, 0o700)
    except OSError as error:
        raise StateError(
            f"cannot make the directory {directory}: {error.strerror}; let this user make it, or name another one "
            f"({named_by})"
        ) from error


def make_directories(directory: Path, mode: int) -> None:
    """Make `directory` and those of its parents that are missing, each with `mode`; raises OSError.

    `Path.mkdir` leaves the mode of parents to the umask: with umask 0 every user could exchange what is in them.
    """
    if directory.is_dir():
        return
    make_directories(directory.parent, mode)
    try:
        directory.mkdir(mode=mode)
    except FileExistsError:
        if not directory.is_dir():
            raise


def refuse_foreign_directory(directory: Path) -> None:
    """Raise `StateError` where `directory` belongs to another user, or every user can write into it."""
    refuse_planted(directory)
    try:
        status = directory.stat()
    except OSError:
        return  # it is made when it is needed, or that fails in words
    if not _is_trusted(status, directory.parent):
        raise StateError(f"{directory} belongs to another user, who could change what is in it; choose another one")
    if os.name == "posix" and status.st_mode & stat.S_IWOTH:
        # A volume of a pod is made like this (emptyDir: root's, 0777), and the pod's user cannot change its mode.
        below = f"; if it is a volume of a pod, choose a directory in it ({directory}/arcbridge)"
        raise StateError(
            f"every user of this machine can change what is in {directory}: chmod o-w, or choose another one"
            f"{below if status.st_uid == 0 else ''}"
        )


def refuse_planted(path: Path) -> None:
    """Raise `StateError` where another user has made a part of `path` in a directory shared by all users, as /tmp is.

    The rule is that of the kernel's fs.protected_symlinks and fs.protected_regular, which not every system sets, and
    here it holds for directories too. A part may belong to this user or to the owner of the shared directory.
    """
    if os.name != "posix":
        return
    try:
        whole = path if path.is_absolute() else Path.cwd() / path
    except OSError as error:
        raise StateError(
            f"cannot tell where {path} is, because the current directory is gone; cd to another"
        ) from error
    place, names = Path("/"), list(whole.parts[1:])
    links = 0
    while names:
        name = names.pop(0)
        if name == "..":
            place = place.parent
            continue
        entry = place / name
        try:
            within, status = place.stat(), entry.lstat()
        except OSError:
            return  # absent, or not reachable: opening it raises, and says why
        shared = within.st_mode & stat.S_ISVTX and within.st_mode & stat.S_IWOTH
        if shared and status.st_uid not in (os.geteuid(), within.st_uid):
            raise StateError(f"{entry} belongs to another user of this machine: choose a path outside {place}")
        if not stat.S_ISLNK(status.st_mode):
            place = entry
        elif (links := links + 1) > MAX_LINKS:
            return
        else:
            # From the root again: a relative target begins in a directory that was looked at already.
            try:
                target = os.readlink(entry)
            except OSError as error:
                raise StateError(f"cannot read the link {entry}: {error.strerror}") from error
            names = [*(place / target).parts[1:], *names]
            place = Path("/")


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` (a link itself, not what it points to) by `data`, 0600, durably; raises `StateError`."""
    try:
        replace_file(path, data, give=True)
        sync_directory(path.parent)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}") from error


def replace_file(path: Path, data: bytes, mode: int = 0o600, *, give: bool = False) -> None:
    """Do so with `mode`, durably once `sync_directory` was called, too; raises OSError.

    `give`: root gives the file to the owner of its directory.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_SAFELY, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if give:
                _give_to_owner(file.fileno(), path.parent)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_replacements(path: Path) -> None:
    """Remove what a kill has left of `replace_file`, as far as that is possible; no other process may replace `path`
    meanwhile."""
    with suppress(OSError):
        for left in path.parent.iterdir():
            begin, _, end = left.name.rpartition(".")
            if begin == f".{path.name}" and len(end) == 16 and set(end) <= set("0123456789abcdef"):
                left.unlink()


def make_private(path: Path) -> None:
    """Make `path` an empty file with mode 0600 if it is missing; raises `StateError`."""
    try:
        os.close(_open_or_make(path))
    except OSError as error:
        raise StateError(f"cannot open {path}: {error.strerror}") from error


def read_file(path: Path, *, limit: int = 1024 * 1024) -> bytes | None:
    """Read the bytes of `path`, or None when it is absent.

    Raises `StateError` when it is unreadable, over `limit` bytes, or another user's. Root waits for no pipe that the
    owner of the directory has put in its place.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if stat.S_ISFIFO(status.st_mode) and os.name == "posix":
                if status.st_uid != os.geteuid():
                    raise StateError(f"{path} is a pipe of another user and is not read: remove it")
                os.set_blocking(file.fileno(), True)  # a shell's <(…)
            if not _is_trusted(status, path.parent):
                raise StateError(
                    f"{path} belongs to another user and is not used: remove it, or give it to the user who runs "
                    "arcbridge (chown)"
                )
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise StateError(f"cannot read {path}: {error.strerror}; {_OWNER}") from error
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise StateError(f"{path} is larger than {limit} bytes: it is not a file of arcbridge")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def others_may_use(status: os.stat_result) -> bool:
    """Return whether a file of this status may be used by users besides the one it is for.

    A group's rights count in a file of this user alone: a Secret's volume in a pod (fsGroup) is root's, with the pod's
    own group.
    """
    if os.name != "posix":
        return False  # a mode says nothing there; what is in a user's profile is that user's
    forbidden = 0o077 if status.st_uid == os.geteuid() else 0o007
    return bool(status.st_mode & forbidden)


@contextmanager
def locked(path: Path, timeout: float = math.inf) -> Iterator[None]:
    """Hold an exclusive lock on the lock file `path` (made 0600); blocks while another process or thread holds it.

    Raises `StateError` after `timeout` seconds. The file stays: removing it would let two holders lock two different
    files of one name.
    """
    descriptor = _lock(path, timeout)
    if descriptor is None:
        raise StateError(f"another process has held the lock {path} for {timeout:.0f} s: end it, or try again")
    try:
        yield
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Lock the lock file `path` (made 0600) if no other process or thread holds it; raises `StateError`.

    Returns the descriptor, which holds the lock until it and its copies in other processes are closed.
    """
    return _lock(path, 0.0)


def _lock(path: Path, timeout: float) -> int | None:
    from filelock import lock_descriptor  # 15 ms: only what locks pays for it

    try:
        descriptor = _open_or_make(path)
    except OSError as error:
        hint = f"; {_OWNER}" if isinstance(error, PermissionError) else ""
        raise StateError(f"cannot open the lock file {path}: {error.strerror}{hint}") from error
    try:
        deadline = time.monotonic() + timeout
        while not (got := lock_descriptor(descriptor, blocking=False)) and time.monotonic() < deadline:
            time.sleep(LOCK_RETRY)
        if got:
            return descriptor
    except OSError as error:
        os.close(descriptor)
        raise StateError(f"cannot lock {path}: {error.strerror}") from error
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _open_or_make(path: Path) -> int:
    flags = os.O_RDWR | OPEN_SAFELY
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    # Only what was made here: a file that was there may be a hard link to another user's.
    _give_to_owner(descriptor, path.parent)
    return descriptor


def _is_trusted(status: os.stat_result, directory: Path) -> bool:
    """Return whether what has this status belongs to this user or root; for root also to the owner of its directory."""
    if os.name != "posix" or status.st_uid in (0, os.geteuid()):
        return True
    return os.geteuid() == 0 and status.st_uid == directory.stat().st_uid


def _give_to_owner(descriptor: int, directory: Path) -> None:
    if os.name == "posix" and os.geteuid() == 0:
        owner = directory.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def sync_directory(directory: Path) -> None:
    """Let renames in a directory outlive a crash of the machine, where its file system can; raises OSError."""
    if os.name != "posix":
        return  # directories cannot be opened there
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # it syncs no directories (fsync(2)), as those of some virtual machines
            raise
    finally:
        os.close(descriptor)
