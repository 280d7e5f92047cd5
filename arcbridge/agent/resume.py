"""Decides which session a connection may take over, by what the agent remembers of its sessions.

A caller who wants a session back names its id and shows its secret, behind a token that was verified before. Unknown
id, wrong secret, token of another subject: to the caller these are one answer after the same work, so no caller learns
which ids exist (docs/threats.md#S5, docs/threats.md#S6). The owner alone may also read why a session ended.

Secrets are never locked away from their owner. What is limited is the *subject* of the verified token: after
`TRIES` failures further ones at sessions of others are refused unseen, until the allowance has grown again.
"""

from __future__ import annotations

import hmac
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from arcbridge.errors import SessionEnded
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.refusals import NO_REFUSAL, Refusal
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Hello

GONE = "there is no such session here: it has ended, or another instance of the agent holds it"
MAX_ENDED = 1000
"""Sessions whose end is remembered."""
ENDED_MEMORY = 120.0
"""Seconds for which it is: as long as a detached session is held, so a caller who asks later was too late anyway."""
TRIES = 20
"""Failures that one subject has at once; honest callers fail once for each session that a restart has ended."""
TRIES_RATE = 1 / 30
"""Failures per second that grow back."""
MAX_SUBJECTS = 1000
"""Subjects whose failures are counted; the one that failed longest ago is forgotten first."""
REFUSALS = ("unknown", "secret", "subject", "restrictions", "actor", "epoch", "ended", "limit", "counts")
"""Checks that fail, for log and metrics; `counts` is for what the two ends disagree about."""
_FINAL = frozenset({GoawayCode.UNAUTHENTICATED, GoawayCode.FORBIDDEN, GoawayCode.EXPIRED, GoawayCode.REVOKED})
"""Codes that a caller understands as the end; any other end is sent as GONE, with its own sentence."""


class Held(Protocol):
    """A session that may be taken over."""

    @property
    def closed(self) -> bool: ...
    @property
    def epoch(self) -> int: ...


Session = TypeVar("Session", bound=Held)


@dataclass(frozen=True, slots=True)
class Claim:
    """Whose a session is."""

    secret: bytes
    subject: str
    token_mode: bool

    def __repr__(self) -> str:
        return f"Claim(subject={self.subject!r}, token_mode={self.token_mode})"

    def owned_by(self, subject: str, token_mode: bool) -> bool:
        """Return whether a verified token speaks for the owner, in the same mode."""
        same = hmac.compare_digest(_bytes(self.subject), _bytes(subject))
        return same and self.token_mode == token_mode


@dataclass(frozen=True, slots=True)
class ResumeRefusal:
    """`check` is one of REFUSALS and for us; `code` and `message` are for the caller. `quiet`: no news for the log."""

    check: str
    code: GoawayCode
    message: str
    refusal: Refusal = NO_REFUSAL
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class _Ended:
    claim: Claim
    refusal: ResumeRefusal
    until: float


class Resumes(Generic[Session]):
    """The sessions that may be resumed, by id, and for a while those that ended. Counters are read by the metrics."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live: dict[bytes, tuple[Claim, Session]] = {}
        self._ended: OrderedDict[bytes, _Ended] = OrderedDict()
        self._failures: KeyedTokenBucket[str] = KeyedTokenBucket(TRIES, TRIES_RATE, size=MAX_SUBJECTS)
        self._no_owner = Claim(os.urandom(16), "", False)
        self.refused = dict.fromkeys(REFUSALS, 0)

    def __len__(self) -> int:
        return len(self._live)

    def add(self, session_id: bytes, claim: Claim, session: Session) -> None:
        """Let this session be resumed from now on."""
        self._live[session_id] = (claim, session)

    def remove(self, session_id: bytes, error: Exception) -> None:
        """Forget a session that is over; its owner may read why for a while, if there is a reason that helps."""
        found = self._live.pop(session_id, None)
        if found is None or not isinstance(error, SessionEnded) or error.code == GoawayCode.DONE:
            return
        code = GoawayCode(error.code) if error.code in _FINAL else GoawayCode.GONE
        refusal = ResumeRefusal("ended", code, error.message, error.refusal)
        self._ended[session_id] = _Ended(found[0], refusal, self._clock() + ENDED_MEMORY)
        while len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def judge(self, hello: Hello, subject: str, token_mode: bool) -> Session | ResumeRefusal:
        """Return the session that this HELLO may take over, or what to answer. The token has been verified."""
        now = self._clock()
        while self._ended and next(iter(self._ended.values())).until <= now:
            self._ended.popitem(last=False)
        live = self._live.get(hello.session_id)
        ended = self._ended.get(hello.session_id)
        claim = live[0] if live is not None else ended.claim if ended is not None else None
        owned = (claim or self._no_owner).owned_by(subject, token_mode)
        if not owned and self._failures.wait(subject, now, 0.0):
            return self.refuse("limit", quiet=True)
        # The secret is compared for every caller, and against a random one where there is none: one answer, one time.
        right = hmac.compare_digest((claim or self._no_owner).secret, hello.resume_secret)
        if claim is None or not right or not owned:
            self._failures.take(subject, now)
            return self.refuse("unknown" if claim is None else "subject" if right else "secret")
        if ended is not None:
            self.refused["ended"] += 1
            return ended.refusal
        assert live is not None
        session = live[1]
        if session.closed:
            return self.refuse("ended")
        if hello.epoch <= session.epoch:
            return self.refuse("epoch", GoawayCode.REPLACED, "a newer connection carries this session already")
        return session

    def refuse(
        self, check: str, code: GoawayCode = GoawayCode.GONE, message: str = GONE, *, quiet: bool = False
    ) -> ResumeRefusal:
        """Count a refusal and return it."""
        self.refused[check] += 1
        return ResumeRefusal(check, code, message, quiet=quiet)


def _bytes(subject: str) -> bytes:
    return subject.encode("utf-8", "surrogatepass")  # a claim may hold any code point that JSON can write
