"""One real cluster, the tenant, and an organisation that has not enrolled its cluster yet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import api, cluster
from tests.support.entra import PIPELINE, Entra
from tests.support.world import ApiServer
from tests.walkthrough.people import EXAMPLES, JOB_ID, EntraWorld

__all__ = ["api", "cluster"]


@pytest.fixture(scope="session")
def entra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entra]:
    """The tenant, and Microsoft Graph."""
    with Entra(tmp_path_factory.mktemp("entra")) as entra:
        entra.applications[PIPELINE].object_id = JOB_ID
        yield entra


@pytest.fixture(scope="session")
def world(entra: Entra, api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EntraWorld]:
    """A relay with the settings of the example; the walkthrough enrols the agent."""
    world = EntraWorld(api, directory=tmp_path_factory.mktemp("world"))
    world.entra = entra
    world.policy = (EXAMPLES / "policy.toml").read_text()
    with world:
        world.start_issuer()
        world.start_relay(extra=world.graph())
        yield world
