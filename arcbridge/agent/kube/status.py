"""Answers of our own, in the words of Kubernetes: `metav1.Status` as JSON.

Source: Kubernetes API conventions, "Response Status Kind". kubectl prints `message`, so it is one sentence that says
what happened and what to do, and begins with `arcbridge:` so that nobody looks for the cause in the cluster.

`Retry-After` makes client-go repeat *every* method, POST too, ten times. So a refusal may carry it only where the
request surely never left this process.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from aiohttp import web

from arcbridge.errors import ArcbridgeError

_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    413: "RequestEntityTooLarge",
    429: "TooManyRequests",
    431: "RequestHeaderFieldsTooLarge",
    500: "InternalError",
    502: "BadGateway",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class Refusal(ArcbridgeError):
    """A request that is answered by us with this code; `message` goes to the caller as it is, after `arcbridge: `."""

    def __init__(self, code: int, message: str, *, retry_after: int | None = None, prefix: str = "arcbridge: ") -> None:
        super().__init__(prefix + message, retry_after=retry_after)
        self.status_code = code
        self.reason = _REASONS[code]


def bad_request(message: str) -> Refusal:
    """A request that is malformed, or that two parsers could read differently."""
    return Refusal(400, message)


def status_body(error: ArcbridgeError) -> bytes:
    """The Status object of `error` as JSON."""
    document = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": error.message,
        "reason": error.reason,
        "code": error.status_code,
    }
    return json.dumps(document).encode()


def status_response(error: ArcbridgeError, *, request_id: str = "", close: bool = False) -> web.Response:
    """The answer for `error`; `close` ends the connection after it."""
    headers = {"Server": "arcbridge", "Cache-Control": "no-cache, private"}
    if request_id:
        headers["Audit-Id"] = request_id
    if close:
        headers["Connection"] = "close"  # said aloud also where the request could not be read far enough for a version
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    code = error.status_code
    response = web.Response(
        status=code,
        reason=HTTPStatus(code).phrase,
        body=status_body(error),
        content_type="application/json",
        headers=headers,
    )
    if close:
        response.force_close()
    return response


def status_bytes(error: ArcbridgeError, *, request_id: str) -> bytes:
    """The same as a whole HTTP/1.1 answer, after which the connection goes on."""
    body = status_body(error)
    code = error.status_code
    lines = [
        f"HTTP/1.1 {code} {HTTPStatus(code).phrase}",
        "Server: arcbridge",
        "Cache-Control: no-cache, private",
        f"Audit-Id: {request_id}",
        "Content-Type: application/json; charset=utf-8",
        f"Content-Length: {len(body)}",
    ]
    if error.retry_after is not None:
        lines.append(f"Retry-After: {error.retry_after}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
