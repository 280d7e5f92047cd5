"""Fetches the relay's list of the clusters that this user may reach.

It keeps no list, and shows nothing of what a relay says beside it: the fields of a refusal decide alone. Invariant: the
access token is sent only after the relay's certificate is verified, and every row that is returned has a name that a
cluster may have (docs/threats.md#B3).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import aiohttp

from arcbridge import __version__, legacy_refusals
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay import update_notice
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays, RelaysFailed
from arcbridge.client.session.refusal import Shown, of_token
from arcbridge.errors import ConfigError, PermissionRefused, Unreachable
from arcbridge.identity.proof import HEADER
from arcbridge.mux.connection import peer_certificate
from arcbridge.net.http_connector import DialingConnector, NotConnected
from arcbridge.net.http_errors import reason
from arcbridge.net.tls import ALPN_HTTP
from arcbridge.pki.names import check_cluster_name
from arcbridge.refusals import NO_REFUSAL, Refusal, read_refusal
from arcbridge.untrusted_json import read_json

DEADLINE = 15.0
"""Seconds for the whole answer."""
_LIMIT = 8 * 1024 * 1024


async def list_clusters(relays: Relays, tokens: Tokens) -> list[dict[str, Any]]:
    """Get /v1/clusters from the first relay that answers (then `relays.in_use`).

    Each row has name, state, agents, last_seen (unix seconds), ca_pin and more, sorted by name. Raises Unauthenticated,
    PermissionRefused, or Unreachable which names the relay.
    """
    return await tokens.retry_once(lambda: _list_once(relays, tokens))


async def _list_once(relays: Relays, tokens: Tokens) -> list[dict[str, Any]]:
    token = await tokens.access()
    try:
        _, found = await relays.first_of(lambda relay: _list_at(relay, token, tokens))
    except RelaysFailed as failed:
        error = failed.summed_up(lambda error: int(isinstance(error, PermissionRefused)))
        raise error from error.__cause__
    return found


async def _list_at(relay: RelayAccess, token: str, tokens: Tokens) -> list[dict[str, Any]]:
    document = await _get(relay, token, "/v1/clusters", tokens)
    if isinstance(document, dict):
        document = document.get("clusters")
    if not isinstance(document, list) or not all(isinstance(one, dict) and "name" in one for one in document):
        raise Unreachable(f"{relay.address.url} did not answer with clusters: is this an arcbridge relay?")
    for one in document:
        try:
            # A name goes into files that shells read, and to terminals (docs/threats.md#B3).
            check_cluster_name(str(one["name"]))
        except ConfigError as error:
            raise Unreachable(
                f"{relay.address.url} listed a cluster under a name that no cluster has; tell the relay's operator"
            ) from error
    return sorted(document, key=lambda one: str(one["name"]))


class _ProvingConnector(DialingConnector):
    """Puts the proof of the access token into a request once the relay has shown its certificate."""

    def __init__(self, context: ssl.SSLContext, prove: Callable[[bytes], str]) -> None:
        super().__init__(ssl=context)
        self._prove = prove

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> aiohttp.connector.Connection:
        connection = await super().connect(req, traces, timeout)
        if proof := self._prove(peer_certificate(connection.transport)):
            req.headers[HEADER] = proof
        return connection


async def _get(relay: RelayAccess, token: str, path: str, tokens: Tokens) -> Any:
    context = await relay.context(ALPN_HTTP)
    url = relay.address.url
    try:
        async with (
            aiohttp.ClientSession(
                connector=_ProvingConnector(context, lambda certificate: tokens.prove(token, certificate)),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=DEADLINE),
                headers={"User-Agent": f"arcbridge/{__version__}"},
            ) as http,
            http.get(url + path, headers={"Authorization": f"Bearer {token}"}, allow_redirects=False) as response,
        ):
            body = b""
            async for chunk in response.content.iter_chunked(65536):
                body += chunk
                if len(body) > _LIMIT:
                    raise Unreachable(f"{url} answered more than {_LIMIT} bytes")
            status = response.status
            relay.offered_client = response.headers.get(update_notice.HEADER, "")
    except TimeoutError as error:
        raise Unreachable(f"the relay {url} did not answer within {DEADLINE:.0f} s") from error
    except aiohttp.ClientConnectorCertificateError as error:
        relay.forget()
        raise Unreachable(
            f"the relay's certificate is not trusted for {relay.address.host}; "
            "check the relay's address and CA (relay_ca_file, relay_ca_pin)"
        ) from error
    except (aiohttp.ClientError, NotConnected, OSError) as error:
        raise Unreachable(
            f"the relay {url} cannot be reached ({reason(error)}); check its address and this machine's network"
        ) from error
    if status == 401:
        raise of_token(
            "the relay does not accept the access token",
            _refusal(body),
            "the relay",
            Shown(token, tokens.access_source),
        )
    if status == 403:
        raise PermissionRefused("the relay does not let you list clusters; ask its operator for access")
    if status != 200:
        raise Unreachable(f"the relay {url} answered with status {status}; its log says why")
    try:
        return read_json(body)
    except ValueError as error:
        raise Unreachable(f"{url} did not answer with JSON: is this an arcbridge relay?") from error


def _refusal(body: bytes) -> Refusal:
    """Return the refusal that an answer's error names."""
    try:
        error = read_json(body)["error"]
        found = read_refusal(error.get("rule"), error.get("wanted"))
        return found if found.rule else legacy_refusals.read(str(error["message"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return NO_REFUSAL
