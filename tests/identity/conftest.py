"""What the tests of groups share: a tenant of Entra ID with Microsoft Graph, and what asks it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from arcbridge.net.fetch import HttpFetcher
from tests.support.entra import Entra, GraphState


@pytest.fixture(scope="session")
def tenant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entra]:
    with Entra(tmp_path_factory.mktemp("entra")) as entra:
        yield entra


@pytest.fixture
def entra(tenant: Entra) -> Entra:
    tenant.graph = GraphState()
    tenant.requests.clear()
    return tenant


@pytest.fixture
async def fetcher() -> AsyncIterator[HttpFetcher]:
    fetcher = HttpFetcher()
    yield fetcher
    await fetcher.close()
