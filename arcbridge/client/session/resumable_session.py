"""Keeps one session from its first AUTH_OK to its end, over as many connections as that takes.

When the connection under open streams is lost, the session is resumed: the client joins again through any relay, asks
for the agent instance that holds the session, and makes a new end-to-end TLS with a current token. The same happens
while the old connection still works when the agent asks for it (make before break), and when the old one is suspect
because this machine slept or lost its address. Tries go on until

1. the session is attached to a new connection;
2. the session has ended: by the agent, or because it was detached for too long (by the clock of the session itself);
3. the old connection has proved to be alive (only after a sleep of this machine).

A session without open streams is not resumed: it ends. The owner reports what happens to the session, makes the tries,
one at a time, and establishes new sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from arcbridge.client.credentials.tokens import ClusterToken
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.session.connection import ClusterAccess, Joined, join, shake_hands
from arcbridge.client.session.detachment import Detachment
from arcbridge.client.session.refusal import Shown, is_unanswered, raise_user_error
from arcbridge.client.session.renewal import NOT_SCHEDULED, TokenRenewal
from arcbridge.errors import ArcbridgeError, ConfigError, ConnectionLost, DishonestPath, SessionEnded, Unreachable
from arcbridge.mux.session import MuxSession
from arcbridge.net.backoff import Backoff
from arcbridge.observe.metrics import Buckets
from arcbridge.pki.pins import pin_of
from arcbridge.pki.succession import Succession
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.state import State

RETRY_DELAY_LIMIT = 5.0
"""Largest delay between two tries, seconds: users wait for the streams."""
STABLE_AFTER = 1.0
"""Seconds after which a connection counts as stable: its loss is followed by a try at once, not by the backoff."""
MOVE_SPREAD = 3.0
"""Seconds over which the clients of a draining relay spread their moves."""
RETRY_HINT_LIMIT = 600.0
"""Largest retry time of a relay or an agent that is obeyed, seconds."""
REASONS = ("gone", "timeout", "refused", "protocol", "closed")
"""Why a detached session was not resumed."""
DETACHED_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
"""Bounds of the histogram of detached seconds: from a try that succeeds at once to the longest wait there is."""

log = structlog.get_logger("arcbridge.client")


@dataclass
class SessionCounters:
    """Counters over all sessions of one cluster."""

    attempts: int = 0
    """Attempts to establish a session, or to resume one."""
    established: int = 0
    failures: int = 0
    """Attempts that failed and sessions that were refused."""
    resumed: int = 0
    """Sessions that were resumed after their connection was lost."""
    moved: int = 0
    """Sessions that moved to another connection while theirs still worked."""
    replayed_bytes: int = 0
    """Bytes sent again by sessions that have ended."""
    resume_failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    detached_seconds: Buckets = field(default_factory=lambda: Buckets(DETACHED_BOUNDS))


class ResumableSession:
    """One session, and what its owner has to know to keep it."""

    def __init__(
        self,
        session: MuxSession,
        access: ClusterAccess,
        joined: Joined,
        counters: SessionCounters,
        clock: Callable[[], float] = time.time,
        keep_cas: Callable[[Succession], None] = lambda cas: None,
    ) -> None:
        """`keep_cas`: keeps what is known of the cluster's CAs."""
        self._keep_cas = keep_cas
        self.session = session
        self.relay = joined.relay
        """The relay of the present connection; while detached, of the last one."""
        self._access = access
        self._relays, self._cluster, self._tokens, restrictions = access
        self.cas = joined.cas
        """The CAs of the cluster that count, as far as they are known."""
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        pin = self.cas.pins[self.cas.since]
        self.renewal = TokenRenewal(self._cluster, self._tokens, pin, clock, restrictions)
        self.detachment = Detachment()
        self._backoff = Backoff(cap=RETRY_DELAY_LIMIT)
        self._attached_at = self._loop.time()
        self._resume_pending = False
        """Whether an agent is being asked to resume the session."""
        self._leaving: RelayAccess | None = None
        self._target: RelayAccess | None = None
        """The nearer relay that it is to move to of its own accord; None: it goes where it may."""
        self._label_to_leave = ""
        """The join id of the connection that the agent has asked to leave since the last try began; empty: none."""
        self._received_at_suspicion: int | None = None
        self._retry_now = asyncio.Event()
        """Set to end the wait before the next try."""
        self._begun = asyncio.Event()
        """Set when the owner takes the session over: no try is made before, so that none acts on half a handover."""
        self._task: asyncio.Task[None] | None = None
        self._first_session = joined.reply.join_id
        """The join id under which the session began; each log line about it has it."""
        self._log = log.bind(cluster=self._cluster, first_session=self._first_session)

    def begin(self, sent: ClusterToken) -> None:
        """Note that the agent has accepted `sent`; the owner takes the session over in this turn of the loop."""
        self.renewal.begin(sent)
        self._learn_cas()
        self._begun.set()

    def _learn_cas(self) -> None:
        """Trust no CA any more that the agent, which was verified, says counts no more; keep what is known."""
        hello = self.session.peer_hello
        if hello is not None and hello.cluster_ca:
            with contextlib.suppress(ConfigError):
                self.cas = self.cas.from_pin(pin_of(hello.cluster_ca))
        self._keep_cas(self.cas)

    @property
    def detached(self) -> bool:
        """Whether the session waits for a connection."""
        return self.detachment.since is not None

    @property
    def detached_for(self) -> float:
        """Seconds for which the session has been detached; 0 while it is attached."""
        return self.detachment.lasted(self._loop.time())

    # -- reports of the owner, each with the seconds until a try that it calls for; None: it calls for none ------------

    def connection_lost(self, error: ArcbridgeError) -> float | None:
        """Note that the session's connection was lost."""
        if self.detached or self.session.closed:
            return None
        lasted = self._loop.time() - self._attached_at
        if not self._detach(error):
            return None
        return 0.0 if lasted >= STABLE_AFTER else self._backoff.next_delay(lasted=lasted)

    def move_requested(self) -> float | None:
        """Note that the agent has asked for another connection, because the present one will end."""
        self._label_to_leave = self.session.label
        if self.detached:
            return None  # it came over a connection that is being attached; `attached` counts it
        self._leaving, self._target = self.relay, None
        return random.random() * MOVE_SPREAD

    def nearer_found(self, relay: RelayAccess) -> float | None:
        """Note that a nearer relay is there; the session stays where it is if it cannot go there."""
        if self.detached or self._leaving is not None:
            return None
        self._log.info("session moves to a nearer relay", session=self.session.label, relay=str(relay.address))
        self._leaving, self._target = self.relay, relay
        return 0.0

    def suspect(self, reason: str, *, surely: bool = False) -> float | None:
        """Suspect the present connection: it is likely dead, or cannot work any more (`surely`), without an error."""
        session = self.session
        if session.closed or self._received_at_suspicion is not None:
            return None
        if self.detached:
            self.retry_now()
        elif session.resumption.possible and session.streams:
            self._log.info("connection suspect", session=session.label, reason=reason)
            self._received_at_suspicion = session.stats.bytes_received
            return 0.0
        elif surely or not session.streams:
            session.abort(ConnectionLost(reason))
        return None

    def ended(self, error: ArcbridgeError) -> None:
        """The session has ended."""
        self.stop()
        counters, waited = self._counters, self.detached_for
        counters.replayed_bytes += self.session.stats.replayed_bytes
        if not self.detached:
            return
        self.detachment.end()
        counters.detached_seconds.observe(waited)
        reason = _failure_reason(error, during_resume=self._resume_pending)
        counters.resume_failures[reason] += 1
        log_line = self._log.debug if reason == "closed" else self._log.warning  # this client ended it itself
        log_line(
            "session could not be resumed",
            session=self.session.label,
            reason=error.message,
            after=round(waited, 1),
            streams=self.detachment.streams,
        )

    # -- the owner's task ---------------------------------------------------------------------------------------------

    @property
    def trying(self) -> bool:
        """Whether the owner's task runs."""
        return self._task is not None and not self._task.done()

    def start(self, task: asyncio.Task[None]) -> None:
        """Watch over the owner's task, which makes the tries."""
        self._task = task
        task.add_done_callback(self._task_done)

    def stop(self) -> None:
        """Cancel the task; what it holds is closed in the loop's next turns."""
        if self._task is not None:
            self._task.cancel()

    def retry_now(self) -> None:
        """Make the next try now: a caller waits for the session."""
        self._retry_now.set()

    async def due(self, delay: float) -> bool:
        """Wait for `delay` seconds, or until `retry_now`; return whether the session needs another connection then."""
        await self._begun.wait()
        if not self._must_attach():
            return False
        self._retry_now.clear()
        if delay > 0:
            try:
                async with asyncio.timeout(delay):
                    await self._retry_now.wait()
            except TimeoutError:
                pass
        return self._must_attach()

    @property
    def only_new_streams_move(self) -> bool:
        """Whether it is to leave its connection, and has no stream for which that would be worth a resumption."""
        return not self.detached and self._leaving is not None and not self._worth_moving()

    def replaced(self, by_a_new_session: bool) -> None:
        """New streams go to another session now, or do so already. Streams opened meanwhile move with this one."""
        if self._worth_moving():
            return
        self._leaving = self._target = None
        if by_a_new_session and self.session.streams:
            self.session.goaway(GoawayCode.DONE, "the client moved to another connection")
        elif by_a_new_session:
            self.session.close(GoawayCode.DONE, "the client moved to another connection")

    async def attach(self) -> None:
        """Try once to attach the session to a new connection; raises ArcbridgeError with a message for the user."""
        session, hello = self.session, self.session.peer_hello
        # Before the join, because an agent that has joined does not wait for long.
        token = await self._tokens.cluster()
        try:
            instance = hello.agent if hello is not None else ""
            access = self._access
            if self._target is not None and not self.detached:
                access = access._replace(relays=self._relays.only(self._target))
            joined = await join(access, instance=instance, first_session=self._first_session, leaving=self._leaving)
        except Unreachable as error:
            self.detachment.outage |= self.detached and is_unanswered(error)
            raise
        try:
            self.cas = self.cas.follow(joined.cas, f"the CA of cluster {self._cluster!r}")
            joined = joined._replace(cas=self.cas)
            if session.closed:
                raise Unreachable(f'the session with cluster "{self._cluster}" ended')
        except BaseException:
            joined.close()
            raise
        renewal = self.renewal
        before = renewal.schedule, renewal.expires_in
        renewal.schedule, renewal.expires_in = NOT_SCHEDULED, 0.0
        self._resume_pending = True
        self._label_to_leave = ""
        try:
            await shake_hands(
                joined,
                self._cluster,
                lambda: session.migration.start(
                    lambda certificate: renewal.auth(token, certificate), label=joined.reply.join_id
                ),
                session.migration.wait,
            )
        except ArcbridgeError as error:
            error.session = joined.reply.join_id
            # Where the old connection still works, its token is renewed as before.
            renewal.schedule, renewal.expires_in = before
            if not isinstance(error, SessionEnded) or error.code == GoawayCode.CROSSED:
                self._relays.failed(joined.relay)
            shown = Shown(token.text, self._tokens.cluster_source)
            raise_user_error(error, self._cluster, shown=shown, session=joined.reply.join_id)
        finally:
            self._resume_pending = session.closed  # a session that ended here was refused by the agent
        self.relay = joined.relay
        self._relays.works(joined.relay)
        self._learn_cas()
        renewal.begin(token)

    def failed(self, error: ArcbridgeError) -> None:
        """Note a try that failed; where the new connection had replaced the old one and was lost, it is detached."""
        log_line = self._log.warning if isinstance(error.__cause__, DishonestPath) else self._log.debug
        log_line("not resumed yet", session=self.session.label, reason=error.message)
        if self._target is not None:
            self._relays.failed(self._target)
            self._target = self._leaving = None
        if not self.detached and self.session.state is State.DETACHED:
            self._detach(error)

    def next_delay(self, error: ArcbridgeError) -> float:
        """Return the seconds until the next try after one that failed; end the session where none may succeed."""
        now = self._loop.time()
        verdict = self.detachment.verdict(error, now)
        if verdict is not None:
            self._resume_pending = True  # as after GONE of the agent itself
            self.session.abort(verdict)
        lasted, self._attached_at = now - self._attached_at, now
        return self._backoff.next_delay(lasted=lasted, hint=_hint(error))

    def attached(self) -> None:
        """Note that another connection carries the session."""
        now = self._loop.time()
        fields = {"session": self.session.label, "relay": str(self.relay.address), "streams": len(self.session.streams)}
        if self.detached:
            waited = self.detachment.lasted(now)
            self._counters.resumed += 1
            self._counters.detached_seconds.observe(waited)
            self._log.info("session resumed", after=round(waited, 1), **fields)
        else:
            self._counters.moved += 1
            self._log.info("session moved to another connection", **fields)
        self.detachment.end()
        asked_again = self._label_to_leave and self._label_to_leave == self.session.label
        self._leaving, self._target = self.relay if asked_again else None, None
        self._received_at_suspicion = None
        self._attached_at = now

    # -- inside -------------------------------------------------------------------------------------------------------

    def _detach(self, error: ArcbridgeError) -> bool:
        """Begin to be detached; return False for a session without streams, which has ended."""
        streams = len(self.session.streams)
        if not streams:
            self.session.abort(error)
            return False
        self._relays.failed(self.relay)
        self.detachment.begin(streams, self._loop.time())
        self._log.warning(
            "connection lost, waiting to resume", session=self.session.label, reason=error.message, streams=streams
        )
        return True

    def _must_attach(self) -> bool:
        if self.session.closed:
            return False
        if self.detached or self._leaving is not None:
            return True
        before = self._received_at_suspicion
        if before is not None and self.session.stats.bytes_received > before:
            self._received_at_suspicion = before = None  # bytes have come since, so the connection is alive
        return before is not None

    def _worth_moving(self) -> bool:
        return self.session.resumption.possible and bool(self.session.streams)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._loop.call_exception_handler(
            {"message": f"keeping the session {self.session.label} failed", "exception": error, "task": task}
        )
        self.session.abort(ConnectionLost("an internal error; the log has its cause"))


def _hint(error: ArcbridgeError) -> float | None:
    """Return the seconds that the other end asked to wait. The retry times of our own errors are for kubectl and do not
    count."""
    cause = error.__cause__
    if isinstance(cause, TimeoutError):
        return None
    source = cause if isinstance(cause, SessionEnded | ConnectionLost) else error
    return None if source.retry_after is None else min(float(source.retry_after), RETRY_HINT_LIMIT)


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
