"""Leads one request of a caller from its first byte to its record, for both entrances.

An `Attempt` counts a request, asks the user's limits, reads what is asked for into its audit record, has it authorized,
and takes its end: an answer, a refusal, a cut or a defect. It reads no head and sends nothing. Invariants: each attempt
that begins has one `finish`; limits come before all work that grows with what the caller sent, so that a request which
is over a limit is not read for its record, unless it is the one of its burst that leaves a record.

The order of `plan`: framing (it decides whether the stream can go on), limits, header names and target, whether the
audit log can be written, `--as`, the authorization, the limit of upgrades.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from arcbridge.agent.accounts import Limit
from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.agent.audit.record import RequestOutcome, Value
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.kube.authorize import Plan, ReviewNeeded, TokenUnknown, authorize
from arcbridge.agent.kube.caller import StreamContext, token_digest
from arcbridge.agent.kube.connect_limit import too_much
from arcbridge.agent.kube.impersonation import requested_subject
from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.kube.request_target import RequestTarget, query_details, request_target
from arcbridge.agent.kube.review import Approval, Reviewer
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upstream_pool import UpstreamConnection
from arcbridge.agent.kube.warm_connections import WarmConnections
from arcbridge.audit.log import Recorded
from arcbridge.wire.limits import DEFAULT

if TYPE_CHECKING:
    from arcbridge.agent.recording.recorder import Recorder
    from arcbridge.agent.tracing.exporter import SpanExporter
    from arcbridge.agent.tracing.spans import Span

MAX_IN_FLIGHT = 5000
"""Requests of all sessions together that are under way: more are refused (429) before they leave."""

RESTRICTIONS = ("read_only", "no_secrets", "namespaces", "verbs", "path")
"""What requests of restricted sessions are refused for, for the metrics: rules of the family `restricted`."""

log = structlog.get_logger("arcbridge.agent")


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
    restricted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RESTRICTIONS, 0))
    """Requests refused because their session gave up the right, by what it gave up."""

    def count(self, status: int) -> None:
        """Count one answer by the class of its code."""
        if 200 <= status < 300:
            self.code_2xx += 1
            return
        name = f"code_{status // 100}xx"
        setattr(self, name, getattr(self, name) + 1)


class ProxyContext:
    """What the attempts of one agent share."""

    def __init__(self, api: ApiServer, audit: AuditLog) -> None:
        self.api = api
        self.audit = audit
        self.reviewer = Reviewer(api)
        self.stats = ProxyStats()
        self.warm = WarmConnections(api.upstream)
        self.tracer: SpanExporter | None = None
        """Makes spans of requests that are traced; None: no request is."""
        self.recorder: Recorder | None = None
        """Records exec and attach; None: no session is recorded."""
        api.on_rotation = self.warm.end_all


class Attempt:
    """One request that has begun."""

    __slots__ = ("_admitted", "_context", "_unrecorded", "_upgrading", "account", "caller", "record", "span")

    def __init__(self, context: ProxyContext, stream: StreamContext, method: str) -> None:
        """Count a request that begins."""
        stream.requests += 1
        context.stats.requests += 1
        self._context = context
        self.caller = caller = stream.caller
        self.account = caller.account
        request_id = f"{caller.request_prefix}-{stream.stream_id}-{stream.requests}"
        self.record = AuditRecord(request_id, caller.subject, method=method)
        self.span: Span | None = None
        """Of a request that its caller traces."""
        self._admitted = False
        """It counts among the user's and the agent's requests under way."""
        self._upgrading = False
        """It counts among the user's upgrades."""
        self._unrecorded = False
        """It leaves no record: it is one of a burst of refusals that was reported."""

    def plan(self, facts: RequestFacts, approval: Approval | None = None) -> Plan:
        """Return how the request goes on. Raises RequestRefusal, and what `authorize` raises: nothing has left."""
        record, context = self.record, self._context
        if facts.misframed is not None:
            raise facts.misframed
        if not self._admitted:  # else it was, before the review of `--as`
            self._admit(facts)
        wanted = self._read(facts)
        if context.audit.refuses and (refusal := context.audit.refusal()):
            raise RequestRefusal(503, refusal)
        if (wanted.begins or context.audit.refuses) and self.account.audit.is_spent(record.started):
            raise self._too_much(Limit.AUDIT_BYTES)  # nothing that must be recorded goes on without
        subject = requested_subject(facts.impersonation) if facts.impersonation else None
        if subject is not None:
            record.acts_as(subject.user, subject.groups)
        plan = authorize(context.api, self.caller, facts, wanted, record.request, subject, approval)
        if context.recorder is not None:
            context.recorder.check(self.caller, record, plan)
        if self.span is not None:
            plan.head = self.span.passed_on(plan.head)
        if plan.upgrade is not None:
            record.asks_upgrade(plan.upgrade.protocol)
            if limit := self.account.admit_upgrade():
                raise self._too_much(limit)
            self._upgrading = True
        return plan

    async def plan_reviewed(self, facts: RequestFacts, obstacle: Exception) -> Plan:
        """`plan`, after the API server has reviewed `--as`, or another token, where the `obstacle` to a plan is that
        one was not reviewed. Raises RequestRefusal, or any other obstacle."""
        approval = None
        try:
            while True:  # once more where the caller's identity was renewed during the review
                if not isinstance(obstacle, ReviewNeeded | TokenUnknown):
                    raise obstacle
                with self.body_waits(facts):
                    if isinstance(obstacle, TokenUnknown):
                        await self._review_token(obstacle.token)
                    else:
                        reviewer = self._context.reviewer
                        approval = await reviewer.approve(obstacle.identity, obstacle.subject, self.account)
                self.record.is_of(self.caller.subject)  # the identity may have been renewed during the review
                try:
                    return self.plan(facts, approval)
                except (ReviewNeeded, TokenUnknown) as error:
                    obstacle = error
        finally:
            del obstacle  # its traceback leads to this frame: a cycle

    @contextmanager
    def body_waits(self, facts: RequestFacts) -> Iterator[None]:
        """Count for the user what comes of the body while the request waits. Raises RequestRefusal where too much
        does."""
        waits = 0
        if facts.has_body:
            waits = min(int(facts.length or DEFAULT.stream_window), DEFAULT.stream_window)
        arriving = self.account.arriving
        arriving.add(waits)
        try:
            if waits and self.account.holds_too_much:
                raise too_much(self.account, Limit.ARRIVING, time.monotonic())
            yield
        finally:
            arriving.remove(waits)

    # -- records before the first byte ----------------------------------------------------------------------------

    def record_begun(self, recorded: Recorded) -> None:
        """Write that the request begins; `recorded` is called with a refusal, or without when it may leave."""
        self._context.audit.begin(self.record, recorded)

    async def recorded_begun(self) -> None:
        """`record_begun`, awaited. Raises RequestRefusal."""
        audit = self._context.audit
        if refusal := await audit.written(audit.begin, self.record):
            raise RequestRefusal(503, refusal)

    async def recorded_details(self, details: dict[str, Value]) -> None:
        """Write what the request's body asks for. Raises RequestRefusal."""
        audit = self._context.audit
        self.record.has_details(details)
        if refusal := await audit.written(audit.detail, self.record):
            raise RequestRefusal(503, refusal)

    def note_details(self, details: dict[str, Value]) -> None:
        """Write what a running stream has asked for, without keeping it waiting."""
        self.record.has_details(details)
        self._context.audit.detail(self.record, lambda _: None)

    # -- the connection of an upgrade -----------------------------------------------------------------------------

    def warm_connection(self, tls: ssl.SSLContext) -> UpstreamConnection | None:
        """Return the session's unused connection to the API server, if it has one; the request leaves on it."""
        return self._context.warm.take(self.caller, tls)

    def upgraded(self, tls: ssl.SSLContext) -> None:
        """The API server has answered the upgrade."""
        self._context.warm.upgraded(self.caller, tls)

    # -- the end --------------------------------------------------------------------------------------------------

    def refuse(self, refusal: RequestRefusal) -> None:
        """The agent answers the request itself; it counts as no more under way."""
        self._release()
        refusal.__traceback__ = None  # its frames hold the refusal: a cycle for each request of a flood
        if refusal.limit:
            self._report(Limit(refusal.limit))
        if refusal.refusal.rule.check in RESTRICTIONS and refusal.refusal.rule.family == "restricted":
            self._context.stats.restricted[refusal.refusal.rule.check] += 1
        record = self.record
        record.refuse(refusal.message, refusal.status_code)
        if refusal.status_code >= 500:
            log.warning(
                "request failed", session=record.subject.session, request=record.request, reason=refusal.message
            )

    def fail(self, error: BaseException, text: str) -> RequestRefusal:
        """Log a defect of the agent, which ends the request, as `text`; return the answer, which does not show it."""
        self.record.fail(error)
        asyncio.get_running_loop().call_exception_handler({"message": text, "exception": error})
        return RequestRefusal(500, "the agent failed; its log has the cause")

    def finish(self) -> None:
        """The request is over, however it ended: write its record."""
        self._release()
        record, stats = self.record, self._context.stats
        if record.status:
            stats.count(record.status)
        if record.outcome is RequestOutcome.REFUSED:
            stats.refused += 1
        elif record.outcome is RequestOutcome.CUT:
            stats.cut += 1
        if self._unrecorded:
            return  # one of a burst over a limit: neither has its record nor takes the place of another's span
        self._context.audit.write(record)
        if self.span is not None:
            self.span.end(record)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _admit(self, facts: RequestFacts) -> None:
        """Count the request, or refuse it as too much before anything leaves. Every limit on requests is here."""
        stats = self._context.stats
        actor, limit = self.caller.actor, self.account.admit_request(self.record.started)
        if limit is None:
            if stats.in_flight >= MAX_IN_FLIGHT:
                limit = Limit.AGENT_REQUESTS
            elif actor is not None:
                limit = actor.admit_request(self.record.started)
            if limit is not None:
                self.account.end_request()
        if limit is not None:
            refusal = self._too_much(limit)
            if not self._unrecorded:
                with suppress(RequestRefusal):  # the limit is the reason that counts
                    self._read(facts)
            raise refusal
        self._admitted = True
        stats.in_flight += 1

    def _too_much(self, limit: Limit) -> RequestRefusal:
        """Return the refusal of a request that is over a limit; one of each burst is logged and recorded."""
        self._report(limit)
        return too_much(self.account, limit, self.record.started, reported=True)

    def _report(self, limit: Limit) -> None:
        """Count a refusal; one of each burst is logged and recorded."""
        record = self.record
        omitted = self.account.refuse(limit, time.monotonic())
        self._unrecorded = omitted is None and not record.begun  # `begun` has its `ended` in every case
        if omitted is not None:
            record.is_over(limit, omitted)
            session, user = record.subject.session, record.subject.user
            log.warning("limit reached", session=session, user=user, reason=limit.value, omitted=omitted)

    def _release(self) -> None:
        """The request counts no more."""
        if self._admitted:
            self._admitted = False
            self._context.stats.in_flight -= 1
            self.account.end_request()
            if self.caller.actor is not None:
                self.caller.actor.end_request()
            if self._upgrading:
                self._upgrading = False
                self.account.end_upgrade()

    def _read(self, facts: RequestFacts) -> RequestTarget:
        """Return what a head asks for, and write it into the record. Raises RequestRefusal for one that is not passed
        on."""
        if facts.misnamed is not None:
            raise facts.misnamed
        if facts.client:
            self.record.has_client(facts.client)
        wanted = request_target(facts.method, facts.target, b"upgrade" in facts.values)
        self.record.asks(wanted.path, wanted.text)
        if wanted.detailed:
            commands = self._context.audit.commands
            self.record.has_details(query_details(wanted.info, facts.target, commands=commands))
        return wanted

    async def _review_token(self, token: bytes) -> None:
        """Take another token for the session if it is the same user's: a file was rewritten. Raises RequestRefusal."""
        caller = self.caller
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


def begin(context: ProxyContext, stream: StreamContext, facts: RequestFacts) -> tuple[Attempt, Plan | Exception]:
    """Begin a request whose head was read; return how it goes on, or what `Attempt.plan` raises."""
    attempt = Attempt(context, stream, facts.method)
    if context.tracer is not None:
        attempt.span = context.tracer.begin(facts)
    try:
        return attempt, attempt.plan(facts)
    except Exception as error:
        return attempt, error
