"""Fetches the relay's list of the clusters that this user may reach.

It keeps no list, and shows nothing of what a relay says beside it: the fields of a refusal decide alone. Invariant: the
access token is sent only after the relay's certificate is verified, and every row that is returned has a name that a
cluster may have (docs/threats.md#B3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays, RelaysFailed
from arcbridge.client.session.relay_http import request
from arcbridge.errors import ConfigError, PermissionRefused, Unreachable
from arcbridge.pki.names import check_cluster_name
from arcbridge.untrusted_json import read_json


async def list_clusters(relays: Relays, tokens: Tokens) -> list[dict[str, Any]]:
    """Get /v1/clusters from the first relay that answers (then `relays.in_use`).

    Each row has name, state, agents, last_seen (unix seconds), ca_pin and more, sorted by name. Raises Unauthenticated,
    PermissionRefused, or Unreachable which names the relay.
    """

    async def once() -> list[dict[str, Any]]:
        token = await tokens.access()
        try:
            return (await relays.first_of(lambda relay: _list_at(relay, token, tokens)))[1]
        except RelaysFailed as failed:
            error = failed.summed_up(lambda error: int(isinstance(error, PermissionRefused)))
            raise error from error.__cause__

    return await tokens.retry_once(once)


async def _list_at(relay: RelayAccess, token: str, tokens: Tokens) -> list[dict[str, Any]]:
    document = await _get(relay, token, tokens)
    if isinstance(document, dict):
        document = document.get("clusters")
    if not isinstance(document, list) or not all(isinstance(one, dict) and "name" in one for one in document):
        raise Unreachable(f"{relay.address.url} did not answer with clusters: is this an arcbridge relay?")
    check_names(relay.address.url, (one["name"] for one in document))
    return sorted(document, key=lambda one: str(one["name"]))


async def _get(relay: RelayAccess, token: str, tokens: Tokens) -> Any:
    url = relay.address.url
    status, body = await request(relay, token, tokens, "/v1/clusters")
    if status == 403:
        raise PermissionRefused(
            "the relay refuses you, as it does where logins were revoked; run `arcbridge login --force`, or ask its "
            "operator"
        )
    if status != 200:
        raise Unreachable(f"the relay {url} answered with status {status}; its log says why")
    return read_answer(url, body)


def read_answer(url: str, body: bytes) -> Any:
    """Return the JSON of a relay's answer. Raises Unreachable."""
    try:
        return read_json(body)
    except ValueError as error:
        raise Unreachable(f"{url} did not answer with JSON: is this an arcbridge relay?") from error


def check_names(url: str, names: Iterable[object]) -> None:
    """Raise Unreachable for a name that no cluster has: it goes to terminals and into files that shells read
    (docs/threats.md#B3)."""
    try:
        for name in names:
            check_cluster_name(str(name))
    except ConfigError as error:
        raise Unreachable(
            f"{url} listed a cluster under a name that no cluster has; tell the relay's operator"
        ) from error
