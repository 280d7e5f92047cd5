"""One session from its first AUTH_OK to its end, over as many connections as that takes.

When the connection under open streams is lost, the session is resumed: joined again through any relay, with the agent
instance that holds it, a new end-to-end TLS and a current token. The same is done while the old connection still
works when the agent asks for it (make before break), and when the old one is suspect because this machine slept or
lost its address. There is one task at a time, whatever asked for it, and it tries until one of these is true:

1. the session is attached to a new connection;
2. it is over: the agent said so, or it was detached for too long (the machine's clock);
3. the old connection proved to be alive (after a sleep only).

A session without open streams has nothing to keep: it ends, and its owner makes a new one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

from arcbridge.client.connection import Joined, join, shake_hands
from arcbridge.client.refusal import is_elsewhere, raise_user_error
from arcbridge.client.relay_access import RelayAccess
from arcbridge.client.relays import Relays
from arcbridge.client.tokens import ClusterToken, Tokens
from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    PermissionRefused,
    SessionEnded,
    Unauthenticated,
    Unreachable,
)
from arcbridge.mux.session import MuxSession
from arcbridge.net.backoff import Backoff
from arcbridge.observe.metrics import Buckets
from arcbridge.pki.pins import pin_of, require_pin
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Auth
from arcbridge.wire.state import State

RESUME_CAP = 5.0
"""Largest bound between two tries, seconds: streams wait, and people behind them."""
STEADY = 1.0
"""A connection that lived this long, seconds, is redialled at once; one that did not, after the backoff's delay."""
MOVE_SPREAD = 3.0
"""Seconds over which the clients of a relay that goes away spread."""
FORBIDDEN_MOST = 2.0
"""Seconds of refusals after which streams wait no longer: an agent is back at a relay sooner."""
MISSING_MOST = 10.0
"""Seconds for which relays may say that they have other agents of the cluster, but not the one with the session. It may
be on its way back to a relay that was restarted; after that it is taken for gone."""
HINT_MOST = 600.0
"""A relay's or agent's retry time is obeyed up to here, seconds."""

REASONS = ("gone", "timeout", "refused", "protocol", "closed")
"""Why a detached session was not resumed."""
DETACHED_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
"""Of the histogram of waits, seconds: from a redial that succeeds at once to the longest wait there is."""

log = structlog.get_logger("arcbridge.client")


class ResumableSessionStats:
    """Counters over all sessions of one cluster."""

    __slots__ = ("detached_seconds", "moved", "replayed_bytes", "resume_failures", "resumed")

    def __init__(self) -> None:
        self.resumed = 0
        """Sessions that were back after their connection was lost."""
        self.moved = 0
        """Sessions that went to another connection while theirs still worked."""
        self.resume_failures = dict.fromkeys(REASONS, 0)
        self.replayed_bytes = 0
        """Of sessions that are over."""
        self.detached_seconds = Buckets(DETACHED_BOUNDS)


class Renewal:
    """When the session's token has to be followed by a newer one; monotonic seconds."""

    __slots__ = ("at", "ends_at", "sent")

    def __init__(self, sent: ClusterToken, life: float, now: float) -> None:
        self.sent = sent
        self.ends_at = now + life if life > 0 else 0.0
        # 80 % of the life, or five minutes before its end, but not in the first half.
        self.at = now + max(min(0.8 * life, life - 300), 0.5 * life) if life > 0 else 0.0


class ResumableSession:
    """Keeps one session alive; its owner tells it what happens to the session."""

    def __init__(
        self,
        session: MuxSession,
        cluster: str,
        relays: Relays,
        tokens: Tokens,
        joined: Joined,
        *,
        stats: ResumableSessionStats,
        wall: Callable[[], float],
        back: Callable[[ResumableSession], None],
        failed: Callable[[ResumableSession, ArcbridgeError], None],
        replace: Callable[[ResumableSession], Awaitable[bool]],
    ) -> None:
        """`back` hears of each new connection, `failed` of each failed try while detached.

        `replace` leads new streams to a fresh session, where this one was the one for them (else it answers False); it
        may raise ArcbridgeError.
        """
        self.session = session
        self.relay = joined.relay
        """The relay of the present connection, or of the last one."""
        self.renewal: Renewal | None = None
        self.expires_in = 0.0
        """Seconds that the agent gives the token sent last; 0: it did not say."""
        self._cluster = cluster
        self._relays = relays
        self._tokens = tokens
        self._ca_pin = pin_of(joined.reply.cluster_ca)
        self._stats = stats
        self._wall = wall
        self._back = back
        self._failed = failed
        self._replace = replace
        self._loop = asyncio.get_running_loop()
        self._backoff = Backoff(cap=RESUME_CAP)
        self._attached_at = self._loop.time()
        self._lost_at: float | None = None
        self._streams = 0
        """Open streams at the loss."""
        self._asking = False
        """Whether an agent is being asked to take the session back."""
        self._missing_since: float | None = None
        self._forbidden_since: float | None = None
        self._leaving: RelayAccess | None = None
        self._received_at_suspicion: int | None = None
        self._now = asyncio.Event()
        """Set: do not wait any longer before the next try."""
        self._task: asyncio.Task[None] | None = None
        self._log = log.bind(cluster=cluster)

    @property
    def detached(self) -> bool:
        """Whether the session waits for a connection."""
        return self._lost_at is not None

    @property
    def waited(self) -> float:
        """Seconds for which the session has waited for a connection; 0: it has one."""
        return 0.0 if self._lost_at is None else self._loop.time() - self._lost_at

    # -- what happens to it -------------------------------------------------------------------------------------------

    def lost(self, error: ArcbridgeError) -> None:
        """The connection under the session is gone."""
        if self._lost_at is not None or self.session.closed:
            return
        lasted = self._loop.time() - self._attached_at
        if self._wait_for_another(error):
            self._begin(0.0 if lasted >= STEADY else self._backoff.next_delay(lasted=lasted))

    def _wait_for_another(self, error: ArcbridgeError) -> bool:
        """Streams wait from now on; False when there are none, and the session is over."""
        if not self.session.streams_open:
            self.session.abort(error)
            return False
        now = self._loop.time()
        self._relays.failed(self.relay)
        self._lost_at = now
        self._streams = self.session.streams_open
        self._log.warning(
            "connection lost, waiting to resume",
            session=self.session.label,
            reason=error.message,
            streams=self._streams,
        )
        return True

    def move(self) -> None:
        """The present connection goes away soon."""
        if self._lost_at is None:
            self._leaving = self.relay
            self._begin(random.random() * MOVE_SPREAD, now=False)

    def suspect(self, reason: str, *, surely: bool = False) -> None:
        """The present connection is likely dead (`surely`: cannot live), though nothing has said so."""
        session = self.session
        if session.closed or self._received_at_suspicion is not None:
            return
        if self._lost_at is not None:
            self._now.set()
        elif session.resumable and session.streams_open:
            self._log.info("connection suspect", session=session.label, reason=reason)
            self._received_at_suspicion = session.stats.bytes_received
            self._begin(0.0)
        elif surely or not session.streams_open:
            session.abort(ConnectionLost(reason))

    def wanted(self) -> None:
        """Somebody waits for the session: the next try is now."""
        self._now.set()

    def over(self, error: ArcbridgeError) -> None:
        """The session has ended."""
        self.stop()
        self._stats.replayed_bytes += self.session.stats.replayed_bytes
        if self._lost_at is None:
            return
        waited, self._lost_at = self._loop.time() - self._lost_at, None
        self._stats.detached_seconds.observe(waited)
        reason = _reason(error, asked=self._asking)
        self._stats.resume_failures[reason] += 1
        tell = self._log.debug if reason == "closed" else self._log.warning  # this client's own end is no news
        tell(
            "session could not be resumed",
            session=self.session.label,
            reason=error.message,
            after=round(waited, 1),
            streams=self._streams,
        )

    def stop(self) -> None:
        """End the work under way; what it holds is closed in the loop's next turns."""
        if self._task is not None:
            self._task.cancel()

    # -- the token ----------------------------------------------------------------------------------------------------

    def schedule_renewal(self, sent: ClusterToken) -> None:
        """By the agent's word, or else by the token's own. AUTH_OK may come before this is called, or after."""
        life = self.expires_in
        if not life and sent.expires_at:
            life = max(1.0, sent.expires_at - self._wall())
        self.renewal = Renewal(sent, life, self._loop.time())

    def accepted(self, expires_in: float) -> None:
        """AUTH_OK came: the first, after a renewal, or after a resumption."""
        self.expires_in = expires_in
        if self.renewal is not None:
            self.schedule_renewal(self.renewal.sent)

    # -- the one task -------------------------------------------------------------------------------------------------

    def _begin(self, delay: float, *, now: bool = True) -> None:
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._work(delay))
            self._task.add_done_callback(self._ended)
        elif now:
            self._now.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._loop.call_exception_handler(
            {"message": f"keeping the session {self.session.label} failed", "exception": error, "task": task}
        )
        self.session.abort(ConnectionLost("an internal error; the log has its cause"))

    def _needed(self) -> bool:
        if self.session.closed:
            return False
        if self._lost_at is not None or self._leaving is not None:
            return True
        before = self._received_at_suspicion
        if before is not None and self.session.stats.bytes_received > before:
            self._received_at_suspicion = before = None  # it lives
        return before is not None

    async def _work(self, delay: float) -> None:
        while self._needed():
            await self._wait(delay)
            if not self._needed():
                return
            try:
                if self._lost_at is None and self._leaving is not None and not self._worth_moving():
                    await self._move_new_streams()
                    delay = 0.0
                    continue
                await self._attach()
            except ArcbridgeError as error:
                if self.session.closed:
                    return  # its owner hears of that by itself
                if isinstance(error, Unauthenticated):
                    self._tokens.refused()
                delay = self._after_failure(error)
            else:
                if self.session.state is State.DETACHED:
                    # It was attached, and lost before this task had its turn: whoever was told of it waits on.
                    delay = self._after_failure(Unreachable(f'the connection to cluster "{self._cluster}" was lost'))
                elif not self.session.closed:
                    self._is_back()

    def _worth_moving(self) -> bool:
        return self.session.resumable and self.session.streams_open > 0

    async def _move_new_streams(self) -> None:
        """New streams go to a fresh session; what runs here may finish, or moves if it began meanwhile."""
        replaced = await self._replace(self)
        if self._worth_moving():
            return
        self._leaving = None
        if replaced and self.session.streams_open:
            self.session.goaway(GoawayCode.DONE, "the client moved to another connection")
        elif replaced:
            self.session.close(GoawayCode.DONE, "the client moved to another connection")

    async def _wait(self, delay: float) -> None:
        self._now.clear()
        if delay <= 0:
            return
        try:
            async with asyncio.timeout(delay):
                await self._now.wait()
        except TimeoutError:
            pass

    async def _attach(self) -> None:
        """One try to bring the session to a new connection; raises ArcbridgeError in the person's words."""
        session, hello = self.session, self.session.peer_hello
        # Before the join: an agent that has joined does not wait for long.
        token = await self._tokens.cluster()
        joined = await join(
            self._relays,
            self._cluster,
            self._tokens,
            instance=hello.agent if hello is not None else "",
            leaving=self._leaving,
        )
        try:
            require_pin(f"the CA of cluster {self._cluster!r}", self._ca_pin, joined.reply.cluster_ca)
            if session.closed:
                raise Unreachable(f'the session with cluster "{self._cluster}" ended')
        except BaseException:
            joined.sock.close()
            raise
        before = self.renewal, self.expires_in
        self.renewal, self.expires_in = None, 0.0
        auth = Auth(kind=token.kind, token=token.text)
        self._asking = True
        try:
            await shake_hands(
                joined,
                self._cluster,
                lambda: session.resume(auth, label=joined.reply.join_id),
                session.wait_attached,
            )
        except ArcbridgeError as error:
            # Where the old connection is still there, its token goes on to be renewed.
            self.renewal, self.expires_in = before
            if not isinstance(error, SessionEnded):
                self._relays.failed(joined.relay)
            raise_user_error(error, self._cluster)
        finally:
            self._asking = session.closed  # then that was the answer
        self.relay = joined.relay
        self.schedule_renewal(token)

    def _after_failure(self, error: ArcbridgeError) -> float:
        """Seconds until the next try."""
        self._log.debug("not resumed yet", session=self.session.label, reason=error.message)
        if self._lost_at is None and self.session.state is State.DETACHED:
            self._wait_for_another(error)  # the new connection had replaced the old one, and died
        if self._lost_at is not None:
            self._failed(self, error)
        self._note_whether_forbidden(error)
        self._note_whether_missing(error)
        hint = _hint(error)
        lasted, self._attached_at = self._loop.time() - self._attached_at, self._loop.time()
        return self._backoff.next_delay(lasted=lasted, hint=hint)

    def _note_whether_forbidden(self, error: ArcbridgeError) -> None:
        """No relay lets this user reach the cluster: it was revoked, or the policy has changed, unless a relay that has
        lost its registry is about to meet the agent."""
        now = self._loop.time()
        if self._lost_at is None or not isinstance(error, PermissionRefused):
            self._forbidden_since = None
        elif self._forbidden_since is None:
            self._forbidden_since = now
        elif now - self._forbidden_since >= FORBIDDEN_MOST:
            self._asking = True
            self.session.abort(SessionEnded(GoawayCode.REVOKED, error.message))

    def _note_whether_missing(self, error: ArcbridgeError) -> None:
        now = self._loop.time()
        if self._lost_at is None or not is_elsewhere(error):
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since >= MISSING_MOST:
            self._asking = True  # as if the agent itself had said so
            self.session.abort(SessionEnded(GoawayCode.GONE, "the agent that had the session is gone"))

    def _is_back(self) -> None:
        now = self._loop.time()
        told = {"session": self.session.label, "relay": str(self.relay.address), "streams": self.session.streams_open}
        if self._lost_at is not None:
            self._stats.resumed += 1
            self._stats.detached_seconds.observe(now - self._lost_at)
            self._log.info("session resumed", after=round(now - self._lost_at, 1), **told)
        else:
            self._stats.moved += 1
            self._log.info("session moved to another connection", **told)
        self._lost_at = self._leaving = self._received_at_suspicion = None
        self._missing_since = self._forbidden_since = None
        self._attached_at = now
        self._back(self)


def _hint(error: ArcbridgeError) -> float | None:
    """Seconds that the other end asked to wait; what our own words ask of kubectl would be time lost here."""
    cause = error.__cause__
    if isinstance(cause, TimeoutError):
        return None
    said = cause if isinstance(cause, SessionEnded | ConnectionLost) else error
    return None if said.retry_after is None else min(float(said.retry_after), HINT_MOST)


def _reason(error: ArcbridgeError, *, asked: bool) -> str:
    """One of `REASONS`. The session's own clock says GONE as an agent does, but in no answer to a question."""
    if not isinstance(error, SessionEnded):
        return "closed" if isinstance(error, ConnectionLost) else "protocol"
    match error.code:
        case GoawayCode.GONE:
            return "gone" if asked else "timeout"
        case GoawayCode.DONE:
            return "closed"
        case GoawayCode.UNAUTHENTICATED | GoawayCode.FORBIDDEN | GoawayCode.EXPIRED | GoawayCode.REVOKED:
            return "refused"
        case _:
            return "protocol"
