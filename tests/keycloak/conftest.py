"""One Keycloak, one real cluster and one organisation for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import api, cluster
from tests.keycloak.people import EXAMPLES, KeycloakWorld, Organisation, example, settings_of
from tests.support.cluster import Cluster
from tests.support.keycloak import Keycloak
from tests.support.world import ApiServer

__all__ = ["api", "cluster"]


@pytest.fixture(scope="session")
def keycloak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keycloak]:
    """The identity provider, once."""
    with Keycloak(tmp_path_factory.mktemp("keycloak")) as keycloak:
        yield keycloak


@pytest.fixture(scope="session")
def organisation(keycloak: Keycloak) -> Organisation:
    """The realm in which people work."""
    return Organisation(keycloak, "factory")


@pytest.fixture(scope="session")
def rotating(keycloak: Keycloak) -> Organisation:
    """A realm of which no end has seen a key."""
    return Organisation(keycloak, "rotating")


@pytest.fixture(scope="session")
def world(
    organisation: Organisation,
    rotating: Organisation,
    api: ApiServer,
    cluster: Cluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[KeycloakWorld]:
    """Relay and agent as processes, with the settings of the examples."""
    world = KeycloakWorld(api, directory=tmp_path_factory.mktemp("world"))
    world.realms = [organisation.realm, rotating.realm]
    issuer = organisation.realm.url
    world.relay_settings, world.agent_settings = settings_of("relay.toml", issuer), settings_of("agent.toml", issuer)
    world.relay_settings += f'\npage.client_id = "arcbridge-page"\npage.issuer = "{issuer}"'
    admins = '[[admin]]\ngroups = ["oidc:platform"]\nclusters = ["*"]\nwhat = ["read"]\n'
    world.policy = f"{(EXAMPLES / 'policy.toml').read_text()}\n{admins}"
    board = {**example("client-arcbridge-page.json"), "redirectUris": [f"{world.relay_url}/page/callback"]}
    organisation.realm.create("clients", board)
    for role, group in (("cluster-admin", "oidc:platform"), ("view", "oidc:developers")):
        cluster.grant(role, group=group)
    with world:
        yield world.start()
