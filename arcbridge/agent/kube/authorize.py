"""Who a request runs as, and with which headers it leaves the agent: one decision for both entrances.

`Authorizer.authorize` takes a caller and the head of a request, from the fast path or from the general parser, and
answers a `Plan` or raises a `RequestRefusal`. It sends nothing and reads no body. Invariant: there is no plan for a
subject other than the caller himself unless the API server's approval of exactly that pair is shown.

The steps, in this order: framing (it decides whether the stream can go on), limits, header names and target, what is
asked for (for the audit record), whether the audit log can be written, the subject (`--as`) or the caller's own token,
the outgoing headers, the upgrade asked for. Limits come before all work that grows with what the caller sent: a request
that is over a limit is not read for its record, unless it is the one of its burst that leaves a record.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog
from aiohttp import HttpVersion11
from aiohttp.http import HttpVersion

from arcbridge.agent.accounts import Account, Limit
from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.agent.audit.log import Recorded
from arcbridge.agent.audit.record import Value
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.kube.framing import check_framing, content_length, has_body
from arcbridge.agent.kube.impersonation import (
    ORIGINAL_USER,
    Headers,
    RawHeaders,
    Subject,
    bearer_token,
    check_names,
    impersonated_headers,
    own_token_headers,
    requested_subject,
)
from arcbridge.agent.kube.pod_body import is_inspected
from arcbridge.agent.kube.request_target import RequestTarget, query_details, request_target
from arcbridge.agent.kube.review import Approval, Reviewer
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upgrade import UpgradeRequest, asks_upgrade, requested_upgrade
from arcbridge.identity.claims import Identity
from arcbridge.limiters import TokenBucket
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.frames import ResetCode

MAX_IN_FLIGHT = 5000
"""Requests of all sessions together that are under way: more are refused (429) before they leave."""
MAX_TOKENS = 8
"""Tokens of one session that are remembered: the one of AUTH, and those that it was renewed with."""
TOKEN_REVIEWS = 8
"""Reviews of tokens that a session's requests may cause at once, and one more each five seconds."""
SAFE_ID = re.compile(r"[0-9A-Za-z.-]{1,200}")
"""Session names and request ids that may stand in a header as they are; the relay makes the names."""

MAX_JOIN_ID = 20
"""Characters of a join id that request ids begin with; a relay's have 16. With all of it, some parts of the API server
would cut the agent's own part off."""

_REQUIRES_LENGTH = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_MALFORMED = "a header of the outgoing request is malformed; nothing was sent"

_log = structlog.get_logger("arcbridge.agent")


class RequestHead:
    """The head of a request, as either entrance read it."""

    __slots__ = ("fields", "method", "plain", "target", "version")

    def __init__(
        self,
        method: str,
        target: str,
        fields: RawHeaders = (),
        *,
        version: HttpVersion = HttpVersion11,
        plain: bytes | None = None,
    ) -> None:
        self.method = method
        self.target = target
        """Origin-form, as the caller sent it."""
        self.fields = fields
        """(name, value) pairs in order; none of a plain request."""
        self.version = version
        self.plain = plain
        """The header lines of a plain request (`fast_path_parser`) as they go on, each checked; else None."""


class SubjectLines:
    """The header lines that make a request run as the caller; cached for one identity and one credential."""

    __slots__ = ("_authorization", "_identity", "_lines")

    def __init__(self) -> None:
        self._identity: Identity | None = None
        self._authorization = ""
        self._lines = b""

    def of(self, identity: Identity, authorization: str, impersonable: frozenset[str] | None = None) -> bytes:
        """Answer the lines for an identity, the agent's own Authorization, and the groups that it may impersonate.

        Raises RequestRefusal.
        """
        if identity is not self._identity or authorization != self._authorization:
            self._identity = None
            subject = Subject.of(identity, impersonable)
            self._lines = _serialised(impersonated_headers([], subject, authorization=authorization))
            self._identity, self._authorization = identity, authorization
        return self._lines


class ReviewedTokens:
    """The tokens of one session in token mode that the API server has reviewed, as hashes.

    A request carries its own token. Were it another's, the API server would see another user than the audit log.
    """

    def __init__(self) -> None:
        self._hashes: list[bytes] = []

    def add(self, digest: bytes) -> None:
        """A token was reviewed (its `token_digest`); of many the newest are remembered."""
        if digest and digest not in self._hashes:
            self._hashes = [*self._hashes[1 - MAX_TOKENS :], digest]

    def __contains__(self, digest: bytes) -> bool:
        found = False
        for known in self._hashes:  # all of them: how long it takes says nothing
            found |= hmac.compare_digest(known, digest)
        return found


def token_digest(token: bytes) -> bytes:
    """Return what is kept of a token."""
    return hashlib.sha256(token).digest()


@dataclass(slots=True)
class Caller:
    """Who a session speaks for."""

    session: str
    """The join id."""
    identity: Identity
    """Replaced at each renewal of the token; read anew for each request."""
    account: Account
    """What the user holds over all sessions."""
    token_mode: bool = False
    """The caller's own bearer token goes on in each request; the agent does not impersonate."""
    proved_key: str = ""
    """Thumbprint of the key to which the session's token is bound; empty: it is not bound."""
    bound: str = "none"
    """How it is bound, for the audit log: one of `identity.proof.BindingKind`, as the text that it is."""
    connected_since: float = 0.0
    """When the session got its present connection, monotonic seconds; infinity while it has none."""
    subject_lines: SubjectLines = field(default_factory=SubjectLines)
    plain_lines: dict[bytes, bytes | None] = field(default_factory=dict)
    """What became of header lines that came before; `fast_path_parser` fills and bounds it."""
    tokens: ReviewedTokens = field(default_factory=ReviewedTokens)
    """The tokens that requests may carry, in token mode."""
    review_token: Callable[[str], Awaitable[bool]] | None = None
    """Asks whether a token that is not among them is the same user's; None: no other token is taken."""
    reviews: TokenBucket = field(default_factory=lambda: TokenBucket(TOKEN_REVIEWS, 0.2))
    """How often that is asked."""
    upgraded: dict[str, tuple[StreamTransport, AuditRecord]] = field(default_factory=dict)
    """By request id, the upgrades that the API server was asked for as this caller and that are not over."""
    request_prefix: str = ""
    """What the ids of its requests begin with: the join id, which the relay chooses, and a part that the agent does. So
    no relay chooses the id under which the API server's audit log has a request, nor gives two requests one."""

    def __post_init__(self) -> None:
        self.bound = self.identity.binding.kind.value
        self.request_prefix = f"{self.session[:MAX_JOIN_ID]}-{secrets.token_hex(8)}"

    def adopt(self, identity: Identity, proved_key: str) -> None:
        """Take over the identity of a renewed token, and the key that came with its proof."""
        self.identity, self.proved_key, self.bound = identity, proved_key, identity.binding.kind.value

    def end_upgraded(self, reason: str) -> int:
        """Reset the upgraded streams, with a reason for their records; answers how many there were."""
        streams = list(self.upgraded.values())
        for stream, record in streams:
            record.outcome, record.reason = "cut", reason
            stream.abort(ResetCode.FORBIDDEN)
        return len(streams)

    def request_id(self, stream_id: int, number: int) -> str:
        """Return the id of a request: the `number`th of a stream."""
        return f"{self.request_prefix}-{stream_id}-{number}"


@dataclass(slots=True)
class StreamContext:
    """One stream of a session, which is one HTTP/1.1 connection of the caller."""

    caller: Caller
    stream_id: int
    requests: int = 0
    """Requests that began on it so far."""
    admitted: bool = False
    """The request under way counts among the user's and the agent's."""
    upgrading: bool = False
    """The request under way counts among the user's upgrades."""
    unrecorded: bool = False
    """The request under way leaves no record: it is one of a burst of refusals that was reported."""


@dataclass(slots=True)
class ProxyStats:
    """Counters of all requests; the metrics read them."""

    requests: int = 0
    in_flight: int = 0
    upgrades: int = 0
    upgrades_open: int = 0
    refused: int = 0
    cut: int = 0
    code_1xx: int = 0
    code_2xx: int = 0
    code_3xx: int = 0
    code_4xx: int = 0
    code_5xx: int = 0

    def count(self, status: int) -> None:
        """Count one answer by the class of its code."""
        if 200 <= status < 300:
            self.code_2xx += 1
            return
        name = f"code_{status // 100}xx"
        setattr(self, name, getattr(self, name) + 1)


@dataclass(slots=True)
class Plan:
    """A request that may leave. It is not changed; it is not frozen either, because one is made for each request."""

    request_id: str
    method: str
    target: str
    lines: bytes
    """The outgoing header lines but Host, Audit-ID and those that frame the message."""
    own: bool
    """Whether the agent authenticates itself and impersonates; else the caller's token does (token mode)."""
    has_body: bool
    length: str
    """The caller's Content-Length, empty where the body is chunked."""
    upgrade: UpgradeRequest | None
    begins: bool = False
    """Whether the record `begun` is written before the request leaves."""
    inspected: bool = False
    """Whether its body is looked at on its way (`pod_body`)."""

    @property
    def repeatable(self) -> bool:
        """Whether the request may use an idle connection, and be sent again where that one turns out dead."""
        return self.method in ("GET", "HEAD") and not self.has_body and self.upgrade is None

    def request_head(self, authority: str) -> bytes:
        """Return the head as it is sent to the API server at `authority`. Raises RequestRefusal if it is not as
        meant."""
        start = f"{self.method} {self.target} HTTP/1.1\r\nHost: {authority}\r\nAudit-ID: {self.request_id}\r\n".encode()
        if self.repeatable:
            framing = b"\r\n"
        elif self.upgrade is not None:
            empty = "Content-Length: 0\r\n" if self.method == "POST" else ""
            framing = f"{empty}Connection: Upgrade\r\nUpgrade: {self.upgrade.protocol}\r\n\r\n".encode()
        else:
            length = self.length or ("0" if not self.has_body and self.method in _REQUIRES_LENGTH else "")
            body = f"Content-Length: {length}\r\n" if length else "Transfer-Encoding: chunked\r\n" * self.has_body
            framing = f"Connection: close\r\n{body}\r\n".encode()
        head = start + self.lines + framing
        if not SAFE_ID.fullmatch(self.request_id):
            raise RequestRefusal(500, _MALFORMED)
        if self.own and head.lower().count(b"\r\nimpersonate-user:") != 1:  # the last look before the request leaves
            raise RequestRefusal(500, "the outgoing request does not carry the caller's identity; nothing was sent")
        return head


class ReviewNeeded(Exception):
    """The request asks to run as another user, and no approval of that was shown."""

    def __init__(self, identity: Identity, subject: Subject) -> None:
        super().__init__("impersonation has to be reviewed first")
        self.identity = identity
        self.subject = subject


class TokenUnknown(Exception):
    """The request carries a token that its session does not hold."""

    def __init__(self, token: bytes) -> None:
        super().__init__("the token has to be reviewed first")
        self.token = token


class Authorizer:
    """Authorizes the requests of one agent, and keeps their accounts: counters and audit records."""

    def __init__(self, api: ApiServer, audit: AuditLog, reviewer: Reviewer) -> None:
        self._api = api
        self._audit = audit
        self._reviewer = reviewer
        self.stats = ProxyStats()

    # -- accounts -------------------------------------------------------------------------------------------------

    def begin(self, stream: StreamContext, method: str) -> AuditRecord:
        """Count a request that begins; each `begin` needs one `finish`."""
        stream.requests += 1
        self.stats.requests += 1
        caller = stream.caller
        return AuditRecord(
            request=caller.request_id(stream.stream_id, stream.requests),
            session=caller.session,
            user=caller.identity.username,
            groups=len(caller.identity.groups),
            bound=caller.bound,
            method=method,
            budget=caller.account.audit,
        )

    def refuse(self, stream: StreamContext, record: AuditRecord, refusal: RequestRefusal) -> None:
        """Count a request that the agent answers itself as no more under way."""
        self._release(stream)
        if refusal.limit:
            self._report(stream, record, Limit(refusal.limit))
        record.status, record.reason = refusal.status_code, refusal.message
        if record.outcome == "answered":
            record.outcome = "refused"
        if refusal.status_code >= 500:
            _log.warning("request failed", session=record.session, request=record.request, reason=refusal.message)

    def finish(self, stream: StreamContext, record: AuditRecord) -> None:
        """Count a request that is over, however it ended, and write its record."""
        self._release(stream)
        if record.status:
            self.stats.count(record.status)
        if record.outcome == "refused":
            self.stats.refused += 1
        elif record.outcome == "cut":
            self.stats.cut += 1
        if stream.unrecorded:
            stream.unrecorded = False
        else:
            self._audit.write(record)

    # -- the decision ---------------------------------------------------------------------------------------------

    def authorize(
        self, stream: StreamContext, head: RequestHead, record: AuditRecord, approval: Approval | None = None
    ) -> Plan:
        """Answer how the request goes on. Nothing has left when it raises RequestRefusal.

        Raises ReviewNeeded for `--as` unless `approval` is of this identity and of exactly the subject asked for, and
        in token mode TokenUnknown for a token that the session does not hold.
        """
        caller = stream.caller
        identity = caller.identity
        if head.plain is None:
            check_framing(head.method, head.version, head.fields)
        if not stream.admitted:  # else it was, before the review of `--as`
            self._admit(stream, record, head)
        wanted = self._read(head, record)
        if refusal := self._audit.refusal():
            raise RequestRefusal(503, refusal)
        if (wanted.begins or self._audit.refuses) and caller.account.audit.is_spent(record.started):
            raise self._too_much(stream, record, Limit.AUDIT_BYTES)  # nothing that must be recorded goes on without
        if caller.token_mode:
            own, lines = False, _serialised(self._own_token(caller, head, record))
        elif head.plain is not None:
            subject_lines = caller.subject_lines.of(identity, self._api.authorization(), self._api.impersonable)
            own, lines = True, head.plain + subject_lines
        else:
            subject = self._subject(identity, head, record, approval)
            authorization = self._api.authorization()
            own, lines = True, _serialised(impersonated_headers(head.fields, subject, authorization=authorization))
        if head.plain is not None:
            return Plan(record.request, head.method, head.target, lines, own, False, "", None, wanted.begins)
        body = has_body(head.fields)
        upgrade = requested_upgrade(head.method, head.fields, wanted.info, has_body=body)
        if upgrade is not None:
            record.upgrade = upgrade.protocol
            self._admit_upgrade(stream, record)
        length = content_length(head.fields) if body else ""
        inspected = body and is_inspected(wanted.info, head.method)
        return Plan(
            record.request, head.method, head.target, lines, own, body, length, upgrade, wanted.begins, inspected
        )

    async def authorize_reviewed(self, stream: StreamContext, head: RequestHead, record: AuditRecord) -> Plan:
        """`authorize`, after the API server has reviewed `--as`, or another token, where that is asked for.

        Raises RequestRefusal.
        """
        approval = None
        while True:  # once more where the caller's identity was renewed during the review
            try:
                return self.authorize(stream, head, record, approval)
            except ReviewNeeded as needed:
                approval = await self._reviewer.approve(needed.identity, needed.subject)
            except TokenUnknown as unknown:
                await self._review_token(stream.caller, unknown.token)

    # -- records before the first byte ----------------------------------------------------------------------------

    @property
    def commands(self) -> bool:
        """Whether records hold command lines."""
        return self._audit.commands

    def record_begun(self, record: AuditRecord, recorded: Recorded) -> None:
        """Write that a request begins; `recorded` is called with a refusal, or without when the request may leave."""
        self._audit.begin(record, recorded)

    async def recorded_begun(self, record: AuditRecord) -> None:
        """`record_begun`, awaited. Raises RequestRefusal."""
        if refusal := await self._audit.begun(record):
            raise RequestRefusal(503, refusal)

    async def recorded_details(self, record: AuditRecord, details: dict[str, Value]) -> None:
        """Write what a request's body asks for. Raises RequestRefusal."""
        record.details = details
        if refusal := await self._audit.detailed(record):
            raise RequestRefusal(503, refusal)

    def note_details(self, record: AuditRecord, details: dict[str, Value]) -> None:
        """Write what a running stream has asked for, without keeping it waiting."""
        record.details = details
        self._audit.detail(record, lambda _: None)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _admit(self, stream: StreamContext, record: AuditRecord, head: RequestHead) -> None:
        """Count the request, or refuse it as too much before anything leaves. Every limit on requests is here."""
        account, now = stream.caller.account, record.started
        limit = account.admit_request(now)
        if limit is None and self.stats.in_flight >= MAX_IN_FLIGHT:
            account.end_request()
            limit = Limit.AGENT_REQUESTS
        if limit is not None:
            refusal = self._too_much(stream, record, limit)
            if not stream.unrecorded:
                with suppress(RequestRefusal):  # the limit is the reason that counts
                    self._read(head, record)
            raise refusal
        stream.admitted = True
        self.stats.in_flight += 1

    def _admit_upgrade(self, stream: StreamContext, record: AuditRecord) -> None:
        limit = stream.caller.account.admit_upgrade()
        if limit is not None:
            raise self._too_much(stream, record, limit)
        stream.upgrading = True

    def _too_much(self, stream: StreamContext, record: AuditRecord, limit: Limit) -> RequestRefusal:
        """Return the refusal of a request that is over a limit; one of each burst is logged and recorded."""
        account, now = stream.caller.account, record.started
        reached = account.explain(limit)
        self._report(stream, record, limit)
        return RequestRefusal(
            429, reached.message, retry_after=reached.retry_after, retry_at=reached.retry_at, hold=account.hold(now)
        )

    @staticmethod
    def _report(stream: StreamContext, record: AuditRecord, limit: Limit) -> None:
        """Count a refusal; one of each burst is logged and recorded."""
        omitted = stream.caller.account.refuse(limit, time.monotonic())
        stream.unrecorded = omitted is None and not record.begun  # `begun` has its `ended`, whatever came of it
        if omitted is not None:
            record.limit, record.omitted = limit, omitted
            _log.warning("limit reached", session=record.session, user=record.user, reason=limit.value, omitted=omitted)

    def _release(self, stream: StreamContext) -> None:
        """The request that is under way on a stream counts no more."""
        if stream.admitted:
            stream.admitted = False
            self.stats.in_flight -= 1
            stream.caller.account.end_request()
            if stream.upgrading:
                stream.upgrading = False
                stream.caller.account.end_upgrade()

    def _read(self, head: RequestHead, record: AuditRecord) -> RequestTarget:
        """Return what a head asks for, and write it into the record. Raises RequestRefusal for one that is not passed
        on."""
        upgrade_asked = False
        if head.plain is None:
            check_names(head.fields)
            upgrade_asked = asks_upgrade(head.fields)
            record.client = _client_lines(head.fields)
        elif b"Kubectl-" in head.plain:  # as kubectl writes it: it is looked for in every plain request
            record.client = head.plain
        wanted = request_target(head.method, head.target, upgrade_asked)
        info = wanted.info
        record.verb, record.group, record.resource = info.verb, info.group, info.resource
        record.subresource, record.namespace, record.name = info.subresource, info.namespace, info.name
        record.path, record.path_fields = info.path_class, wanted.text
        if wanted.detailed:
            record.details = query_details(info, head.target, commands=self._audit.commands)
        return wanted

    @staticmethod
    def _own_token(caller: Caller, head: RequestHead, record: AuditRecord) -> Headers:
        """Return the headers of a request in token mode. Raises TokenUnknown for a token that the session does not
        hold."""
        token = bearer_token(head.fields)
        if token_digest(token) not in caller.tokens:
            raise TokenUnknown(token)
        subject = requested_subject(head.fields)
        if subject is not None:  # the API server judges it; the record says it
            record.as_user, record.as_groups = subject.user, subject.groups
        return own_token_headers(head.fields)

    async def _review_token(self, caller: Caller, token: bytes) -> None:
        """Take another token for a session if it is the same user's: a file was rewritten. Raises RequestRefusal."""
        refusal = RequestRefusal(
            401,
            "the request's token is not that of the user who opened this session; use the token that the client was "
            "started with, or start the client with this one",
        )
        if caller.review_token is None or caller.reviews.reserve(time.monotonic()) is None:
            raise refusal
        if not await caller.review_token(token.decode("latin-1")):
            raise refusal
        caller.tokens.add(token_digest(token))

    def _subject(
        self, identity: Identity, head: RequestHead, record: AuditRecord, approval: Approval | None
    ) -> Subject:
        """Return whom the request runs as: the caller, or whom `--as` asks for once the API server has allowed it."""
        other = requested_subject(head.fields)
        if other is None:
            return Subject.of(identity, self._api.impersonable)
        record.as_user, record.as_groups = other.user, other.groups
        if approval is None or approval.identity is not identity or approval.subject != other:
            raise ReviewNeeded(identity, other)
        return Subject(other.user, other.uid, other.groups, (*other.extra, (ORIGINAL_USER, identity.username)))


def _client_lines(fields: RawHeaders) -> bytes:
    """Return the header lines in which kubectl says what it does; empty where there are none."""
    lines = [b"%b: %b\r\n" % field for field in fields if field[0][:8].lower() == b"kubectl-"]
    return b"".join(lines)


def _serialised(headers: Headers) -> bytes:
    """Return the lines of checked headers, and once more in the bytes that will be sent: one line each, and no
    other."""
    text = "".join(f"{name}: {value}\r\n" for name, value in headers)
    lines = text.split("\r\n")
    if lines.pop() or [tuple(line.split(": ", 1)) for line in lines] != headers or "\x00" in text:
        raise RequestRefusal(500, _MALFORMED)
    return text.encode()
