"""Keeps one session for each caller and cluster: establishes it for the first request, and ends it when it idles.

It reads no HTTP. A session belongs to the texts of its caller's tokens and to its cluster, and is found by nothing
else. It serves no request before relay and agent have accepted those tokens, and ends with them: a caller whose token
was renewed gets another session, and the former one idles out. Invariant: no request is given the session of other
tokens, and the number of sessions, and of new ones in a time, is bounded (docs/threats.md#W38).
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import structlog

from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.client.credentials.tokens import OneToken
from arcbridge.client.serving.gateway.caller_tokens import CallerTokens
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.errors import ArcbridgeError, OverLimit, PermissionRefused, PinMismatch, Unauthenticated, Unreachable
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.mux.session import MuxSession
from arcbridge.tasks import cancel_and_wait

SESSIONS: Final = 1000
"""Sessions at a time; beyond them the one that has idled longest makes room."""
SESSIONS_OF_CALLER: Final = 100
"""Of them those of one pair of tokens, which are as many clusters."""
REQUESTS: Final = 256
"""Requests of one caller to one cluster at a time. The agent has limits of its own for each user."""
REQUESTS_OF_CALLER: Final = 1024
"""Requests of one caller to all clusters at a time: each may have a connection, and others need some, too."""
IDLE: Final = 300.0
"""Seconds after the last request at which a session ends."""
NEW_SESSIONS: Final = 500
"""New sessions for requests from one address in a burst. A tool inside the cluster has all its users behind one."""
NEW_SESSIONS_PER_SECOND: Final = 20.0
ADDRESSES: Final = 10_000
"""Addresses that are counted, and users whose tokens were accepted."""
RENEWALS: Final = 10
"""New sessions in a burst, where an address has used up its own, for tokens that claim a user whose tokens were
accepted before: many made-up tokens behind one tool must not end the work of its other users."""
RENEWALS_PER_SECOND: Final = 0.2
REFUSED: Final = 10.0
"""Seconds for which tokens that were refused, and clusters that are not trusted, are refused again without another
question."""
FAILED: Final = 1.0
"""The same for tokens with which a cluster was not reached."""
FAILURES: Final = 1000
"""Failures that are remembered."""
SWEEP: Final = 5.0
"""Seconds between two looks for sessions that idle."""

log = structlog.get_logger("arcbridge.client")

MakeSession = Callable[[str, CallerTokens], SessionManager]
"""Makes what keeps the session of a caller to a cluster."""


class CallersCluster(NamedTuple):
    """What a session is for."""

    cluster: str
    tokens: CallerTokens


class CallerSession:
    """The session of one caller to one cluster."""

    def __init__(self, key: CallersCluster, manager: SessionManager, now: float) -> None:
        self.key = key
        self.manager = manager
        self.requests = 0
        """Requests under way."""
        self.used_at = now
        """When the last one ended, monotonic seconds."""
        self.counted = False
        """Whether it counts as established, or as failed."""
        self._established = asyncio.get_running_loop().create_task(manager.connect_once())
        self._running: asyncio.Task[None] | None = None

    async def ready(self) -> MuxSession:
        """Return the session for a new stream. Raises ArcbridgeError."""
        await asyncio.shield(self._established)  # a request that is cancelled affects no other one
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self.manager.run())
        return await self.manager.ready()

    @property
    def is_over(self) -> bool:
        """Whether it was not established, or relay or agent have refused the tokens since then."""
        first = self._established
        if first.done() and (first.cancelled() or first.exception() is not None):
            return True
        return self.manager.current is None and isinstance(self.manager.failure, Unauthenticated | PermissionRefused)

    async def close(self) -> None:
        """End the session; its streams are reset."""
        await cancel_and_wait(self._established, *([self._running] if self._running is not None else []))
        self.manager.close()
        await self.manager.wait_closed()


class CallerSessions:
    """The sessions of all callers: `session` for each request; `sweep` runs beside, and `close` ends them."""

    def __init__(self, make: MakeSession, *, idle: float = IDLE, most: int = SESSIONS) -> None:
        """`idle`: seconds, as IDLE; `most`: sessions, as SESSIONS."""
        self._make = make
        self._idle = idle
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[CallersCluster, CallerSession] = {}
        self._draining: set[CallerSession] = set()
        """Those that take no new request because their tokens were refused, and have requests under way."""
        self._requests: Counter[CallerTokens] = Counter()
        """Requests under way by caller: kept, because a sum over all sessions would be made for each request."""
        self._failures: OrderedDict[CallersCluster, tuple[ArcbridgeError, float]] = OrderedDict()
        """Errors for callers, each until a time; in the order of their begin."""
        self._new: KeyedTokenBucket[str] = KeyedTokenBucket(NEW_SESSIONS, NEW_SESSIONS_PER_SECOND, size=ADDRESSES)
        self._accepted: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Issuers and subjects of tokens for clusters that were accepted, the last ones at the end."""
        self._renewals: KeyedTokenBucket[tuple[str, str]] = KeyedTokenBucket(
            RENEWALS, RENEWALS_PER_SECOND, size=ADDRESSES
        )
        self._ending: set[asyncio.Task[None]] = set()
        self.attempts: Counter[str] = Counter()
        """New sessions by how they went: `established`, `failed`, `limited`."""

    def __len__(self) -> int:
        return len(self._sessions) + len(self._draining)

    @property
    def requests(self) -> int:
        """Requests under way."""
        return self._requests.total()

    @asynccontextmanager
    async def session(self, tokens: CallerTokens, cluster: str, address: str) -> AsyncIterator[MuxSession]:
        """Give a request the session of its tokens to a cluster; `address`: where it comes from.

        Raises ArcbridgeError in the user's words.
        """
        one = self._of(CallersCluster(cluster, tokens), address)
        one.requests += 1
        self._requests[tokens] += 1
        try:
            try:
                session = await one.ready()
            except PinMismatch as error:
                mismatch = Unreachable(
                    f'this gateway cannot tell that cluster "{cluster}" is the right one, and sent nothing there; its '
                    "operator has to put the cluster's pin in order"
                )
                if self._failed(one, mismatch, lasting=not one.counted):
                    log.warning("no session", cluster=cluster, reason=error.message)
                raise mismatch from None
            except ArcbridgeError as error:
                self._failed(one, error, lasting=isinstance(error, Unauthenticated | PermissionRefused | OneToken))
                raise
            self._count(one, "established")
            yield session
        finally:
            one.requests -= 1
            one.used_at = self._loop.time()
            self._requests[tokens] -= 1
            if not self._requests[tokens]:
                del self._requests[tokens]
            if one in self._draining and not one.requests:
                self._close(one)

    def _of(self, key: CallersCluster, address: str) -> CallerSession:
        if self._requests[key.tokens] >= REQUESTS_OF_CALLER:
            raise OverLimit(
                f"you have {REQUESTS_OF_CALLER} requests under way at this gateway; wait for some", retry_after=1
            )
        one = self._sessions.get(key)
        if one is not None and not one.is_over:
            if one.requests >= REQUESTS:
                raise OverLimit(
                    f'you have {REQUESTS} requests to cluster "{key.cluster}" under way at this gateway; wait for some',
                    retry_after=1,
                )
            return one
        now = self._loop.time()
        if one is not None:
            self._end(one)
        error, until = self._failures.get(key, (None, 0.0))
        if error is not None and now < until:
            raise error.copy()
        self._admit(key, address, now)
        one = self._sessions[key] = CallerSession(key, self._make(key.cluster, key.tokens), now)
        return one

    def _admit(self, key: CallersCluster, address: str, now: float) -> None:
        """Make room for a new session. Raises OverLimit, Unreachable."""
        try:
            if self._new.reserve(address, now) is None and not self._is_renewal(key.tokens, now):
                wait = self._new.wait(address, now)
                raise OverLimit(
                    "too many new sessions were asked for from your address; try again later",
                    retry_after=math.ceil(wait),
                )
            sessions = (*self._sessions.values(), *self._draining)
            if sum(one.key.tokens == key.tokens for one in sessions) >= SESSIONS_OF_CALLER:
                raise OverLimit(
                    f"you have sessions to {SESSIONS_OF_CALLER} clusters at this gateway; wait until some have idled",
                    retry_after=math.ceil(self._idle),
                )
            if len(self) >= self._most:
                idle = [one for one in self._sessions.values() if not one.requests]
                if not idle:
                    raise Unreachable("this gateway has as many sessions as it may; try again later", retry_after=1)
                self._end(min(idle, key=lambda one: one.used_at))
        except ArcbridgeError:
            self.attempts["limited"] += 1
            raise

    def _is_renewal(self, tokens: CallerTokens, now: float) -> bool:
        """Return whether unverified tokens may be asked about because of the user that they claim."""
        user = _claimed_user(tokens)
        return user in self._accepted and self._renewals.take(user, now)

    def _count(self, one: CallerSession, result: str) -> None:
        if not one.counted:
            one.counted = True
            self.attempts[result] += 1
            if result == "established" and any(user := _claimed_user(one.key.tokens)):
                self._accepted[user] = None
                self._accepted.move_to_end(user)
                if len(self._accepted) > ADDRESSES:
                    self._accepted.popitem(last=False)

    def _failed(self, one: CallerSession, error: ArcbridgeError, *, lasting: bool) -> bool:
        """Note that a session is not there, for all its requests; return whether this request is the first to do so.

        `lasting`: it will not come back by itself.
        """
        if self._sessions.get(one.key) is not one or (one.counted and not lasting):
            return False  # another request has noted it, or the session comes back by itself
        self._count(one, "failed")
        self._failures.pop(one.key, None)
        while len(self._failures) >= FAILURES:
            self._failures.popitem(last=False)
        self._failures[one.key] = error.copy(), self._loop.time() + (REFUSED if lasting else FAILED)
        self._end(one)
        return True

    def _end(self, one: CallerSession) -> None:
        """Give a session to no request any more; it closes at once, or behind the last one that runs in it."""
        del self._sessions[one.key]
        if one.requests and one.manager.sessions():
            self._draining.add(one)  # an agent that drains lets them end, whatever the relay says of a new session
        else:
            self._close(one)

    def _close(self, one: CallerSession) -> None:
        self._draining.discard(one)
        ending = self._loop.create_task(one.close())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def sweep(self) -> None:
        """End what idles, in a loop until cancelled."""
        while True:
            await asyncio.sleep(SWEEP)
            self.end_idle()

    def end_idle(self) -> None:
        """End the sessions that have idled too long, or whose tokens are good no more."""
        now = self._loop.time()
        for one in list(self._sessions.values()):
            if one.is_over or (not one.requests and now - one.used_at >= self._idle):
                self._end(one)
        while self._failures and next(iter(self._failures.values()))[1] <= now - REFUSED:
            self._failures.popitem(last=False)

    async def close(self) -> None:
        """End all sessions."""
        for one in list(self._sessions.values()):
            self._end(one)
        for one in list(self._draining):
            self._close(one)
        await asyncio.gather(*self._ending)


def _claimed_user(tokens: CallerTokens) -> tuple[str, str]:
    claims = read_unverified(tokens.cluster)
    return claims.issuer, claims.subject
