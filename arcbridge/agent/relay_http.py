"""Calls the relay's HTTP API: a small JSON object there and one back, on a connection each.

It asks as `net.fetch` does for every document, with the agent's certificate where it has one, and repeats nothing.
Invariant: an answer counts only as a whole, which a JSON object is or is not.
"""

from __future__ import annotations

import json
import ssl
from typing import Any

import aiohttp

from arcbridge.errors import EnrolmentRefused, Unreachable, UntrustedCertificate
from arcbridge.net.address import Address
from arcbridge.net.fetch import HttpFetcher
from arcbridge.net.tls import ALPN_HTTP, RelayTrust, outer_client_context
from arcbridge.untrusted_json import read_json

DEADLINE = 20.0
MAX_ANSWER = 256 * 1024

MAX_WORDS = 600
"""Characters of a relay's refusal that are repeated: more than the longest that a relay has, with two pins in it."""


async def post(
    relay: Address,
    path: str,
    document: dict[str, Any],
    trust: RelayTrust,
    *,
    certificate: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Send `document` by POST and return the JSON object that came back.

    Raises EnrolmentRefused with the relay's words for a 4xx, Unreachable (with `retry_after`) for what may succeed
    later. Cancelled or failed, it leaves no socket.
    """
    context = outer_client_context(trust, ALPN_HTTP, client_certificate=certificate)
    headers = {"Content-Type": "application/json", "User-Agent": "arcbridge-agent"}
    fetcher = HttpFetcher(deadline=DEADLINE, limit=MAX_ANSWER)
    try:
        body = json.dumps(document).encode()
        reply = await fetcher.ask("POST", f"{relay.url}{path}", context, headers=headers, body=body)
    except Unreachable as error:
        if error.detail:
            raise  # the dialer's sentence names the relay
        raise Unreachable(f"{relay.url} {_failure(error)}") from error
    finally:
        await fetcher.close()
    try:
        answer = read_json(reply.body, MAX_ANSWER)
    except ValueError as error:
        raise Unreachable(f"{relay.url} answered something that is not JSON: is this an arcbridge relay?") from error
    if not isinstance(answer, dict):
        raise Unreachable(f"{relay.url} answered something unexpected: is this an arcbridge relay?")
    if reply.status == 200:
        return answer
    failure = answer.get("error")
    message = failure.get("message") if isinstance(failure, dict) else None
    words = message[:MAX_WORDS] if isinstance(message, str) and message.isprintable() else f"code {reply.status}"
    if reply.status == 429 or reply.status >= 500:
        # A relay's hint is obeyed between 1 s and 10 min (docs/threats.md#B8).
        hinted = None if reply.retry_after is None else int(min(max(reply.retry_after, 1), 600))
        raise Unreachable(f"{relay.url}: {words}", retry_after=hinted)
    raise EnrolmentRefused(f"{relay.url}: {words}")


def _failure(error: Unreachable) -> str:
    """Return why a relay that was reached gave no whole answer, and what to do where that is known."""
    cause = error.__cause__
    if isinstance(error, UntrustedCertificate):
        return f"cannot be asked: {error.message}; check relay_ca_pin or relay_ca_file"
    if isinstance(cause, aiohttp.ClientResponseError):
        return "does not speak HTTP: is this an arcbridge relay?"
    if isinstance(cause, aiohttp.ServerDisconnectedError):
        return "ended the connection without an answer: is this an arcbridge relay?"
    if isinstance(cause, aiohttp.ClientConnectorSSLError) and isinstance(cause.os_error, ssl.SSLError):
        return f"cannot be asked: TLS failed ({cause.os_error.reason or 'unknown'}); is this an arcbridge relay?"
    return f"cannot be asked: {error.message}"
