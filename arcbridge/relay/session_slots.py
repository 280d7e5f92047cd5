"""Places for sessions: how often a user may join, how many sessions a user and the relay may hold, what is kept free.

It counts verified users by their subject and decides about one join at a time; it knows no socket and no pump. What it
refuses is a `JoinLimited`, which says when to come back.

Invariant: no user can take the places of others. A user has a rate, a number of sessions and a share of the joins that
wait for an agent. Joins that ask for an agent instance, as resumptions do, have a rate of their own and places that no
other join gets: a relay that is full of new sessions, or of joins that come to nothing, still takes back what lost its
connection. That a join is a resumption is the client's word until the agent has seen it, so both kinds are bounded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from arcbridge.errors import JoinRefused
from arcbridge.identity.actor import ANY
from arcbridge.identity.claims import Identity
from arcbridge.limiters import Bursts, KeyedTokenBucket
from arcbridge.loop_shares import LoopTime
from arcbridge.net.join import JoinCode
from arcbridge.settings.config import RelayLimitsConfig, RelayUserLimitsConfig

LIMITS: Final = (
    "user_joins",
    "user_resumptions",
    "user_sessions",
    "user_pending",
    "user_loop",
    "actor_joins",
    "actor_sessions",
    "pending",
    "sessions",
)
"""What refuses a join, for the metrics."""
SUBJECTS: Final = 16_384
"""Subjects whose joins are counted."""
PENDING_SHARES: Final = 20
"""A user may have one part in so many of the joins that wait for an agent."""
LEAST_PENDING: Final = 8
"""Joins that wait for an agent which a user may have in any case."""
LOG_INTERVAL: Final = 10.0
"""Seconds between two lines in the log about joins that one limit refuses."""
_SESSIONS_RETRY: Final = 10
"""Seconds after which a place of a session may be free."""
_NO_BOUNDS: Final = RelayUserLimitsConfig()


class JoinLimited(JoinRefused):
    """A limit refuses a join; `limit` is one of `LIMITS`."""

    def __init__(self, limit: str, code: JoinCode, message: str, retry_after: int) -> None:
        super().__init__(code, message, retry_after=retry_after)
        self.limit = limit


class SessionSlot:
    """The place of one session; `joined` and `leave` may be called more than once."""

    __slots__ = ("_actor", "_places", "_waits", "subject")

    def __init__(self, places: SessionSlots, subject: str, actor: str = "") -> None:
        """`actor`: the key of the actor among the subjects; empty: there is none."""
        self._places: SessionSlots | None = places
        self._actor = actor
        self._waits = True
        self.subject = subject

    def joined(self) -> None:
        """Note that the agent has come."""
        if self._places is not None and self._waits:
            self._waits = False
            _less(self._places.pending_of, self.subject)

    def leave(self) -> None:
        if self._places is not None:
            self.joined()
            _less(self._places.sessions_of, self.subject)
            if self._actor:
                _less(self._places.sessions_of, self._actor)
            self._places = None


class SessionSlots:
    """The places of one process. `clock` returns monotonic seconds."""

    def __init__(self, limits: RelayLimitsConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[bool, int], KeyedTokenBucket[str]] = {}
        """Those of resumptions by the number of sessions, those of other joins by the number per minute; there are as
        many as the settings name."""
        self.change(limits)
        self._bursts: Bursts[str] = Bursts(LOG_INTERVAL)
        self.sessions_of: dict[str, int] = {}
        """Sessions and joins under way of each subject that has any, and of each actor (`_key`)."""
        self.pending_of: dict[str, int] = {}
        """Joins under way of each subject that has any."""
        self.refused = dict.fromkeys(LIMITS, 0)

    def change(self, limits: RelayLimitsConfig) -> None:
        """Judge by these limits from now on; no session that is there ends."""
        self._limits = limits
        self._usual = RelayUserLimitsConfig(limits.sessions_per_user, limits.joins_per_minute_per_user)
        self._most_pending = max(limits.pending_joins // PENDING_SHARES, LEAST_PENDING)

    def spend(self, identity: Identity, *, resumes: bool) -> None:
        """Take one join of what the user has, and the actor; raises `JoinLimited`."""
        limits, now = self._limits_of(identity), self._clock()
        bucket = self._bucket(limits, resumes)
        if bucket.reserve(identity.subject, now) is None:
            wait = max(math.ceil(bucket.wait(identity.subject, now)), 1)
            if resumes:
                raise self._refusal("user_resumptions", "your sessions come back too often", wait)
            most = f"at most {limits.joins_per_minute} in a minute"
            raise self._refusal("user_joins", f"you open too many sessions: {most}", wait)
        count = self._limits_of_actor(identity.actor).joins_per_minute
        if count and not resumes:
            bucket, actor = self._bucket(RelayUserLimitsConfig(0, count), resumes), _key(identity.actor)
            if bucket.reserve(actor, now) is None:
                wait = max(math.ceil(bucket.wait(actor, now)), 1)
                raise self._refusal("actor_joins", "the program that acts for you opens too many sessions", wait)

    def wait_for(self, payer: LoopTime) -> float:
        """Return the seconds for which a join of a user waits, who takes too much of the event loop; 0 for none. Raises
        `JoinLimited` where the user was slowed down again and again."""
        now = self._clock()
        if now < payer.refused_until:
            words = "you take more of this relay's time than one user may while others wait"
            raise self._refusal("user_loop", words, math.ceil(payer.refused_until - now))
        return max(payer.held_until - now, 0.0)

    def enter(self, identity: Identity, *, resumes: bool, pending: int, sessions: int) -> SessionSlot:
        """Give a join a place; raises `JoinLimited`. `pending` and `sessions` are the relay's joins that wait for an
        agent and its running sessions."""
        limits, subject = self._limits, identity.subject
        if pending >= limits.pending_joins - (0 if resumes else limits.pending_joins // 4):
            raise self._refusal("pending", "too many clients wait for their agents", 5)
        if pending + sessions >= limits.sessions - (0 if resumes else limits.sessions // 10):
            raise self._refusal("sessions", "this relay holds all the sessions it may", _SESSIONS_RETRY)
        most = self._limits_of(identity).sessions
        # A session that comes back may be held twice until the relay has noticed that its old connection is dead.
        if self.sessions_of.get(subject, 0) >= (2 * most if resumes else most):
            raise self._refusal(
                "user_sessions", f"you have {most} sessions at this relay, and more are not allowed", _SESSIONS_RETRY
            )
        actor, most = _key(identity.actor), self._limits_of_actor(identity.actor).sessions
        if most and self.sessions_of.get(actor, 0) >= (2 * most if resumes else most):
            words = f"the program that acts for you has {most} sessions at this relay, and more are not allowed"
            raise self._refusal("actor_sessions", words, _SESSIONS_RETRY)
        if self.pending_of.get(subject, 0) >= self._most_pending:
            raise self._refusal("user_pending", "too many of your joins wait for an agent", 1)
        for key in (subject, actor) if actor else (subject,):
            self.sessions_of[key] = self.sessions_of.get(key, 0) + 1
        self.pending_of[subject] = self.pending_of.get(subject, 0) + 1
        return SessionSlot(self, subject, actor)

    def refused_since_logged(self, limited: JoinLimited) -> int | None:
        """Return how many joins this limit has refused since one was logged, or None where this one is not to be."""
        return self._bursts.seen(limited.limit, self._clock())

    # -- inside ----------------------------------------------------------------------------------------------------

    def _limits_of(self, identity: Identity) -> RelayUserLimitsConfig:
        """Return what holds for a user: the user's own numbers, or the largest of the groups', or those of all."""
        limits = self._limits
        if not limits.users and not limits.groups:
            return self._usual
        named = limits.users.get(identity.username)
        found = (
            [named] if named is not None else [limits.groups[name] for name in identity.groups if name in limits.groups]
        )
        return RelayUserLimitsConfig(
            max((one.sessions for one in found), default=0) or self._usual.sessions,
            max((one.joins_per_minute for one in found), default=0) or self._usual.joins_per_minute,
        )

    def _limits_of_actor(self, actor: str) -> RelayUserLimitsConfig:
        """Return what holds for an actor over all its users, 0 for no bound; for none there is no bound."""
        tables = self._limits.actors
        return (tables.get(actor) or tables.get(ANY) if actor else None) or _NO_BOUNDS

    def _bucket(self, limits: RelayUserLimitsConfig, resumes: bool) -> KeyedTokenBucket[str]:
        # All sessions of a user may come back at once, some of them twice; then each about once a minute.
        count, burst = (limits.sessions, 2 * limits.sessions) if resumes else (limits.joins_per_minute,) * 2
        bucket = self._buckets.get((resumes, count))
        if bucket is None:
            bucket = self._buckets[resumes, count] = KeyedTokenBucket(burst, count / 60, size=SUBJECTS)
        return bucket

    def _refusal(self, limit: str, message: str, retry_after: int) -> JoinLimited:
        self.refused[limit] += 1
        code = JoinCode.LIMIT if limit.startswith(("user_", "actor_")) else JoinCode.OVERLOADED
        return JoinLimited(limit, code, f"{message}; try again in {retry_after} s", retry_after)


def _key(actor: str) -> str:
    """Return an actor's name as a key among subjects, which begin with the URL of an issuer; empty for none."""
    return f"actor {actor}" if actor else ""


def _less(counts: dict[str, int], key: str) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]
