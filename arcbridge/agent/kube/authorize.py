"""Decides who a request runs as, and with which headers it leaves the agent: one decision for both entrances.

`authorize` takes a caller and the facts of a request, from the fast path or from the general parser, and returns a
`Plan` or raises a `RequestRefusal`. It sends, counts and records nothing; `attempt` does, and asks for the limits
first. Invariant: there is no plan for a subject other than the caller himself unless the API server's approval of
exactly that pair is shown; a head leaves with exactly one Impersonate-User where the agent authenticates itself, and
with a request id that can stand in a header, or not at all.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from aiohttp import HttpVersion10

from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.kube.caller import SAFE_ID, Caller, token_digest
from arcbridge.agent.kube.impersonation import (
    Subject,
    bearer_token,
    cleaned_headers,
    header_lines,
    impersonated_headers,
    own_token_headers,
    passed_lines,
)
from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.kube.request_target import RequestTarget
from arcbridge.agent.kube.review import Approval
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upgrade import UpgradeRequest, requested_upgrade
from arcbridge.agent.kube.upstream_pool import UpstreamRequest
from arcbridge.identity.authentication import ACTOR, ELEVATED, ORIGINAL_USER, RESTRICTED
from arcbridge.identity.claims import Identity

_REQUIRES_LENGTH = frozenset({"POST", "PUT", "PATCH", "DELETE"})


@dataclass(slots=True, kw_only=True)
class Plan(UpstreamRequest):
    """A request that may leave. It is not changed; it is not frozen either, because one is made for each request."""

    facts: RequestFacts
    wanted: RequestTarget
    own: bool
    """Whether the agent authenticates itself and impersonates; else the caller's token does (token mode)."""
    tls: ssl.SSLContext
    """The settings of the connection that the request may leave on."""


@dataclass(eq=False)
class ReviewNeeded(Exception):
    """The request asks to run as another user, and no approval of that was shown."""

    identity: Identity
    subject: Subject


class TokenUnknown(Exception):
    """The request carries a token that its session does not hold."""

    def __init__(self, token: bytes) -> None:
        super().__init__("the token has to be reviewed first")  # an exception's text may be logged
        self.token = token


def authorize(
    api: ApiServer,
    caller: Caller,
    facts: RequestFacts,
    wanted: RequestTarget,
    request_id: str,
    subject: Subject | None = None,
    approval: Approval | None = None,
) -> Plan:
    """Return how the request `request_id` goes on. Nothing has left when it raises RequestRefusal, for what the session
    gave up among others: that comes before `--as` is looked at.

    `subject`: whom `--as` asks for. Raises ReviewNeeded for one unless `approval` is of this identity and of exactly
    that subject, and in token mode TokenUnknown for a token that the session does not hold.
    """
    if (lent := caller.lent) is None:
        identity, restrictions = caller.identity, caller.restrictions
    else:
        identity, restrictions = lent.identity, lent.restrictions
    if restrictions is not None:
        restrictions.check(facts, wanted.info)
    own = not caller.token_mode
    tls, authorization = api.credentials(own=own)
    if caller.token_mode:  # the API server judges `--as`
        token = bearer_token(facts)
        if token_digest(token) not in caller.tokens:
            raise TokenUnknown(token)
        lines = header_lines(own_token_headers(facts))
    elif subject is None:
        passed = facts.plain if facts.plain is not None else passed_lines(facts)
        lines = passed + caller.subject_lines.of(identity, authorization, api.impersonable)
    elif approval is None or approval.identity is not identity or approval.subject != subject:
        raise ReviewNeeded(identity, subject)
    else:
        actor = (identity.actor,) if identity.actor else ()
        added = ((RESTRICTED, caller.words), (ELEVATED, identity.extra.get(ELEVATED, ())), (ACTOR, actor))
        own_extra = [(key, value) for key, values in added for value in values]
        extra = (*subject.extra, (ORIGINAL_USER, identity.username), *own_extra)
        other = Subject(subject.user, subject.uid, subject.groups, extra)
        lines = header_lines(impersonated_headers(cleaned_headers(facts), other, authorization=authorization))
    upgrade = requested_upgrade(facts, wanted.info.subresource) if facts.plain is None else None
    repeatable = facts.method in ("GET", "HEAD") and not facts.has_body and upgrade is None
    start = f"{facts.method} {facts.target} HTTP/1.1\r\nHost: {api.authority}\r\nAudit-ID: {request_id}\r\n"
    head = start.encode() + lines + (b"\r\n" if repeatable else _framing(facts, upgrade))
    if not SAFE_ID.fullmatch(request_id):
        raise RequestRefusal(500, "a header of the outgoing request is malformed; nothing was sent")
    if own and head.lower().count(b"\r\nimpersonate-user:") != 1:  # the last look at what leaves
        raise RequestRefusal(500, "the outgoing request does not carry the caller's identity; nothing was sent")
    framed = facts.version > HttpVersion10
    return Plan(head, facts.method, upgrade, repeatable, framed, facts=facts, wanted=wanted, own=own, tls=tls)


def _framing(facts: RequestFacts, upgrade: UpgradeRequest | None) -> bytes:
    """Return the end of a head that may not be sent again: on a connection of its own."""
    if upgrade is not None:
        empty = "Content-Length: 0\r\n" if facts.method == "POST" else ""
        return f"{empty}Connection: Upgrade\r\nUpgrade: {upgrade.protocol}\r\n\r\n".encode()
    length = facts.length if facts.has_body else "0" * (facts.method in _REQUIRES_LENGTH)
    body = f"Content-Length: {length}\r\n" if length else "Transfer-Encoding: chunked\r\n" * facts.has_body
    return f"Connection: close\r\n{body}\r\n".encode()
