"""Attempts at requests of one caller, without streams: what either entrance does with a head that was read."""

from __future__ import annotations

from arcbridge.agent.accounts import Accounts
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.kube.attempt import Attempt, ProxyContext
from arcbridge.agent.kube.authorize import Plan, ReviewNeeded, TokenUnknown
from arcbridge.agent.kube.caller import Caller, StreamContext
from arcbridge.agent.kube.request_facts import RequestFacts, read_facts
from arcbridge.agent.kube.review import Approval
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.settings.config import AgentLimitsConfig
from tests.support.fake_apiserver import FakeApiServer

from .bench import ALICE, RecordedAudit, caller_of

PLAIN = b"Accept: a\r\n"


class Desk:
    """What attempts share, a caller, and the API server that reviews."""

    def __init__(self, fake: FakeApiServer, api: ApiServer) -> None:
        self.fake = fake
        self.audit = RecordedAudit()
        self.context = ProxyContext(api, self.audit)
        self.stream = StreamContext(caller_of(ALICE), 1)
        self.now: float | None = None
        """When the next requests begin, monotonic seconds; None: now."""

    @property
    def caller(self) -> Caller:
        return self.stream.caller

    def begin(self, stream: StreamContext | None = None, method: str = "GET") -> Attempt:
        attempt = Attempt(self.context, stream or self.stream, method)
        attempt.record.started = self.now or attempt.record.started
        return attempt

    def plan(self, facts: RequestFacts, approval: Approval | None = None) -> Plan:
        attempt = self.begin(method=facts.method)
        try:
            return attempt.plan(facts, approval)
        except RequestRefusal as refusal:
            attempt.refuse(refusal)
            raise
        finally:
            attempt.finish()

    async def reviewed(self, attempt: Attempt, facts: RequestFacts) -> Plan:
        try:
            return attempt.plan(facts)
        except (ReviewNeeded, TokenUnknown) as obstacle:
            return await attempt.plan_reviewed(facts, obstacle)

    def head(self, facts: RequestFacts) -> bytes:
        """Return the head that leaves."""
        return self.plan(facts).head

    def lines(self, facts: RequestFacts, approval: Approval | None = None) -> bytes:
        """Return the header lines that leave, without those that every request has."""
        lines = self.plan(facts, approval).head.split(b"\r\n")[3:-1]
        return b"".join(line + b"\r\n" for line in lines if line)


def plain(lines: bytes = PLAIN, target: str = "/api/v1/pods") -> RequestFacts:
    return RequestFacts("GET", target, lines)


def parsed(*fields: tuple[bytes, bytes], method: str = "GET", target: str = "/api/v1/pods") -> RequestFacts:
    return read_facts(method, target, [(b"Host", b"k"), *fields])


AS_BOB = parsed((b"Impersonate-User", b"bob"))


def limited(**limits: int) -> Caller:
    return caller_of(ALICE, Accounts(AgentLimitsConfig(**limits)))
