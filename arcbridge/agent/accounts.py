"""Accounts: what each verified user holds at this agent, over all of that user's sessions, and how much is too much.

An account begins with a user's first session and is kept for a while after the last one, in a bounded table, so that
a user who comes back finds the same counters. It answers whether a request, a stream or a session is within the
user's limits, and how long the user's connections have to wait for their next bytes; it closes no session and answers
no request (its sessions do when it says so), and decides nothing about rights. Invariant: an account is one verified
subject's; its limits are those of the newest identity of that subject, and its counters never mix with another's.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from arcbridge.agent.audit.budget import AuditBudget
from arcbridge.agent.seats import Seats
from arcbridge.errors import ConfigError, OverLimit
from arcbridge.identity.claims import Identity
from arcbridge.limiters import TokenBucket
from arcbridge.loop_shares import LoopShares, LoopTime, LoopTimes
from arcbridge.mux import memory
from arcbridge.settings.config import AgentLimitsConfig, LimitsOverrideConfig
from arcbridge.units import size
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.limits import DEFAULT

if TYPE_CHECKING:
    from arcbridge.agent.actor_accounts import ActorAccount, ActorAccounts

MAX_REMEMBERED = 2000
"""Accounts without a session that are kept; beyond it the one that ended first is forgotten."""
MAX_RELAYS = 1000
"""Relays of which it is remembered how much time of the loop the tokens of their sessions took."""
DAY = 86400.0
LEAST_BYTE_RATE = 64 * 1024
"""Bytes per second that a setting may be at least: below it one read of a connection would pause it for too long."""
LEAST_AUDIT_BYTES = 16 * 1024
"""Bytes per second that the setting of audit records may be at least: the largest record has as many."""
LEAST_WAITING_BYTES = 1024 * 1024
"""Bytes that the setting may be at least: below it one stream on a long path could not be filled."""
LEAST_AGENT_WAITING_BYTES = 16 * 1024 * 1024
"""The same of the setting for all users together."""
ARRIVING_BYTES = 4 * 1024 * 1024
"""Bytes of one user's requests that the agent holds before they go on (`Account.arriving`). A head counts until it
is complete, so this is room for sixty slow ones of 64 KiB, and no limit on those that come at once."""
AHEAD_BYTES = 64 * 1024 * 1024
"""Bytes that one user may send ahead of readers that stopped (`Account.ahead`): what one session alone may, four copies
over the longest path, or 256 programs of which each has a full first window."""
PROMISED_BYTES = 128 * 1024 * 1024
"""Bytes by which the windows of one user's streams may have grown (`Account.promised`): eight copies over the longest
path, and a third of what the process may promise."""
MAX_PACE = 10.0
"""Seconds that a connection waits at most for its user's bytes a second, and as much is owed at most: far below the
25 s after which the other end takes the connection for dead."""
ENDED_CONNECTIONS = 50
"""Connections to the API server that a user may end by leaving watches and long answers; one is forgotten each second.
With more of them a user makes connections of their own and uses those again, and takes none that others left."""
CONNECTING = 8
"""Connections to the API server that are made for one user at a time: each handshake is a millisecond of the event
loop, and more at once would keep the requests of others waiting for as many."""
BURST_GAP = 10.0
"""Seconds without a refusal that end a burst of refusals."""
BURST_LENGTH = 60.0
"""Seconds after which a burst that goes on counts as another one, so that its size is recorded."""
PROMPT_REFUSALS = 50
"""Refusals of one user that are answered at once, and so many a second; further ones are held for HOLD."""
HOLD = 1.0
"""Seconds for which an answer is held that refuses a flood: a stream carries one request at a time, so that the cost
of refusing is bounded by the user's streams."""


class Limit(StrEnum):
    """What was reached. Each is a label of a metric; most are names of settings."""

    REQUESTS_PER_SECOND = "requests_per_second"
    CONCURRENT_REQUESTS = "concurrent_requests"
    STREAMS = "streams"
    UPGRADED_STREAMS = "upgraded_streams"
    BYTES_PER_DAY = "bytes_per_day"
    SESSIONS = "sessions"
    CONNECTS_PER_SECOND = "connects_per_second"
    APISERVER_SEATS = "apiserver_seats"
    AGENT_CONNECTS_PER_SECOND = "agent_connects_per_second"
    """Connections to the API server that the requests of all users together ask for."""
    TARGETS = "targets"
    """Streams that were refused their target; each is refused, and of a burst some leave a record."""
    ARRIVING = "arriving_bytes"
    """Bytes of request heads that are not complete, and bodies that wait for a seat or a review (`ARRIVING_BYTES`)."""
    AUDIT_BYTES = "audit_bytes"
    """Bytes of audit records (`audit_bytes_per_second`): what must be recorded is refused."""
    LOOP_SHARE = "loop_share"
    AGENT_REQUESTS = "agent_requests"
    """The requests of all users together (`agent.kube.attempt.MAX_IN_FLIGHT`)."""
    ACTOR_SESSIONS = "actor_sessions"
    """Of one actor, over all users (`limits.actors`); so are the next two."""
    ACTOR_REQUESTS_PER_SECOND = "actor_requests_per_second"
    ACTOR_CONCURRENT_REQUESTS = "actor_concurrent_requests"


class LimitReached(OverLimit):
    """A limit was reached; the message is for the user, who may try again `retry_after` seconds later.

    `retry_at`: unix seconds before which another try is in vain; 0: it may succeed soon.
    """

    def __init__(self, limit: Limit, message: str, *, retry_after: int | None = None, retry_at: float = 0.0) -> None:
        super().__init__(message, retry_after=retry_after)
        self.limit = limit
        self.retry_at = retry_at


_NAMES = tuple(field.name for field in fields(LimitsOverrideConfig))


def check_limits(config: AgentLimitsConfig) -> None:
    """Check the settings. Raises ConfigError that names the key."""
    _check_table("limits", config)
    for kind, tables in (("groups", config.groups), ("users", config.users)):
        for name, table in tables.items():
            _check_table(f'limits.{kind}."{name}"', table)
    for name, limits in config.actors.items():
        if min(limits.sessions, limits.requests_per_second, limits.concurrent_requests) < 0:
            raise ConfigError(f'limits.actors."{name}": each must be 0, for no limit, or above')
    if config.agent_connects_per_second < 0:
        raise ConfigError("limits.agent_connects_per_second: must be 0, for no limit, or above")
    if config.agent_warm_connections < 0:
        raise ConfigError("limits.agent_warm_connections: must be 0, for none, or above")
    if config.agent_waiting_bytes < LEAST_AGENT_WAITING_BYTES:
        raise ConfigError(f"limits.agent_waiting_bytes: must be at least {LEAST_AGENT_WAITING_BYTES} (16 MiB)")


def limits_of(config: AgentLimitsConfig, identity: Identity) -> AgentLimitsConfig:
    """Return the limits of a user: the user's own, else the largest of the user's groups, else those of every user."""
    user = config.users.get(identity.username)
    groups = [config.groups[name] for name in identity.groups if name in config.groups]
    own = {name: _value(name, config, user, groups) for name in _NAMES} if user is not None or groups else {}
    return replace(config, **own, groups={}, users={}, actors={})


class AccountSession(Protocol):
    """A session as its account sees it."""

    @property
    def streams(self) -> int:
        """Streams that are open."""

    def end_streams(self) -> None:
        """End all streams soon: the user may move no more bytes today."""

    def hold(self, seconds: float) -> None:
        """Move no payload for a while: the user takes too much of the event loop."""


class Account:
    """What one verified user holds at this agent. Made by `Accounts.enter`."""

    def __init__(self, accounts: Accounts, identity: Identity) -> None:
        self._accounts = accounts
        self.identity = identity
        """The identity of the user's newest token."""
        self.members: set[AccountSession] = set()
        """The user's sessions, those without a connection included."""
        self.audit = AuditBudget(identity.username)
        """Bytes of the user's audit records."""
        self.waiting = Backlog(sys.maxsize, memory.backlog)
        """Bytes that wait at this agent towards the user's callers; the backlogs of the sessions are parts of it."""
        self.ahead = Backlog(AHEAD_BYTES, memory.ahead)
        """Bytes that the user's sessions have sent ahead of readers that stopped (docs/threats.md#M20)."""
        self.promised = Backlog(PROMISED_BYTES)
        """Bytes by which the windows of the streams of the user's sessions have grown (docs/threats.md#M22)."""
        self.arriving = Backlog(ARRIVING_BYTES, memory.arriving)
        """Bytes of the user's requests that are held here before they go on: heads that are not complete, what comes
        behind a request that is under way, and bodies that are looked at or wait for a seat or a review
        (docs/threats.md#H21, #H22, #H26)."""
        self.churn = TokenBucket(DEFAULT.churn_burst, DEFAULT.churn_rate)
        """Streams of the user that may end before their answers: a new session has no new burst."""
        self.seats = Seats(0)
        """Seats at the API server that the user's requests hold."""
        self.connecting = asyncio.Semaphore(CONNECTING)
        """Held while a connection to the API server is made for the user."""
        self.connections = 0
        """Connections to the API server that the user's requests hold."""
        self.ended_connections = TokenBucket(ENDED_CONNECTIONS, 1.0)
        """Connections to the API server that ended of late because their answers were not waited for."""
        self.loop_time = LoopTime(accounts.loop, self._hold)
        """Time of the event loop that the user's bytes take."""
        self.in_flight = 0
        """Requests under way, upgraded ones included."""
        self.upgrades = 0
        """Requests under way that asked for an upgrade."""
        self.moved_today = 0
        """Bytes that the user's sessions moved since 00:00 UTC, both directions."""
        self._day_most = math.inf
        """Bytes that may be moved in a day."""
        self._day_ends = 0.0
        """When `moved_today` begins anew, monotonic seconds."""
        self._day_spent = False
        """Whether the day's bytes are used up, unless the day has ended meanwhile."""
        self._requests: TokenBucket | None = None
        self._connects: TokenBucket | None = None
        self._to_cluster: TokenBucket | None = None
        self._to_user: TokenBucket | None = None
        self._prompt: TokenBucket | None = None
        """Refusals that are answered at once; made with the first refusal, because most users never see one."""
        self._bursts: dict[Limit, _Burst] = {}
        self.limits = limits_of(accounts.config, identity)
        self._apply(self.limits)

    @property
    def subject(self) -> str:
        """Whose account it is: `Identity.subject`."""
        return self.identity.subject

    @property
    def holds_too_much(self) -> bool:
        """Whether twice what may be held of requests is held: what would wait has to go."""
        own, all_users = self.arriving, memory.arriving
        return own.held > 2 * own.most or all_users.held > 2 * all_users.most

    @property
    def streams(self) -> int:
        """Streams that are open, of all the user's sessions."""
        count = 0
        for member in self.members:
            count += member.streams
        return count

    # -- sessions -------------------------------------------------------------------------------------------------

    def adopt(self, identity: Identity) -> None:
        """Take over a newer identity of the same subject: the limits of its groups count from now on.

        An older token changes no limit while a session of the newer one is there.
        """
        assert identity.subject == self.subject
        if self.members and not identity.supersedes(self.identity):
            return
        self.identity = identity
        self.audit.user = identity.username
        self.change_limits(limits_of(self._accounts.config, identity))

    def change_limits(self, limits: AgentLimitsConfig) -> None:
        """Count by these limits from now on; what was taken stays taken."""
        if limits != self.limits:
            self.limits = limits
            self._apply(limits)

    def leave(self, member: AccountSession) -> None:
        """End a session's membership; the last one's end retires the account. A second call changes nothing."""
        if member in self.members:
            self.members.remove(member)
            if not self.members:
                self._accounts.retire(self)

    # -- is it too much? --------------------------------------------------------------------------------------------

    def admit_request(self, now: float) -> Limit | None:
        """Count a request that begins, or return the limit that it is over; `end_request` ends one that was counted."""
        limits = self.limits
        if now < self.loop_time.refused_until:
            return Limit.LOOP_SHARE
        if limits.concurrent_requests and self.in_flight >= limits.concurrent_requests:
            return Limit.CONCURRENT_REQUESTS
        if self._day_spent and self._has_spent_day(now):
            return Limit.BYTES_PER_DAY
        if self._requests is not None and self._requests.reserve(now) is None:
            return Limit.REQUESTS_PER_SECOND
        self.in_flight += 1
        return None

    def end_request(self) -> None:
        """A request that was counted is over."""
        self.in_flight -= 1

    def reserve_connect(self, now: float, longest: float) -> float | None:
        """Return the seconds until the user may connect to the API server; None, taking no turn, above `longest`."""
        return 0.0 if self._connects is None else self._connects.reserve(now, longest)

    def admit_upgrade(self) -> Limit | None:
        """Count a request that asks for an upgrade, or return the limit; `end_upgrade` ends one that was counted."""
        if self.limits.upgraded_streams and self.upgrades >= self.limits.upgraded_streams:
            return Limit.UPGRADED_STREAMS
        self.upgrades += 1
        return None

    def end_upgrade(self) -> None:
        """A request that was counted by `admit_upgrade` is over."""
        self.upgrades -= 1

    def refuses_stream(self, now: float, *, plain: bool) -> Limit | None:
        """Return the limit that a stream is over which has just been opened; `plain`: it carries no HTTP, in which
        the agent could answer later."""
        if self.limits.streams and self.streams > self.limits.streams:
            return Limit.STREAMS
        if plain and self._day_spent and self._has_spent_day(now):
            return Limit.BYTES_PER_DAY
        if plain and now < self.loop_time.refused_until:
            return Limit.LOOP_SHARE
        return None

    def has_too_many_sessions(self) -> bool:
        """Return whether more sessions have entered than may."""
        return bool(self.limits.sessions) and len(self.members) > self.limits.sessions

    # -- bytes (`mux.pacing.Pacer`), for each read and each flush: hence the same lines twice, without a call ---------

    def bytes_sent(self, count: int, now: float) -> float:
        """Count bytes that left for the user; return the seconds to wait before the next ones."""
        if now >= self._day_ends:
            self._begin_day(now)
        self.moved_today += count
        if self.moved_today >= self._day_most and not self._day_spent:
            self._spend_day()
        bucket = self._to_user
        if bucket is None or bucket.take(now, count):
            return 0.0
        return self._accounts.pace("to_user", bucket, count, now)

    def bytes_received(self, count: int, now: float) -> float:
        """Count bytes that came from the user; return the seconds to wait before more are read."""
        if now >= self._day_ends:
            self._begin_day(now)
        self.moved_today += count
        if self.moved_today >= self._day_most and not self._day_spent:
            self._spend_day()
        bucket = self._to_cluster
        if bucket is None or bucket.take(now, count):
            return 0.0
        return self._accounts.pace("to_cluster", bucket, count, now)

    # -- refusals ---------------------------------------------------------------------------------------------------

    def refuse(self, limit: Limit, now: float) -> int | None:
        """Count a refusal. Return None where it is one of a burst, whose beginning was reported; else it is to be
        reported, and the number is how many of the burst before were not."""
        self._accounts.refusals[limit] += 1
        burst = self._bursts.get(limit)
        if burst is not None and now - burst.last < BURST_GAP and now - burst.began < BURST_LENGTH:
            burst.last = now
            burst.omitted += 1
            return None
        self._bursts[limit] = _Burst(now)
        return burst.omitted if burst is not None else 0

    def take_omitted(self) -> dict[Limit, int]:
        """Return how many refusals of each limit were reported nowhere, and forget them."""
        found = {limit: burst.omitted for limit, burst in self._bursts.items() if burst.omitted}
        self._bursts.clear()
        return found

    def hold(self, now: float) -> float:
        """Return the seconds for which the answer to a refused request is held."""
        if self._prompt is None:
            self._prompt = TokenBucket(PROMPT_REFUSALS, PROMPT_REFUSALS)
        return HOLD if self._prompt.reserve(now) is None else 0.0

    def explain(self, limit: Limit) -> LimitReached:
        """Return the sentence for the user of a limit that was reached."""
        limits = self.limits
        day, audit = size(limits.bytes_per_day), size(limits.audit_bytes_per_second)
        text = _REACHED[limit].format(limits=limits, day=day, audit=audit, ask=_ASK)
        if limit is Limit.BYTES_PER_DAY:
            return LimitReached(limit, text, retry_at=(self._accounts.clock() // DAY + 1) * DAY)
        left = self.loop_time.refused_until - self._accounts.monotonic() if limit is Limit.LOOP_SHARE else 1
        return LimitReached(limit, text, retry_after=max(1, math.ceil(left)))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _apply(self, limits: AgentLimitsConfig) -> None:
        """Count by these limits from now on; what was taken stays taken."""
        now = self._accounts.monotonic()
        to_cluster, to_user = limits.bytes_per_second_to_cluster, limits.bytes_per_second_to_user
        self._requests = _bucket(self._requests, now, limits.request_burst, limits.requests_per_second)
        self._connects = _bucket(self._connects, now, 4 * limits.connects_per_second, limits.connects_per_second)
        self.loop_time.set_share(now, limits.loop_share / 100)
        self.seats.change(limits.apiserver_seats)
        self.waiting.most = limits.waiting_bytes or sys.maxsize
        self.audit.change(now, limits.audit_bytes_per_second)
        self._to_cluster = _bucket(self._to_cluster, now, to_cluster, to_cluster)
        self._to_user = _bucket(self._to_user, now, to_user, to_user)
        self._day_most = limits.bytes_per_day or math.inf
        was, self._day_spent = self._day_spent, self.moved_today >= self._day_most
        if self._day_spent and not was and now < self._day_ends:
            # What runs ends now and not with its next byte: the limit is about bytes that move, and not about starts.
            self._spend_day()

    def _hold(self, seconds: float) -> None:
        """The user takes too much of the event loop: what runs waits."""
        for member in self.members:
            member.hold(seconds)

    def _spend_day(self) -> None:
        """The user has moved as many bytes as a day allows: what runs ends."""
        self._day_spent = True
        for member in self.members:
            member.end_streams()

    def _has_spent_day(self, now: float) -> bool:
        """Return whether the user may move no more bytes today."""
        if self._day_spent and now >= self._day_ends:
            self._begin_day(now)
        return self._day_spent

    def _begin_day(self, now: float) -> None:
        self._day_ends = now + DAY - self._accounts.clock() % DAY
        self.moved_today = 0
        self._day_spent = False


class Accounts:
    """The accounts of one agent: one for each user with a session, and those that ended lately."""

    def __init__(
        self,
        config: AgentLimitsConfig | None = None,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config if config is not None else AgentLimitsConfig()
        self.clock = clock
        self.monotonic = monotonic
        self.loop = LoopShares()
        """The event loop's time, as the users share it."""
        self.relays: LoopTimes[str] = LoopTimes(self.config.loop_share / 100, size=MAX_RELAYS, shares=self.loop)
        """The time that tokens of sessions take whose users are not known yet, by the relay that sent the sessions."""
        self._present: dict[str, Account] = {}
        self._retired: OrderedDict[str, Account] = OrderedDict()
        """Accounts without a session, by subject, in the order in which they ended."""
        self.refusals = dict.fromkeys(Limit, 0)
        """Refusals by limit, of all users."""
        self.paced_seconds = {"to_cluster": 0.0, "to_user": 0.0}
        """Seconds that bytes over their users' bytes per second take at that rate, by direction."""
        self.actors: ActorAccounts | None = None
        """What actors hold; None: no session has had one."""

    def __len__(self) -> int:
        """Users with at least one session."""
        return len(self._present)

    def enter(self, identity: Identity, member: AccountSession) -> Account:
        """Return the account of the identity's subject with `member` in it; each `enter` needs one `leave`."""
        subject = identity.subject
        account = self._present.get(subject)
        if account is None:
            account = self._retired.pop(subject, None) or Account(self, identity)
            self._present[subject] = account
        account.adopt(identity)
        account.members.add(member)
        return account

    def enter_actor(self, name: str, member: AccountSession) -> ActorAccount:
        """Return the account of an actor with `member` in it, which `ActorAccount.leave` ends."""
        if self.actors is None:
            from arcbridge.agent.actor_accounts import ActorAccounts

            self.actors = ActorAccounts(self.config.actors, self.monotonic)
        return self.actors.enter(name, member)

    def change(self, config: AgentLimitsConfig) -> None:
        """Count by these limits from now on; what was taken stays taken."""
        self.config = config
        if self.actors is not None:
            self.actors.change(config.actors)
        self.relays.change(config.loop_share / 100, time.monotonic())
        for account in (*self._present.values(), *self._retired.values()):
            account.change_limits(limits_of(config, account.identity))

    def retire(self, account: Account) -> None:
        """Keep an account whose last session has ended (called by `Account.leave`)."""
        del self._present[account.subject]
        self._retired[account.subject] = account
        while len(self._retired) > MAX_REMEMBERED:
            self._retired.popitem(last=False)

    def pace(self, direction: str, bucket: TokenBucket, count: int, now: float) -> float:
        """Return the seconds until a bucket is out of debt, to which `count` bytes were added (called by `Account`)."""
        self.paced_seconds[direction] += count / bucket.rate
        seconds = bucket.wait(now, 0.0)
        if seconds > MAX_PACE:
            bucket.give((seconds - MAX_PACE) * bucket.rate)
            seconds = MAX_PACE
        return seconds


_ASK = "ask the cluster's operator for a higher limit"
_REACHED: dict[Limit, str] = {
    Limit.REQUESTS_PER_SECOND: "you send more than the {limits.requests_per_second} requests a second that one user "
    "may send; run fewer commands at once, or {ask}",
    Limit.CONCURRENT_REQUESTS: "{limits.concurrent_requests} requests of yours are under way, as many as one user may "
    "have; end watches and commands that you do not need, or {ask}",
    Limit.UPGRADED_STREAMS: "{limits.upgraded_streams} exec, attach and port-forward connections of yours are open, as "
    "many as one user may have; end some of them, or {ask}",
    Limit.STREAMS: "{limits.streams} connections of yours are open, as many as one user may have; end some of them, or "
    "{ask}",
    Limit.SESSIONS: "{limits.sessions} sessions of yours are open at this agent, as many as one user may have; end "
    "arcbridge where you do not need it, or {ask}",
    Limit.BYTES_PER_DAY: "you moved {day} today, which is what one user may move in a day; wait until 00:00 UTC, or "
    "{ask}",
    Limit.APISERVER_SEATS: "the API server works on {limits.apiserver_seats} requests of yours, or waits until their "
    "answers are read, as on many as it may; end programs that stand still, or {ask}",
    Limit.CONNECTS_PER_SECOND: "your requests need more than the {limits.connects_per_second} connections a second to "
    "the API server that one user may make; run fewer commands at once, or {ask}",
    Limit.AGENT_CONNECTS_PER_SECOND: "the agent makes as many connections to the API server as it may; try again "
    "shortly",
    Limit.TARGETS: "no target of that name is open to you; ask the cluster's operator for one",
    Limit.ARRIVING: "many large heads or bodies of requests of yours, or of all users, are on their way at once; run "
    "fewer commands at once, or send shorter headers",
    Limit.AUDIT_BYTES: "your requests fill more than the {audit} a second of the audit log that one user may fill; "
    "send fewer and shorter requests, or {ask}",
    Limit.LOOP_SHARE: "what you send takes more than the {limits.loop_share} % of the agent's time that one user may "
    "take while others wait; run fewer or smaller commands at once, or {ask}",
    Limit.AGENT_REQUESTS: "the agent has too many requests under way; try again shortly",
    Limit.ACTOR_SESSIONS: "the program that acts for you has as many sessions at this agent as it may have, over all "
    "users; end some of them, or {ask}",
    Limit.ACTOR_REQUESTS_PER_SECOND: "the program that acts for you sends more requests a second than it may, over all "
    "users; run fewer commands at once, or {ask}",
    Limit.ACTOR_CONCURRENT_REQUESTS: "the program that acts for you has as many requests under way as it may, over all "
    "users; end watches and commands that it does not need, or {ask}",
}


class _Burst:
    """Refusals of one limit that follow each other."""

    __slots__ = ("began", "last", "omitted")

    def __init__(self, now: float) -> None:
        self.began = self.last = now
        """Monotonic seconds of the first and of the latest refusal."""
        self.omitted = 0
        """Refusals that were not reported."""


def _value(
    name: str, config: AgentLimitsConfig, user: LimitsOverrideConfig | None, groups: Iterable[LimitsOverrideConfig]
) -> int:
    own: int | None = getattr(user, name) if user is not None else None
    if own is not None:
        return own
    of_groups: list[int] = [value for group in groups if (value := getattr(group, name)) is not None]
    if not of_groups:
        of_every_user: int = getattr(config, name)
        return of_every_user
    return 0 if 0 in of_groups else max(of_groups)  # 0, no limit, is the largest


def _check_table(path: str, table: AgentLimitsConfig | LimitsOverrideConfig) -> None:
    for name in _NAMES:
        value: int | None = getattr(table, name)
        if value is None:
            continue
        if value < 0:
            raise ConfigError(f"{path}.{name}: must be 0, for no limit, or above")
        if name == "loop_share" and value > 100:
            raise ConfigError(f"{path}.loop_share: must be a percentage: 0, for no limit, to 100")
        if name == "waiting_bytes" and 0 < value < LEAST_WAITING_BYTES:
            raise ConfigError(f"{path}.{name}: must be 0, for no limit, or at least {LEAST_WAITING_BYTES} (1 MiB)")
        if name == "audit_bytes_per_second" and 0 < value < LEAST_AUDIT_BYTES:
            raise ConfigError(f"{path}.{name}: must be 0, for no limit, or at least {LEAST_AUDIT_BYTES} (16 KiB/s)")
        if name.startswith("bytes_per_second") and 0 < value < LEAST_BYTE_RATE:
            raise ConfigError(f"{path}.{name}: must be 0, for no limit, or at least {LEAST_BYTE_RATE} (64 KiB/s)")
    if table.request_burst == 0:
        raise ConfigError(f"{path}.request_burst: must be at least 1; for no limit set requests_per_second to 0")


def _bucket(old: TokenBucket | None, now: float, burst: int, rate: int) -> TokenBucket | None:
    """Return the bucket of a limit that has just been set; none where there is no limit."""
    if not rate:
        return None
    if old is None:
        return TokenBucket(burst, rate)
    old.change(now, burst, rate)
    return old
