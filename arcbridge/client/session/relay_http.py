"""Asks a relay's HTTP API for something as this user: one request over a connection of its own.

It reads no answer but a refusal of the token, whose fields alone decide. Invariant: the access token is sent only after
the relay's certificate is verified.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable

from arcbridge import __version__, legacy_refusals
from arcbridge.client.credentials.token_files import check_token
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.session.refusal import Shown, of_token, relay_unreachable
from arcbridge.errors import ConnectionLost, Unreachable
from arcbridge.identity.proof import HEADER
from arcbridge.net.tls import ALPN_HTTP, get_once, untrusted
from arcbridge.refusals import NO_REFUSAL, Refusal, read_refusal
from arcbridge.untrusted_json import read_json

DEADLINE = 15.0
"""Seconds for the whole answer."""
_LIMIT = 8 * 1024 * 1024
_OFFERED = re.compile(rb"^arcbridge-client:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
"""The clients that the relay offers (`client.relay.update_notice`)."""


async def request(
    relay: RelayAccess,
    token: str,
    tokens: Tokens,
    path: str,
    document: bytes | None = None,
    sending: Callable[[], None] = lambda: None,
    measured: Callable[[float], None] = lambda seconds: None,
) -> tuple[int, bytes]:
    """Return status and body of a GET, or of a POST of a JSON `document`, with the access token and its proof.

    `sending` is called before anything of the request leaves, `measured` with the round trip to the relay, seconds.
    Raises Unauthenticated for a token that the relay does not take, and Unreachable.
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
            relay.address,
            path,
            context,
            deadline=DEADLINE,
            limit=_LIMIT,
            fields=fields,
            document=document,
            measured=measured,
        )
    except ssl.SSLCertVerificationError as error:
        relay.forget()
        raise untrusted(relay.address.host, error) from error
    except (Unreachable, ConnectionLost) as error:
        if not error.detail:
            raise
        raise relay_unreachable(url, error) from error
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


def _refusal(body: bytes) -> Refusal:
    """Return the refusal that an answer's error names."""
    try:
        error = read_json(body)["error"]
        found = read_refusal(error.get("rule"), error.get("wanted"))
        return found if found.rule else legacy_refusals.read(str(error["message"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return NO_REFUSAL
