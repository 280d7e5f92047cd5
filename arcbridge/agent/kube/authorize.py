"""Decides who a request runs as, and with which headers it leaves the agent: one decision for both entrances.

`authorize` takes a caller and the facts of a request, from the fast path or from the general parser, and returns a
`Plan` or raises a `RequestRefusal`. It sends, counts and records nothing; `attempt` does, and asks for the limits
first. Invariant: there is no plan for a subject other than the caller himself unless the API server's approval of
exactly that pair is shown.
"""

from __future__ import annotations

from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.kube.caller import Caller, token_digest
from arcbridge.agent.kube.impersonation import (
    ORIGINAL_USER,
    Subject,
    bearer_token,
    cleaned_headers,
    header_lines,
    impersonated_headers,
    own_token_headers,
    passed_lines,
)
from arcbridge.agent.kube.plan import Plan
from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.kube.request_target import RequestTarget
from arcbridge.agent.kube.review import Approval
from arcbridge.agent.kube.upgrade import requested_upgrade
from arcbridge.identity.claims import Identity


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


def authorize(
    api: ApiServer,
    caller: Caller,
    facts: RequestFacts,
    wanted: RequestTarget,
    subject: Subject | None = None,
    approval: Approval | None = None,
) -> Plan:
    """Return how the request goes on. Nothing has left when it raises RequestRefusal.

    `subject`: whom `--as` asks for. Raises ReviewNeeded for one unless `approval` is of this identity and of exactly
    that subject, and in token mode TokenUnknown for a token that the session does not hold.
    """
    identity = caller.identity
    if caller.token_mode:  # the API server judges `--as`
        token = bearer_token(facts)
        if token_digest(token) not in caller.tokens:
            raise TokenUnknown(token)
        lines = header_lines(own_token_headers(facts))
    elif subject is None:
        passed = facts.plain if facts.plain is not None else passed_lines(facts)
        lines = passed + caller.subject_lines.of(identity, api.authorization(), api.impersonable)
    elif approval is None or approval.identity is not identity or approval.subject != subject:
        raise ReviewNeeded(identity, subject)
    else:
        extra = (*subject.extra, (ORIGINAL_USER, identity.username))
        other = Subject(subject.user, subject.uid, subject.groups, extra)
        lines = header_lines(impersonated_headers(cleaned_headers(facts), other, authorization=api.authorization()))
    upgrade = requested_upgrade(facts, wanted.info.subresource) if facts.plain is None else None
    return Plan(facts, wanted, not caller.token_mode, lines, upgrade)
