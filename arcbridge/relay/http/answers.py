"""Answers for the relay's HTTP API where it does not do what was asked: every error is a JSON document of ours.

    {"error": {"code": "…", "message": "…", "rule": "…", "wanted": "…"}}

Its message is a sentence for a person; `rule` and `wanted` are there where a token is refused (`refusals`). Nothing
that a peer sent is ever in an answer or in a log, so what aiohttp or a library says of a request stays out of both
(docs/threats.md#A3).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import structlog
from aiohttp import web

from arcbridge import legacy_refusals
from arcbridge.errors import ArcbridgeError, EnrolmentRefused
from arcbridge.identity.refusal import GroupsUnavailable
from arcbridge.refusals import NO_REFUSAL, Refusal
from arcbridge.relay.registry.base import RegistryUnavailable

_CODES = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.UNAUTHORIZED: "unauthenticated",
    HTTPStatus.FORBIDDEN: "forbidden",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_TIMEOUT: "timeout",
    HTTPStatus.CONFLICT: "conflict",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_encoding",
    HTTPStatus.EXPECTATION_FAILED: "unsupported_expectation",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limited",
    HTTPStatus.SERVICE_UNAVAILABLE: "unavailable",
}

_WORDS = {
    HTTPStatus.NOT_FOUND: "there is nothing here: is this the address of the relay's API?",
    HTTPStatus.METHOD_NOT_ALLOWED: "this path does not take this method",
    HTTPStatus.EXPECTATION_FAILED: "the only expectation that is met is 100-continue",
}
"""Replace the texts of aiohttp's own refusals, some of which quote the request."""

_HEADERS = {"Server": "arcbridge", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

log = structlog.get_logger("arcbridge.relay")


class ApiRefusal(ArcbridgeError):
    """The request itself cannot be answered; `status` says why."""

    def __init__(self, status: HTTPStatus, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.status_code = status


async def answer_of(request: web.BaseRequest, handler: Handler) -> web.StreamResponse:
    """Return what `handler` answers, or our own answer in the place of each exception."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        refused = HTTPStatus(error.status)
        return error_answer(refused, _WORDS.get(refused, refused.phrase))
    except ArcbridgeError as error:
        status = HTTPStatus(error.status_code)
        if status >= 500 and status != HTTPStatus.SERVICE_UNAVAILABLE:
            # About this machine, not about the request: the caller gets no paths and no details.
            log.error("request failed", path=_route(request), reason=f"{type(error).__name__}: {error.message}")
            return internal_answer()
        if isinstance(error, RegistryUnavailable):
            origin = f" ({type(error.__cause__).__name__})" if error.__cause__ is not None else ""
            log.error("registry unavailable", path=_route(request), reason=f"{error.message}{origin}")
        if isinstance(error, GroupsUnavailable):
            log.warning("request refused", path=_route(request), reason=error.message, detail=error.detail)
        code = "enrolment_refused" if isinstance(error, EnrolmentRefused) else ""
        message = legacy_refusals.with_rule(error.message, error.refusal)
        answer = error_answer(status, message, code=code, refusal=error.refusal)
        if error.retry_after is not None:
            answer.headers["Retry-After"] = str(error.retry_after)
        if status == HTTPStatus.UNAUTHORIZED:
            answer.headers["WWW-Authenticate"] = "Bearer"
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            answer.force_close()
        return answer
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception as error:
        # Its text may quote a value, so the log gets its kind and place only.
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        raised_at = "" if place is None else f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        log.error("request failed", path=_route(request), reason=type(error).__name__, raised_at=raised_at)
        return internal_answer()


def error_answer(status: HTTPStatus, message: str, *, code: str = "", refusal: Refusal = NO_REFUSAL) -> web.Response:
    error = {"code": code or _CODES.get(status, status.name.lower()), "message": message}
    # Its holder learns what is wrong with a token.
    error |= refusal.fields()
    return web.json_response({"error": error}, status=status, headers=_HEADERS)


def internal_answer() -> web.Response:
    return error_answer(
        HTTPStatus.INTERNAL_SERVER_ERROR, "the relay failed: its log has the cause; tell its operator", code="internal"
    )


async def set_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def refuse_page(request: web.BaseRequest) -> None:
    """Raise `ApiRefusal` for what a browser sends on behalf of a page: nothing here is for one (docs/threats.md#W5)."""
    if "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") != "none":
        raise ApiRefusal(HTTPStatus.FORBIDDEN, "the relay's API is not for web pages")


def _route(request: web.BaseRequest) -> str:
    """Return the route's pattern: what is in the log comes from us, not from the peer."""
    resource = request.match_info.route.resource if isinstance(request, web.Request) else None
    return "" if resource is None else resource.canonical
