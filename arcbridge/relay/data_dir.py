"""Opens what a relay keeps in its data directory, for the relay, its workers and an operator.

    ca.crt, ca.key    the relay's own CA (`pki.authority`)
    ca-rotation.json  that CA with the next or the former one, once it was rotated (`pki.rotation`); then it alone
                      counts, and the two files follow it
    registry.db       clusters, join tokens, revocations (`registry.sqlite`); with -wal and -shm while it is open
    relay.lock        held by the relay that runs on this directory
    audit.jsonl       what administrators did, and more (`relay.audit`), unless audit.file names another place
    admin.sock        where that relay answers its operator's commands (`admin_socket`)

Back up all of it together. The first process that needs the CA makes it, so a join token, which is of no use without
the CA's pin, can be made before the relay's first start.

A relay of a fleet has its registry in NATS instead (`relay.backend`), and no `registry.db`; the CA's files are the same
at all of them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from arcbridge.errors import ConfigError, StateError
from arcbridge.pki.authority import CERTIFICATE_FILE, KEY_FILE, Authority
from arcbridge.pki.private_files import ensure_private_directory, locked, read_file, write_private
from arcbridge.pki.rotation import Rotation
from arcbridge.relay.ledger import ledger_secret
from arcbridge.relay.registry.sqlite import DATABASE_FILE, SqliteRegistry
from arcbridge.settings.named_files import is_there
from arcbridge.settings.surroundings import holders, is_full, named

LOCK_FILE = "relay.lock"
ROTATION_FILE = "ca-rotation.json"
_LOCK = ".ca.lock"
_CA_FILES = (ROTATION_FILE, KEY_FILE, CERTIFICATE_FILE)
"""In the order in which they are replaced."""
CA_NAME = "arcbridge relay CA"


def open_authority(data_dir: Path, *, clock: Callable[[], float] = time.time) -> Authority:
    """Return the relay's CA, made at first use; raises `StateError`. Takes milliseconds and may wait for a lock.

    What a step, or a restore, has left that was killed between its files is completed.
    """
    if _document(data_dir) is None:
        return Authority.load_or_create(data_dir, CA_NAME, clock=clock)
    with locked(data_dir / _LOCK):
        found = read_rotation(data_dir)
        _write_pair(data_dir, found)
    return found.authority(clock)


def change_authority(data_dir: Path, step: Callable[[Rotation], Rotation]) -> Rotation:
    """Take a step of the CA's rotation and keep it; return what is in force then. Raises `StateError`, also where there
    is no CA."""
    read_rotation(data_dir)  # before a lock file is made
    with locked(data_dir / _LOCK):
        known = read_rotation(data_dir)
        changed = step(known)
        if changed.key != known.key:
            changed = replace(changed, former_secret=ledger_secret(known.key).hex())
        write_private(data_dir / ROTATION_FILE, changed.encode())
        _write_pair(data_dir, changed)
    return changed


def read_ca(data_dir: Path) -> dict[str, bytes]:
    """Return the files of the CA as they are at one moment, by name. Raises `StateError`."""
    with locked(data_dir / _LOCK):
        found = {name: read_file(data_dir / name) for name in _CA_FILES}
    return {name: data for name, data in found.items() if data is not None}


def write_ca(data_dir: Path, files: Mapping[str, bytes]) -> None:
    """Replace the files of the CA. Raises `StateError`."""
    for name in _CA_FILES:
        if name in files:
            write_private(data_dir / name, files[name])
        else:
            (data_dir / name).unlink(missing_ok=True)


def read_rotation(data_dir: Path) -> Rotation:
    """Return how far the rotation of the CA is, which has to be there. Raises `StateError`."""
    found = _document(data_dir) or Authority.read(data_dir)
    if found is None:
        raise StateError(f"there is no CA in {data_dir}")
    return found if isinstance(found, Rotation) else Rotation(found.certificate_pem, found.key_pem)


def _document(data_dir: Path) -> Rotation | None:
    """Return what the document says; None where the CA was never rotated. Raises `StateError`, also where it cannot be
    of the CA beside it: that one may have been made because the key of the other was stolen."""
    kept = read_file(data_dir / ROTATION_FILE)
    if kept is None:
        return None
    beside = read_file(data_dir / CERTIFICATE_FILE)
    if beside is None:
        raise StateError(f"{data_dir / CERTIFICATE_FILE} is missing beside {ROTATION_FILE}: restore both from one "
                         "backup; where the CA is to be replaced, move the other one away too")  # fmt: skip
    return Rotation.decode(kept, beside.decode("ascii", "replace"))


def _write_pair(data_dir: Path, rotation: Rotation) -> None:
    """Have the two files follow the document; the caller holds the lock."""
    for name, text in ((KEY_FILE, rotation.key), (CERTIFICATE_FILE, rotation.certificate)):
        if read_file(data_dir / name) != text.encode():
            write_private(data_dir / name, text.encode())


def read_authority(data_dir: Path) -> Authority | None:
    """Return the relay's CA as it is kept, without making one; None where there is none. Raises `StateError`."""
    if (rotated := _document(data_dir)) is not None:
        return rotated.authority()
    if is_there(data_dir / KEY_FILE) and not is_there(data_dir / CERTIFICATE_FILE):
        raise StateError(f"{data_dir / CERTIFICATE_FILE} is missing: restore it from a backup")
    return Authority.read(data_dir)


def cluster_names(data_dir: Path) -> list[str]:
    """Return the clusters that the registry of a data directory has, and change nothing. Raises `StateError`."""
    import sqlite3

    path = data_dir / DATABASE_FILE
    if not is_there(path):
        raise StateError(f"there is no registry in {data_dir}: is data_dir right, and has the relay ever run?")
    try:
        if not path.is_file():
            raise StateError(f"{path} cannot be read: it is not a file")
        # A reader that is alone would leave a -wal and a -shm of its own, which a relay of another user cannot open.
        alone = "" if is_there(data_dir / f"{DATABASE_FILE}-wal") else "&immutable=1"
        uri = f"{path.absolute().as_uri()}?mode=ro{alone}"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            return [str(name) for (name,) in database.execute("SELECT name FROM clusters ORDER BY name")]
    except (sqlite3.Error, OSError) as error:
        raise StateError(f"{path} cannot be read: {error}") from error


async def open_registry(
    data_dir: Path, *, must_exist: bool = False, clock: Callable[[], float] = time.time
) -> SqliteRegistry:
    """Return the relay's registry, made at first use unless it `must_exist`; raises `StateError` and
    `RegistryUnavailable`."""
    if must_exist and not is_there(data_dir / DATABASE_FILE):
        raise StateError(f"there is no registry in {data_dir}: is data_dir right, and has the relay ever run?")
    return await SqliteRegistry.open(data_dir, clock=clock)


def is_locked(data_dir: Path) -> bool:
    """Return whether a relay runs on a data directory, as far as this user may see that; nothing is made."""
    from filelock import lock_descriptor

    try:
        # Without O_NONBLOCK root would wait where the service has put a pipe in its place.
        descriptor = os.open(data_dir / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not lock_descriptor(descriptor, blocking=False)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def another_relay(data_dir: Path) -> ConfigError:
    """Return the error of a start on a data directory on which a relay runs."""
    which = named(holders(data_dir / LOCK_FILE), join=", ")
    return ConfigError(f"data_dir: another relay is running on {data_dir}{which}; stop it, or use another one")


@contextlib.contextmanager
def instance_lock(data_dir: Path) -> Iterator[int]:
    """Hold the data directory's lock: two relays on one registry and one CA would each know half of the agents.

    The descriptor that holds it; it is held until the last copy is closed, also by processes that inherit one.
    """
    from filelock import lock_descriptor

    if why := is_full(data_dir):
        raise StateError(f"data_dir: {why}")
    ensure_private_directory(data_dir)
    try:
        descriptor = os.open(data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(f"data_dir: {data_dir} cannot be written: {error.strerror}") from error
    try:
        try:
            alone = lock_descriptor(descriptor, blocking=False)
        except OSError as error:
            raise StateError(f"data_dir: {data_dir} cannot be locked: {error.strerror}") from error
        if not alone:
            raise another_relay(data_dir)
        yield descriptor
    finally:
        os.close(descriptor)
