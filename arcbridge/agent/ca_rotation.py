"""The rotation of a cluster's CA: its steps as an operator takes them, in the store that all its agents read.

Agents read the store every five minutes, and at SIGHUP. Each relay is told at once; who uses the cluster is not known,
so that a step waits for a time instead: until every agent has read the one before, and before the former CA is retired
for as long as its users are given to come once. Those who come later follow as well, by the certificates that lead
from CA to CA; what they lose is the protection from a stolen key of the former one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

from arcbridge.agent.enrol import CONFLICTS, LOOK_AGAIN, TOO_MANY_WRITERS
from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.agent.service import credential_store
from arcbridge.errors import StateError
from arcbridge.pki import credentials as entries
from arcbridge.pki.credentials import AgentCredential, CredentialStore, VersionConflict
from arcbridge.pki.rotation import Rotation, RotationStatus
from arcbridge.settings.config import AgentConfig
from arcbridge.units import duration

WAITS: Final = {"next": 0.0, "activate": 2 * LOOK_AGAIN, "retire": 7 * 86400.0}
"""Seconds between the step before and this one."""


async def status(config: AgentConfig, clock: Callable[[], float] = time.time) -> RotationStatus:
    """Return how far the rotation is. Raises StateError where no cluster's CA is kept yet."""
    async with AsyncExitStack() as stack:
        return _status((await _load(_store(config, stack)))[0].rotation, clock())


async def take_step(config: AgentConfig, step: str, *, force: bool, clock: Callable[[], float] = time.time) -> Rotation:
    """Take a step as `Rotation.take` does; return what is in force then. Raises StateError where it has to wait."""
    async with AsyncExitStack() as stack:
        store = _store(config, stack)
        for _ in range(CONFLICTS):
            credential, version = await _load(store)
            if not force:
                _status(credential.rotation, clock()).require(step)
            changed = credential.rotation.take(step, clock())
            update = {
                entries.CLUSTER_ROTATION: changed.encode(),
                entries.CLUSTER_CA_CERTIFICATE: changed.certificate.encode(),
                entries.CLUSTER_CA_KEY: changed.key.encode(),
            }
            try:
                await store.save(update, expect_version=version)
            except VersionConflict:
                continue
            return changed
    raise StateError(TOO_MANY_WRITERS)


def _status(rotation: Rotation, now: float) -> RotationStatus:
    left = rotation.seconds + WAITS[rotation.step] - now
    missing = (f"the step before was taken too recently: {duration(left)} are left",) if left > 0 else ()
    return RotationStatus(rotation, "", missing)


def _store(config: AgentConfig, stack: AsyncExitStack) -> CredentialStore:
    api = None
    if config.state.secret:
        api = ApiServer(endpoint_of(config.kubernetes))
        stack.push_async_callback(api.close)
    return credential_store(config, api)


async def _load(store: CredentialStore) -> tuple[AgentCredential, str]:
    snapshot = await store.load()
    credential = None if snapshot is None else AgentCredential.from_entries(snapshot)
    if snapshot is None or credential is None:
        raise StateError("the agent has not enrolled yet, so its cluster has no CA that could be rotated")
    return credential, snapshot.version
