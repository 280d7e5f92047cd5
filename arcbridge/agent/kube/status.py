"""The agent's own answers, in the words of Kubernetes: `metav1.Status` as JSON, in whole HTTP/1.1 messages.

Source: Kubernetes API conventions, "Response Status Kind". kubectl prints `message`, so it is one sentence that says
what happened and what to do, and begins with `arcbridge:` so that the reader does not look for the cause in the
cluster.

`Retry-After` in seconds makes client-go repeat *every* method, POST too, ten times. So a refusal may carry it only
where the request surely never left this process, and it is small: kubectl is silent while it waits. A time that is far
away is a date (RFC 9110 §10.2.3), which client-go does not wait for: kubectl shows the message at once.
"""

from __future__ import annotations

import json
from email.utils import formatdate
from http import HTTPStatus

from arcbridge.errors import ArcbridgeError
from arcbridge.refusals import NO_REFUSAL, Refusal

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


class RequestRefusal(ArcbridgeError):
    """A request that the agent answers itself with this code; `message` goes to the caller after `arcbridge: `."""

    def __init__(
        self,
        code: int,
        message: str,
        *,
        retry_after: int | None = None,
        retry_at: float = 0.0,
        hold: float = 0.0,
        limit: str = "",
        refusal: Refusal = NO_REFUSAL,
        prefix: str = "arcbridge: ",
        more: str = "",
    ) -> None:
        super().__init__(prefix + message, retry_after=retry_after)
        self.status_code = code
        self.reason = _REASONS[code]
        self.ours = bool(prefix)
        """Whether the sentence is the agent's, and not one that Kubernetes would have."""
        self.refusal = refusal
        self.retry_at = retry_at
        """Unix seconds before which another try is in vain; 0: `retry_after` says all."""
        self.limit = limit
        """`accounts.Limit` that the request reached after it was authorized, to be reported yet; else empty."""
        self.more = more
        """What stands behind the message, for `doctor`: kubectl shows the message alone, up to six times."""
        self.hold = hold
        """Seconds for which the answer is held, so that a flood costs no more than its streams."""


def bad_request(message: str) -> RequestRefusal:
    """Return a request that is malformed, or that two parsers could read differently."""
    return RequestRefusal(400, message)


def _message(error: ArcbridgeError, request_id: str) -> str:
    """Return the message: one of ours ends with the request's id, because kubectl shows no header; Kubernetes' own
    words stay."""
    ours = isinstance(error, RequestRefusal) and error.ours
    return f"{error.message} (request {request_id})" if request_id and ours else error.message


def status_body(error: ArcbridgeError, request_id: str = "") -> bytes:
    """Return the Status object of `error` as JSON."""
    document: dict[str, object] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": _message(error, request_id),
        "reason": error.reason,
        "code": error.status_code,
    }
    details: dict[str, object] = {}
    if error.retry_after is not None:
        details["retryAfterSeconds"] = error.retry_after
    if error.refusal.rule:
        more = error.more if isinstance(error, RequestRefusal) else ""
        details["causes"] = [{"reason": error.refusal.rule, "message": more or error.refusal.wanted}]
    if details:
        document["details"] = details
    return json.dumps(document).encode()


def json_answer(code: int, document: bytes, *, request_id: str) -> bytes:
    """Return a whole HTTP/1.1 answer with a document, whose connection ends behind it."""
    return (
        f"HTTP/1.1 {code} {HTTPStatus(code).phrase}\r\nServer: arcbridge\r\nCache-Control: no-cache, private\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(document)}\r\nAudit-Id: {request_id}\r\n"
        "Connection: close\r\n\r\n"
    ).encode() + document


DISCOVERY = frozenset(("api", "apis", "openapi", "version"))
"""First segments of the paths at which kubectl and client-go ask what there is, before anything else. Their client for
that decodes no Status and says "unknown"; a text it does show (k8s.io/client-go, rest/request.go,
`newUnstructuredResponseError`)."""


def status_answer(
    error: ArcbridgeError, *, request_id: str = "", close: bool = False, method: str = "GET", path: str = ""
) -> bytes:
    """Return the whole HTTP/1.1 answer for `error`; with `close` it says that the connection ends behind it.

    `path`: the class of the request's path, where it names no resource; a failure is a text at those of `DISCOVERY`.
    """
    code = error.status_code
    as_text = code >= 500 and path in DISCOVERY
    body = _message(error, request_id).encode() if as_text else status_body(error, request_id)
    kind = "text/plain" if as_text else "application/json"
    lines = [
        f"HTTP/1.1 {code} {HTTPStatus(code).phrase}",
        "Server: arcbridge",
        "Cache-Control: no-cache, private",
        f"Content-Type: {kind}; charset=utf-8",
        f"Content-Length: {len(body)}",
    ]
    if request_id:
        lines.append(f"Audit-Id: {request_id}")
    if error.retry_after is not None:
        lines.append(f"Retry-After: {error.retry_after}")
    elif isinstance(error, RequestRefusal) and error.retry_at:
        lines.append(f"Retry-After: {formatdate(error.retry_at, usegmt=True)}")
    if code == 401:
        lines.append("WWW-Authenticate: Bearer")
    if close:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else body)
