"""What a relay keeps in its data directory, and how it is opened: by the relay, by its workers, by an operator.

    ca.crt, ca.key    the relay's own CA (`pki.authority`)
    registry.db       clusters, join tokens, revocations (`registry.sqlite`); with -wal and -shm while it is open

Back up all of it together. Whoever first needs the CA makes it, so a join token, which is of no use without the
CA's pin, can be made before the relay's first start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from arcbridge.errors import StateError
from arcbridge.pki.authority import Authority
from arcbridge.relay.registry.sqlite import DATABASE_FILE, SqliteRegistry

CA_NAME = "arcbridge relay CA"


def open_authority(data_dir: Path, *, clock: Callable[[], float] = time.time) -> Authority:
    """The relay's CA, made at first use; raises `StateError`. Takes milliseconds and may wait for a lock."""
    return Authority.load_or_create(data_dir, CA_NAME, clock=clock)


async def open_registry(
    data_dir: Path, *, must_exist: bool = False, clock: Callable[[], float] = time.time
) -> SqliteRegistry:
    """The relay's registry, made at first use unless it `must_exist`; raises `StateError` and `RegistryUnavailable`."""
    if must_exist and not (data_dir / DATABASE_FILE).exists():
        raise StateError(f"there is no registry in {data_dir}: is data_dir right, and has the relay ever run?")
    return await SqliteRegistry.open(data_dir, clock=clock)
