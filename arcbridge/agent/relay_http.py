"""Calls the relay's HTTP API: a small JSON object there and one back, on a connection each.

It dials through `net.dialer`, so that HTTP proxies work as for every connection. It speaks HTTP/1.0 and repeats
nothing. Invariant: an answer counts only if all the bytes came that its Content-Length announces.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any

from arcbridge.errors import ConnectionLost, EnrolmentRefused, Unreachable
from arcbridge.net.address import Address
from arcbridge.net.dialer import connect
from arcbridge.net.tls import ALPN_HTTP, RelayTrust, outer_client_context
from arcbridge.untrusted_json import read_json

DEADLINE = 20.0
MAX_ANSWER = 256 * 1024


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
    try:
        async with asyncio.timeout(DEADLINE):
            status, headers, body = await _exchange(relay, path, document, trust, certificate)
    except TimeoutError as error:
        raise Unreachable(f"{relay.url} did not answer within {DEADLINE:.0f} s") from error
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise Unreachable(f"{relay.url} cannot be asked: {_reason_of(error)}") from error
    try:
        answer = read_json(body, MAX_ANSWER)
    except ValueError as error:
        raise Unreachable(f"{relay.url} answered something that is not JSON: is this an arcbridge relay?") from error
    if not isinstance(answer, dict):
        raise Unreachable(f"{relay.url} answered something unexpected: is this an arcbridge relay?")
    if status == 200:
        return answer
    failure = answer.get("error")
    message = failure.get("message") if isinstance(failure, dict) else None
    words = message[:300] if isinstance(message, str) and message.isprintable() else f"code {status}"
    if status in (429, 502, 503, 504) or status >= 500:
        hint = headers.get("retry-after", "")
        # A relay's hint is obeyed between 1 s and 10 min (docs/threats.md#B8).
        retry_after = min(max(int(hint), 1), 600) if hint.isdigit() and len(hint) < 6 else None
        raise Unreachable(f"{relay.url}: {words}", retry_after=retry_after)
    raise EnrolmentRefused(f"{relay.url}: {words}")


async def _exchange(
    relay: Address,
    path: str,
    document: dict[str, Any],
    trust: RelayTrust,
    certificate: tuple[str, str] | None,
) -> tuple[int, dict[str, str], bytes]:
    context = outer_client_context(trust, ALPN_HTTP, client_certificate=certificate)
    sock = await connect(relay, deadline=DEADLINE)
    try:
        reader, writer = await asyncio.open_connection(
            sock=sock, ssl=context, server_hostname=relay.host, limit=MAX_ANSWER, ssl_handshake_timeout=5.0
        )
    except BaseException:
        sock.close()
        raise
    try:
        payload = json.dumps(document).encode()
        head = (
            f"POST {path} HTTP/1.0\r\nHost: {relay}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\nUser-Agent: arcbridge-agent\r\n\r\n"
        )
        writer.write(head.encode() + payload)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        parts = lines[0].split(" ", 2)
        if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdigit() or len(parts[1]) != 3:
            raise Unreachable(f"{relay.url} does not speak HTTP: is this an arcbridge relay?")
        fields = [line.partition(":") for line in lines[1:]]
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        length = headers.get("content-length", "")
        if not length.isdigit() or len(length) > 9 or int(length) > MAX_ANSWER:
            raise ConnectionLost(f"{relay.url} answered without a usable length")
        return int(parts[1]), headers, await reader.readexactly(int(length))
    finally:
        writer.transport.abort()


def _reason_of(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); check relay_ca_pin or relay_ca_file"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or 'unknown'})"
    return type(error).__name__
