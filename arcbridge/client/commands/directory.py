"""Fetches the relay's list of the clusters that this user may reach.

It keeps no list, and shows nothing of what a relay says beside it: the fields of a refusal decide alone. Invariant: the
access token is sent only after the relay's certificate is verified, and every row that is returned has a name that a
cluster may have (docs/threats.md#B3).
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterable
from typing import Any

from arcbridge import __version__, legacy_refusals
from arcbridge.client.credentials.token_files import check_token
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays, RelaysFailed
from arcbridge.client.session.refusal import Shown, of_token
from arcbridge.errors import ConfigError, ConnectionLost, PermissionRefused, Unreachable
from arcbridge.identity.proof import HEADER
from arcbridge.net.tls import ALPN_HTTP, get_once
from arcbridge.pki.names import check_cluster_name
from arcbridge.refusals import NO_REFUSAL, Refusal, read_refusal
from arcbridge.untrusted_json import read_json

DEADLINE = 15.0
"""Seconds for the whole answer."""
_LIMIT = 8 * 1024 * 1024
_OFFERED = re.compile(rb"^arcbridge-client:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
"""The clients that the relay offers (`client.relay.update_notice`)."""


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


async def request(
    relay: RelayAccess,
    token: str,
    tokens: Tokens,
    path: str,
    document: bytes | None = None,
    sending: Callable[[], None] = lambda: None,
) -> tuple[int, bytes]:
    """Return status and body of a GET, or of a POST of a JSON `document`, with the access token and its proof.

    `sending` is called before anything of the request leaves. Raises Unauthenticated for a token that the relay does
    not take, and Unreachable.
    """
    url = relay.address.url
    check_token(token.encode(), "the relay's token")

    def fields(certificate: bytes) -> str:
        sending()
        proof = tokens.prove(token, certificate)
        known = f"User-Agent: arcbridge/{__version__}\r\nAuthorization: Bearer {token}\r\n"
        return f"{known}{HEADER}: {proof}\r\n" if proof else known

    try:
        context = await relay.context(ALPN_HTTP)
        status, head, body = await get_once(
            relay.address, path, context, deadline=DEADLINE, limit=_LIMIT, fields=fields, document=document
        )
    except ssl.SSLCertVerificationError as error:
        relay.forget()
        raise Unreachable(
            f"the relay's certificate is not trusted for {relay.address.host}; "
            "check the relay's address and CA (relay_ca_file, relay_ca_pin)"
        ) from error
    except (Unreachable, ConnectionLost) as error:
        if not error.detail:
            raise
        raise Unreachable(
            f"the relay {url} cannot be reached ({error.detail}); check its address and this machine's network"
        ) from error
    offered = _OFFERED.search(head)
    relay.offered_client = offered[1].decode("latin-1") if offered else ""
    if status == 401:
        raise of_token(
            "the relay does not accept the access token",
            _refusal(body),
            "the relay",
            Shown(token, tokens.access_source),
        )
    return status, body


async def _get(relay: RelayAccess, token: str, tokens: Tokens) -> Any:
    url = relay.address.url
    status, body = await request(relay, token, tokens, "/v1/clusters")
    if status == 403:
        raise PermissionRefused("the relay does not let you list clusters; ask its operator for access")
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


def _refusal(body: bytes) -> Refusal:
    """Return the refusal that an answer's error names."""
    try:
        error = read_json(body)["error"]
        found = read_refusal(error.get("rule"), error.get("wanted"))
        return found if found.rule else legacy_refusals.read(str(error["message"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return NO_REFUSAL
