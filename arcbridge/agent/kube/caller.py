"""Keeps who a session speaks for, and what it remembers of that between requests; and the streams of one session.

It holds the verified identity, the tokens that were reviewed, the header lines of the identity, and what was upgraded.
It decides nothing about a request. Invariant: header lines are those of the present identity and credential, or none.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from arcbridge.agent.accounts import Account
from arcbridge.agent.audit import AuditRecord
from arcbridge.agent.audit.record import AuditSubject, RequestOutcome
from arcbridge.agent.kube.fast_path_parser import KnownLines
from arcbridge.agent.kube.impersonation import Subject, header_lines, impersonated_headers
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.identity.claims import Identity
from arcbridge.limiters import TokenBucket
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.frames import ResetCode

if TYPE_CHECKING:
    from arcbridge.agent.actor_accounts import ActorAccount
    from arcbridge.agent.audit.budget import AuditBudget
    from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions

MAX_TOKENS = 8
"""Tokens of one session that are remembered: the one of AUTH, and those that it was renewed with."""
TOKEN_REVIEWS = 8
"""Reviews of tokens that a session's requests may cause at once, and one more each five seconds."""
SAFE_ID = re.compile(r"[0-9A-Za-z.-]{1,200}")
"""Session names and request ids that may stand in a header as they are; the relay makes the names."""
MAX_JOIN_ID = 20
"""Characters of a join id that request ids begin with; a relay's have 16. With all of it, some parts of the API server
would cut the agent's own part off."""


class Lent(NamedTuple):
    """What holds of a session besides its token: groups that are lent to its user, and what the user may do without."""

    identity: Identity
    """As whom requests run: the token's identity, with the groups and the extra of what is lent."""
    restrictions: SessionRestrictions | None
    """What requests are held to without a grant: what the session gave up, and what the settings take from the user."""
    grants: tuple[tuple[str, str], ...] = ()
    """The uid of each grant, and what records have of it."""


class Lender(Protocol):
    """Knows what is lent to whom (`agent.elevation`)."""

    def lend(self, identity: Identity, own: SessionRestrictions | None, *, token_mode: bool) -> Lent | None:
        """Return what holds of a session of this identity that gave up `own`; None: nothing besides."""


class SubjectLines:
    """The header lines that make a request run as the caller; cached for one identity and one credential."""

    __slots__ = ("_authorization", "_identity", "_lines", "_restricted")

    def __init__(self, restricted: tuple[str, ...] = ()) -> None:
        """`restricted`: what the session gave up of the identity's rights."""
        self._restricted = restricted
        self._identity: Identity | None = None
        self._authorization = ""
        self._lines = b""

    def of(self, identity: Identity, authorization: str, impersonable: frozenset[str] | None = None) -> bytes:
        """Return the lines for an identity, the agent's own Authorization, and the groups that it may impersonate.

        Raises RequestRefusal.
        """
        if identity is not self._identity or authorization != self._authorization:
            self._identity = None
            subject = Subject.of(identity, impersonable, self._restricted)
            self._lines = header_lines(impersonated_headers([], subject, authorization=authorization))
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
    restrictions: SessionRestrictions | None = None
    """What the session gave up of the identity's rights when it began; None: nothing."""
    token_mode: bool = False
    """The caller's own bearer token goes on in each request; the agent does not impersonate."""
    proved_key: str = ""
    """Thumbprint of the key to which the session's token is bound; empty: it is not bound."""
    connected_since: float = 0.0
    """When the session got its present connection, monotonic seconds; infinity while it has none."""
    actor: ActorAccount | None = None
    """What the program that acts for the user holds over all its users; None: no program does."""
    subject_lines: SubjectLines = field(init=False)
    plain_lines: KnownLines = field(default_factory=KnownLines)
    """What became of header lines that came before; `fast_path_parser` fills and bounds it."""
    tokens: ReviewedTokens = field(default_factory=ReviewedTokens)
    """The tokens that requests may carry, in token mode."""
    review_token: Callable[[str], Awaitable[bool]] | None = None
    """Asks whether a token that is not among them is the same user's; None: no other token is taken."""
    reviews: TokenBucket = field(default_factory=lambda: TokenBucket(TOKEN_REVIEWS, 0.2))
    """How often that is asked."""
    upgraded: dict[str, tuple[StreamTransport, AuditRecord]] = field(default_factory=dict)
    """By request id, the upgrades that the API server was asked for as this caller and that are not over."""
    explains: dict[str, Callable[[str], bool]] = field(default_factory=dict)
    """By request id, what ends an upgrade with a sentence for its user; it returns False where it cannot."""
    lender: Lender | None = None
    """Lends groups to the user; None: no group is ever lent."""
    lent: Lent | None = None
    """What it lends now; None: nothing, and it restricts nothing."""
    on_loan: dict[str, tuple[StreamTransport, AuditRecord]] = field(default_factory=dict)
    """By request id, what was asked of the API server while a group was lent, and is not over."""
    subject: AuditSubject = field(init=False)
    """Whom its records are of."""
    request_prefix: str = ""
    """What the ids of its requests begin with, before the stream's id and the number of the request on that stream: the
    join id, which the relay chooses, and a part that the agent does. So no relay chooses the id under which the API
    server's audit log has a request, nor gives two requests one."""

    def __post_init__(self) -> None:
        self.subject_lines = SubjectLines(self.words)
        self.adopt(self.identity, self.proved_key)
        self.request_prefix = f"{self.session[:MAX_JOIN_ID]}-{secrets.token_hex(8)}"

    def adopt(self, identity: Identity, proved_key: str) -> None:
        """Take over the identity of a renewed token, and the key that came with its proof."""
        self.identity, self.proved_key = identity, proved_key
        self.borrow()

    def borrow(self) -> int:
        """Take what is lent to the user now; end the streams that run by a grant that is over; return how many."""
        before = self.subject.grants if self.lent is not None else frozenset()
        if self.lender is not None:
            self.lent = self.lender.lend(self.identity, self.restrictions, token_mode=self.token_mode)
            self.subject_lines = SubjectLines(self.words)
        self.subject = self.audit_subject(self.identity, self.account.audit)
        gone = before - self.subject.grants
        return self._end_on_loan(gone) if gone else 0

    def runs_on_loan(self, stream: StreamTransport, record: AuditRecord) -> None:
        """Note a request that leaves by a grant, which ends with it. Raises RequestRefusal where it is over already."""
        if not record.subject.grants <= self.subject.grants:
            raise RequestRefusal(403, "the elevation by which this request was allowed has ended; ask for another one")
        # A withdrawal ends the grant by which it left, and its own answer would be cut.
        if (record.group, record.resource, record.subresource) != ("access.arcbridge.io", "accessrequests", "status"):
            self.on_loan[record.request] = stream, record

    def _end_on_loan(self, gone: frozenset[str]) -> int:
        running = {**self.upgraded, **self.on_loan}.values()
        ended = [(stream, record) for stream, record in running if record.subject.grants & gone]
        return self._end_streams(ended, "the elevation by which it began has ended")

    @property
    def words(self) -> tuple[str, ...]:
        """What requests are held to, a word each, as records have it."""
        held_to = (self.lent or self).restrictions
        return () if held_to is None else held_to.words

    def audit_subject(self, identity: Identity, budget: AuditBudget | None = None) -> AuditSubject:
        """Return the subject of records about this session that are of an identity."""
        bound, lent = identity.binding.kind.value, () if self.lent is None else self.lent.grants
        return AuditSubject(
            self.session, identity.username, len(identity.groups), bound, budget, self.words, identity.actor, lent
        )

    def end_upgraded(self, reason: str) -> int:
        """End the upgraded streams, with a reason for their users, or their records alone; answers how many there
        were."""
        return self._end_streams(list(self.upgraded.values()), reason)

    def explain_end(self, reason: str) -> None:
        """End the upgraded streams whose users can be told why, before the session ends for that reason, and with it
        the others."""
        for _, record in self.upgraded.values():
            if record.outcome is not RequestOutcome.REFUSED:  # its answer may be held back
                record.revoke(reason)
        for explain in list(self.explains.values()):
            explain(reason)

    def _end_streams(self, streams: list[tuple[StreamTransport, AuditRecord]], reason: str) -> int:
        for stream, record in streams:
            record.revoke(reason)
            explain = self.explains.get(record.request)
            if explain is None or not explain(reason):
                stream.abort(ResetCode.FORBIDDEN)
        return len(streams)


@dataclass(slots=True)
class StreamContext:
    """One stream of a session, which is one HTTP/1.1 connection of the caller."""

    caller: Caller
    stream_id: int
    requests: int = 0
    """Requests that began on it so far."""
