"""Keeps one session from its first AUTH_OK to its end, over as many connections as that takes.

When the connection under open streams is lost, the session is resumed: the client joins again through any relay, asks
for the agent instance that holds the session, and makes a new end-to-end TLS with a current token. The same happens
while the old connection still works when the agent asks for it (make before break), and when the old one is suspect
because this machine slept or lost its address. At most one task does this at a time; it tries until

1. the session is attached to a new connection;
2. the session has ended: the agent said so, or it was detached for too long (by the clock of the session itself);
3. the old connection has proved to be alive (only after a sleep of this machine).

A session without open streams is not resumed: it ends, and its owner establishes a new one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

from arcbridge.client.credentials.tokens import ClusterToken, Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.client.session.connection import Joined, join, shake_hands
from arcbridge.client.session.refusal import ACCESS_REVOKED, Shown, is_elsewhere, is_unanswered, raise_user_error
from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    DishonestPath,
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

RETRY_DELAY_LIMIT = 5.0
"""Largest delay between two tries, seconds: users wait for the streams."""
STABLE_AFTER = 1.0
"""Seconds after which a connection counts as stable: its loss is followed by a try at once, not by the backoff."""
MOVE_SPREAD = 3.0
"""Seconds over which the clients of a draining relay spread their moves."""
FORBIDDEN_TIMEOUT = 2.0
"""Seconds of refusals after which the session ends: an agent reconnects to a relay in less."""
NOT_ALLOWED = f"{ACCESS_REVOKED}you may not reach it; ask the relay's operator for access"
"""Why it ends then: the relay's own words are not shown."""
MISSING_TIMEOUT = 10.0
"""Seconds for which relays may answer that they have other agents of the cluster, but not the one with the session: it
may be reconnecting to a relay that was restarted. Afterwards the agent is taken for gone."""
MISSING_TIMEOUT_AFTER_OUTAGE = 60.0
"""The same where no relay could be reached meanwhile: the agents could not either, and each comes back by a backoff of
its own. A relay that paces the agents of many clusters puts one off for as long as a herd takes (docs/performance.md)
and more; an agent of an older version waits for up to 30 s by itself."""
RETRY_HINT_LIMIT = 600.0
"""Largest retry time of a relay or an agent that is obeyed, seconds."""

REASONS = ("gone", "timeout", "refused", "protocol", "closed")
"""Why a detached session was not resumed."""
DETACHED_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
"""Bounds of the histogram of detached seconds: from a try that succeeds at once to the longest wait there is."""

log = structlog.get_logger("arcbridge.client")


class ResumableSessionStats:
    """Counters over all sessions of one cluster."""

    __slots__ = ("detached_seconds", "moved", "replayed_bytes", "resume_failures", "resumed")

    def __init__(self) -> None:
        self.resumed = 0
        """Sessions that were resumed after their connection was lost."""
        self.moved = 0
        """Sessions that moved to another connection while theirs still worked."""
        self.resume_failures = dict.fromkeys(REASONS, 0)
        self.replayed_bytes = 0
        """Bytes sent again by sessions that have ended."""
        self.detached_seconds = Buckets(DETACHED_BOUNDS)


class Renewal:
    """When to send a newer token in the session; monotonic seconds."""

    __slots__ = ("at", "ends_at", "sent")

    def __init__(self, sent: ClusterToken, lifetime: float, now: float) -> None:
        self.sent = sent
        self.ends_at = now + lifetime if lifetime > 0 else 0.0
        # 80 % of the life, or five minutes before its end, but not in the first half.
        self.at = now + max(min(0.8 * lifetime, lifetime - 300), 0.5 * lifetime) if lifetime > 0 else 0.0

    def again(self, now: float, interval: float) -> None:
        """Schedule another try after `interval` seconds, or sooner where so long a wait would miss the token's end.

        The first try may come a moment before the login takes its own token for old, and finds that one.
        """
        left = self.ends_at - now if self.ends_at else 4 * interval
        self.at = now + min(interval, max(left / 4, 1.0))


class ResumableSession:
    """Keeps one session alive; its owner reports what happens to the session."""

    def __init__(
        self,
        session: MuxSession,
        cluster: str,
        relays: Relays,
        tokens: Tokens,
        joined: Joined,
        *,
        stats: ResumableSessionStats,
        clock: Callable[[], float],
        on_attached: Callable[[ResumableSession], None],
        on_failed: Callable[[ResumableSession, ArcbridgeError], None],
        replace: Callable[[ResumableSession], Awaitable[bool]],
    ) -> None:
        """`on_attached` is called after each new connection, `on_failed` after each failed try while detached.

        `replace` makes a fresh session the current one in place of this one, and returns False where this one was not
        the current one; it may raise ArcbridgeError.
        """
        self.session = session
        self.relay = joined.relay
        """The relay of the present connection; while detached, of the last one."""
        self.renewal: Renewal | None = None
        self.expires_in = 0.0
        """Seconds for which the agent accepts the token sent last; 0: it did not say."""
        self._cluster = cluster
        self._relays = relays
        self._tokens = tokens
        self._ca_pin = pin_of(joined.reply.cluster_ca)
        self._stats = stats
        self._clock = clock
        self._on_attached = on_attached
        self._on_failed = on_failed
        self._replace = replace
        self._loop = asyncio.get_running_loop()
        self._backoff = Backoff(cap=RETRY_DELAY_LIMIT)
        self._attached_at = self._loop.time()
        self._lost_at: float | None = None
        self._streams_at_loss = 0
        """Number of open streams when the connection was lost."""
        self._resume_pending = False
        """Whether an agent is being asked to resume the session."""
        self._missing_since: float | None = None
        self._outage = False
        """Whether no relay could be reached since the connection was lost."""
        self.agent_stops = False
        """Whether the agent has said that it is being stopped: what runs goes on, and a lost connection is the end."""
        self._forbidden_since: float | None = None
        self._leaving: RelayAccess | None = None
        self._received_at_suspicion: int | None = None
        self._retry_now = asyncio.Event()
        """Set to end the wait before the next try."""
        self._task: asyncio.Task[None] | None = None
        self._first_session = joined.reply.join_id
        """The join id under which the session began; it goes through all that is said of it later."""
        self._log = log.bind(cluster=cluster, first_session=self._first_session)

    @property
    def detached(self) -> bool:
        """Whether the session waits for a connection."""
        return self._lost_at is not None

    @property
    def detached_for(self) -> float:
        """Seconds for which the session has been detached; 0 while it is attached."""
        return 0.0 if self._lost_at is None else self._loop.time() - self._lost_at

    # -- reports of the owner -----------------------------------------------------------------------------------------

    def connection_lost(self, error: ArcbridgeError) -> None:
        """The session's connection was lost."""
        if self._lost_at is not None or self.session.closed:
            return
        lasted = self._loop.time() - self._attached_at
        if self._wait_for_another(error):
            self._start(0.0 if lasted >= STABLE_AFTER else self._backoff.next_delay(lasted=lasted))

    def _wait_for_another(self, error: ArcbridgeError) -> bool:
        """Begin to be detached; returns False for a session without streams, which has ended."""
        if not self.session.streams_open:
            self.session.abort(error)
            return False
        now = self._loop.time()
        self._relays.failed(self.relay)
        self._lost_at = now
        self._streams_at_loss = self.session.streams_open
        self._log.warning(
            "connection lost, waiting to resume",
            session=self.session.label,
            reason=error.message,
            streams=self._streams_at_loss,
        )
        return True

    def move(self) -> None:
        """Move to another connection: the agent has asked for it, because the present one will end."""
        if self._lost_at is None:
            self._leaving = self.relay
            self._start(random.random() * MOVE_SPREAD, now=False)

    def suspect(self, reason: str, *, surely: bool = False) -> None:
        """The present connection is likely dead, or cannot work any more (`surely`), though no error has shown it."""
        session = self.session
        if session.closed or self._received_at_suspicion is not None:
            return
        if self._lost_at is not None:
            self._retry_now.set()
        elif session.resumable and session.streams_open:
            self._log.info("connection suspect", session=session.label, reason=reason)
            self._received_at_suspicion = session.stats.bytes_received
            self._start(0.0)
        elif surely or not session.streams_open:
            session.abort(ConnectionLost(reason))

    def retry_now(self) -> None:
        """Make the next try now: a caller waits for the session."""
        self._retry_now.set()

    def ended(self, error: ArcbridgeError) -> None:
        """The session has ended."""
        self.stop()
        self._stats.replayed_bytes += self.session.stats.replayed_bytes
        if self._lost_at is None:
            return
        waited, self._lost_at = self._loop.time() - self._lost_at, None
        self._stats.detached_seconds.observe(waited)
        reason = _failure_reason(error, during_resume=self._resume_pending)
        self._stats.resume_failures[reason] += 1
        log_line = self._log.debug if reason == "closed" else self._log.warning  # this client ended it itself
        log_line(
            "session could not be resumed",
            session=self.session.label,
            reason=error.message,
            after=round(waited, 1),
            streams=self._streams_at_loss,
        )

    def stop(self) -> None:
        """Cancel the task; what it holds is closed in the loop's next turns."""
        if self._task is not None:
            self._task.cancel()

    # -- the token ----------------------------------------------------------------------------------------------------

    def schedule_renewal(self, sent: ClusterToken) -> None:
        """Schedule by what the agent said in AUTH_OK, which may come before or after this call, else by the token."""
        lifetime = self.expires_in
        if not lifetime and sent.expires_at:
            lifetime = max(1.0, sent.expires_at - self._clock())
        self.renewal = Renewal(sent, lifetime, self._loop.time())

    def accepted(self, expires_in: float) -> None:
        """AUTH_OK was received: the first one, after a renewal, or after a resumption."""
        self.expires_in = expires_in
        if self.renewal is not None:
            self.schedule_renewal(self.renewal.sent)

    def auth(self, token: ClusterToken, certificate: bytes) -> Auth:
        """Return the AUTH for a connection in which the agent showed `certificate` (DER). Raises StateError."""
        proof = self._tokens.prove(token.text, certificate, self._ca_pin)
        return Auth(kind=token.kind, token=token.text, proof=proof)

    # -- the one task -------------------------------------------------------------------------------------------------

    def _start(self, delay: float, *, now: bool = True) -> None:
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._run(delay))
            self._task.add_done_callback(self._task_done)
        elif now:
            self._retry_now.set()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._loop.call_exception_handler(
            {"message": f"keeping the session {self.session.label} failed", "exception": error, "task": task}
        )
        self.session.abort(ConnectionLost("an internal error; the log has its cause"))

    def _must_attach(self) -> bool:
        if self.session.closed:
            return False
        if self._lost_at is not None or self._leaving is not None:
            return True
        before = self._received_at_suspicion
        if before is not None and self.session.stats.bytes_received > before:
            self._received_at_suspicion = before = None  # bytes have come since, so the connection is alive
        return before is not None

    async def _run(self, delay: float) -> None:
        while self._must_attach():
            await self._wait(delay)
            if not self._must_attach():
                return
            try:
                if self._lost_at is None and self._leaving is not None and not self._worth_moving():
                    await self._move_new_streams()
                    delay = 0.0
                    continue
                await self._attach()
            except ArcbridgeError as error:
                if self.session.closed:
                    return  # the session itself tells its owner
                if isinstance(error, Unauthenticated):
                    self._tokens.refused()
                delay = self._after_failure(error)
            else:
                if self.session.state is State.DETACHED:
                    # The new connection was lost before this task had its turn.
                    delay = self._after_failure(Unreachable(f'the connection to cluster "{self._cluster}" was lost'))
                elif not self.session.closed:
                    self._note_attached()

    def _worth_moving(self) -> bool:
        return self.session.resumable and self.session.streams_open > 0

    async def _move_new_streams(self) -> None:
        """Lead new streams to a fresh session. Streams that were opened meanwhile move with this one."""
        replaced = await self._replace(self)
        if self._worth_moving():
            return
        self._leaving = None
        if replaced and self.session.streams_open:
            self.session.goaway(GoawayCode.DONE, "the client moved to another connection")
        elif replaced:
            self.session.close(GoawayCode.DONE, "the client moved to another connection")

    async def _wait(self, delay: float) -> None:
        self._retry_now.clear()
        if delay <= 0:
            return
        try:
            async with asyncio.timeout(delay):
                await self._retry_now.wait()
        except TimeoutError:
            pass

    async def _attach(self) -> None:
        """Try once to attach the session to a new connection; raises ArcbridgeError with a message for the user."""
        session, hello = self.session, self.session.peer_hello
        # Before the join, because an agent that has joined does not wait for long.
        token = await self._tokens.cluster()
        try:
            joined = await join(
                self._relays,
                self._cluster,
                self._tokens,
                instance=hello.agent if hello is not None else "",
                first_session=self._first_session,
                leaving=self._leaving,
            )
        except Unreachable as error:
            self._outage = self._outage or (self._lost_at is not None and is_unanswered(error))
            raise
        try:
            require_pin(f"the CA of cluster {self._cluster!r}", self._ca_pin, joined.reply.cluster_ca)
            if session.closed:
                raise Unreachable(f'the session with cluster "{self._cluster}" ended')
        except BaseException:
            joined.sock.close()
            raise
        before = self.renewal, self.expires_in
        self.renewal, self.expires_in = None, 0.0
        self._resume_pending = True
        try:
            await shake_hands(
                joined,
                self._cluster,
                lambda: session.resume(lambda certificate: self.auth(token, certificate), label=joined.reply.join_id),
                session.wait_attached,
            )
        except ArcbridgeError as error:
            error.session = joined.reply.join_id
            # Where the old connection still works, its token is renewed as before.
            self.renewal, self.expires_in = before
            if not isinstance(error, SessionEnded) or error.code == GoawayCode.CROSSED:
                self._relays.failed(joined.relay)
            shown = Shown(token.text, self._tokens.cluster_source)
            raise_user_error(error, self._cluster, shown=shown, session=joined.reply.join_id)
        finally:
            self._resume_pending = session.closed  # a session that ended here was refused by the agent
        self.relay = joined.relay
        self.schedule_renewal(token)

    def _after_failure(self, error: ArcbridgeError) -> float:
        """Take note of a failed try; returns the seconds until the next one."""
        tell = self._log.warning if isinstance(error.__cause__, DishonestPath) else self._log.debug
        tell("not resumed yet", session=self.session.label, reason=error.message)
        if self._lost_at is None and self.session.state is State.DETACHED:
            self._wait_for_another(error)  # the new connection had replaced the old one, and was lost
        if self._lost_at is not None:
            self._on_failed(self, error)
        self._note_whether_forbidden(error)
        self._note_whether_missing(error)
        hint = _hint(error)
        lasted, self._attached_at = self._loop.time() - self._attached_at, self._loop.time()
        return self._backoff.next_delay(lasted=lasted, hint=hint)

    def _note_whether_forbidden(self, error: ArcbridgeError) -> None:
        """End the session when all relays have refused this user for FORBIDDEN_TIMEOUT: it was revoked, or the policy
        has changed. Before that, a relay that has lost its registry may only not have met the agent yet."""
        now = self._loop.time()
        if self._lost_at is None or not isinstance(error, PermissionRefused):
            self._forbidden_since = None
        elif self._forbidden_since is None:
            self._forbidden_since = now
        elif now - self._forbidden_since >= FORBIDDEN_TIMEOUT:
            self._resume_pending = True
            self.session.abort(SessionEnded(GoawayCode.REVOKED, NOT_ALLOWED))

    def _note_whether_missing(self, error: ArcbridgeError) -> None:
        now = self._loop.time()
        if self._lost_at is None or not is_elsewhere(error):
            self._missing_since = None
        elif self.agent_stops:
            self._resume_pending = True
            reason = "the agent that has the session is being stopped, and takes no connection any more"
            self.session.abort(SessionEnded(GoawayCode.GONE, reason))
        elif self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since >= (MISSING_TIMEOUT_AFTER_OUTAGE if self._outage else MISSING_TIMEOUT):
            self._resume_pending = True  # as after GONE of the agent itself
            self.session.abort(SessionEnded(GoawayCode.GONE, "the agent that had the session is gone"))

    def _note_attached(self) -> None:
        now = self._loop.time()
        fields = {"session": self.session.label, "relay": str(self.relay.address), "streams": self.session.streams_open}
        if self._lost_at is not None:
            self._stats.resumed += 1
            self._stats.detached_seconds.observe(now - self._lost_at)
            self._log.info("session resumed", after=round(now - self._lost_at, 1), **fields)
        else:
            self._stats.moved += 1
            self._log.info("session moved to another connection", **fields)
        self._lost_at = self._leaving = self._received_at_suspicion = None
        self._missing_since = self._forbidden_since = None
        self._outage = False
        self._attached_at = now
        self._on_attached(self)


def _hint(error: ArcbridgeError) -> float | None:
    """Return the seconds that the other end asked to wait. The retry times of our own errors are for kubectl and do not
    count."""
    cause = error.__cause__
    if isinstance(cause, TimeoutError):
        return None
    said = cause if isinstance(cause, SessionEnded | ConnectionLost) else error
    return None if said.retry_after is None else min(float(said.retry_after), RETRY_HINT_LIMIT)


def _failure_reason(error: ArcbridgeError, *, during_resume: bool) -> str:
    """Return one of `REASONS`. GONE outside a resumption comes from the session's own clock: it was detached for too
    long."""
    if not isinstance(error, SessionEnded):
        return "closed" if isinstance(error, ConnectionLost) else "protocol"
    match error.code:
        case GoawayCode.GONE:
            return "gone" if during_resume else "timeout"
        case GoawayCode.DONE:
            return "closed"
        case GoawayCode.UNAUTHENTICATED | GoawayCode.FORBIDDEN | GoawayCode.EXPIRED | GoawayCode.REVOKED:
            return "refused"
        case _:
            return "protocol"
