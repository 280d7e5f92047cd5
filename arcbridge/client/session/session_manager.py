"""Keeps a session to one cluster up: the current one takes new streams, former ones live until their streams end.

`run` establishes sessions, one attempt at a time, by a `Connector`. A caller that needs a stream awaits `ready`: all
callers share the attempt under way and get its error when it fails (`Waiters`). Each session has a `ResumableSession`;
while that is detached the session stays the current one, and `run` and the callers wait. The parts know nothing of the
manager, but for the events that each session gives it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import structlog

from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.client.session.connection import ClusterAccess
from arcbridge.client.session.connector import Connector
from arcbridge.client.session.nearest_relay import FIRST_LOOK, LOOK
from arcbridge.client.session.refusal import is_elsewhere, of_session
from arcbridge.client.session.resumable_session import RETRY_HINT_LIMIT, ResumableSession
from arcbridge.client.session.sleep_detector import CHECK_INTERVAL, SleepDetector
from arcbridge.client.session.trust import ClusterTrust
from arcbridge.client.session.waiters import FAILURE_HOLD
from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    PermissionRefused,
    RemoteProtocolError,
    Unauthenticated,
    Unreachable,
)
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.backoff import Backoff
from arcbridge.pki.names import check_cluster_name
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.lifecycle import ended_by
from arcbridge.wire.records import UNRESTRICTED, AuthOk, Goaway, Restrictions
from arcbridge.wire.session import State

TARGET = "kubernetes"
"""What a stream to the cluster's API server is opened to."""
CLOSE_TIMEOUT = 2.0
"""Seconds that the end of a process may take so that the agents get its GOAWAY: some round trips of a bad line."""
DETACHED_WAIT = 5.0
"""Seconds after a loss for which a caller waits, as the open streams do, without the errors of failed tries: most
resumptions take less."""

log = structlog.get_logger("arcbridge.client")


class SessionManager(BaseHandler):
    """Keeps one session to `cluster`; counters are read by metrics and `status`."""

    def __init__(
        self,
        relays: Relays,
        cluster: str,
        tokens: Tokens,
        trust: ClusterTrust,
        *,
        resumption: bool = True,
        restrictions: Restrictions = UNRESTRICTED,
        backoff: Backoff | None = None,
        sleep_detector: SleepDetector | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.cluster = check_cluster_name(cluster)
        self.connector = Connector(
            ClusterAccess(relays, self.cluster, tokens, restrictions), trust, resumption=resumption, clock=clock
        )
        self.restrictions = restrictions
        self.counters = self.connector.counters
        self._sessions = self.connector.sessions
        """The sessions that have not ended: the current one, and those that drain."""
        self._waiters = self.connector.waiters
        self._tokens = tokens
        self._backoff = backoff or Backoff()
        self._sleep_detector = sleep_detector or SleepDetector()
        self._clock = clock
        self._current: ResumableSession | None = None
        self._closing = False
        self._ending: list[MuxSession] = []
        """Sessions that `close` has ended, whose connections may still send."""
        self._changed = asyncio.Event()
        self._stream_wanted = asyncio.Event()
        self._refused_with: ArcbridgeError | None = None
        self._established_at = 0.0
        self.subject = ""
        """The user name that the agent found in the token."""
        self.targets = ""
        """The targets that the user may open, as the agent's last AUTH_OK lists them; empty: it did not say."""
        self._log = log.bind(cluster=cluster)

    # -- for callers that open streams --------------------------------------------------------------------------------

    @property
    def current(self) -> MuxSession | None:
        """The session for new streams, or None."""
        resumable = self._current
        return resumable.session if resumable is not None and resumable.session.usable else None

    async def ready(self, *, before_auth: bool = False) -> MuxSession:
        """Wait for a session and return it; raises the error of the attempt. Cancelling affects this caller alone.

        `before_auth`: return it as soon as the agent has proved its identity and the token is on its way. A stream that
        is opened then travels behind the token, which saves a round trip, and ends with the session when the agent
        refuses the token.
        """
        session = self.current or (self._waiters.authenticating if before_auth else None)
        if session is not None:
            return session
        if self._closing:
            raise Unreachable("arcbridge is ending")
        error = self._waiters.recent_failure(asyncio.get_running_loop().time())
        if error is not None:
            raise error.copy()
        self._stream_wanted.set()
        if self._current is not None:
            self._current.retry_now()
        return await self._waiters.wait(before_auth=before_auth)

    # -- for metrics and `status` -------------------------------------------------------------------------------------

    @property
    def failure(self) -> ArcbridgeError | None:
        """Why the last attempt failed; None while a session is up."""
        return self._waiters.failure

    def sessions(self) -> list[MuxSession]:
        """Return the sessions that have not ended."""
        return list(self._sessions)

    @property
    def relay(self) -> RelayAccess | None:
        """The relay that new streams go through; None without a session."""
        return self._current.relay if self._current is not None else None

    def token_ends_at(self) -> float:
        """Return when the agent stops to accept the token that it was shown last, in unix seconds; 0: it does not
        say."""
        ends_at = self._current.renewal.schedule.ends_at if self._current is not None else 0.0
        return self._clock() + ends_at - asyncio.get_running_loop().time() if ends_at else 0.0

    @property
    def detached_count(self) -> int:
        """Number of sessions that wait to be resumed."""
        return sum(resumable.detached for resumable in self._sessions.values())

    @property
    def replayed_bytes(self) -> int:
        """Bytes that were sent again after resumptions, of all sessions so far."""
        return self.counters.replayed_bytes + sum(session.stats.replayed_bytes for session in self._sessions)

    # -- the owner's loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a session up until cancelled, then close everything; failures of the network are logged, not raised."""
        loop = asyncio.get_running_loop()
        beside = [loop.create_task(self._watch()), loop.create_task(self._stay_near())]
        try:
            while True:
                lasted = 0.0
                hint = None
                try:
                    await self._establish()
                    lasted = await self._keep_renewed()
                    hint = self._refused_with.retry_after if self._refused_with is not None else None
                except ArcbridgeError as error:
                    self._fail(error)
                    hint = error.retry_after
                    if isinstance(error, Unauthenticated) and self._tokens.were_shown:
                        self._tokens.refused()
                await self._wait_before_retry(lasted, hint)
        finally:
            for task in beside:
                task.cancel()
            self.close()

    async def connect_once(self) -> None:
        """Establish the first session, before `run`; raises ArcbridgeError, so that a start fails at once."""
        try:
            await self._tokens.retry_once(self._establish)
        except ArcbridgeError as error:
            self._fail(error, reported=True)  # the caller reports it
            raise

    def close(self) -> None:
        """End every session, as `run` does when it is cancelled."""
        self._closing = True
        for session, resumable in list(self._sessions.items()):
            resumable.stop()
            session.close(GoawayCode.DONE, "the client ended")
            self._ending.append(session)
        self._waiters.close(Unreachable("arcbridge is ending"))

    async def wait_closed(self) -> None:
        """Wait after `close` until the connections have ended in order, at most CLOSE_TIMEOUT seconds.

        If the process ended before, the kernel would close its sockets, by RST where unread bytes have come, and the
        RST overtakes our GOAWAY. The agent would take the session for detached and keep it, with all its streams.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CLOSE_TIMEOUT
        while loop.time() < deadline and any(session.transport is not None for session in self._ending):
            await asyncio.sleep(0.01)

    async def _establish(self) -> None:
        if self._current is None:
            self._take(await self.connector.connect(self))

    async def _keep_renewed(self) -> float:
        """Renew the session's token until the session ends or drains; returns how long it was usable, in seconds."""
        loop = asyncio.get_running_loop()
        while (resumable := self._current) is not None:
            self._changed.clear()
            due_at = 0.0 if resumable.detached else resumable.renewal.schedule.at  # a resumption sends a new token
            wait = max(0.0, due_at - loop.time()) if due_at else None
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                await resumable.renewal.renew(resumable.session)
        return loop.time() - self._established_at

    async def _wait_before_retry(self, lasted: float, hint: float | None) -> None:
        """Wait before the next attempt, until a caller asks for a stream."""
        if hint is not None:
            hint = min(float(hint), RETRY_HINT_LIMIT)
        delay = self._backoff.next_delay(lasted=lasted, hint=hint)
        if self._waiters and (self.failure is None or lasted >= FAILURE_HOLD):
            return  # a usable session has just ended: callers that wait already do not wait for the backoff too
        self._stream_wanted.clear()
        try:
            # A client that was revoked comes back when a caller asks, and not by itself.
            async with asyncio.timeout(None if self.connector.revoked.error is not None else delay):
                await self._stream_wanted.wait()
        except TimeoutError:
            pass

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL)
            self.check_connections()

    async def _stay_near(self) -> None:
        """Move the current session to a nearer relay, where there is one by now."""
        wait = FIRST_LOOK
        while self.connector.nearest.asks:
            await asyncio.sleep(wait * random.uniform(0.75, 1.25))
            wait = LOOK
            if (current := self._current) is None or current.detached:
                continue
            try:
                relay = await self.connector.nearest.look(current.relay, current.session.round_trip)
            except ArcbridgeError as error:
                self._log.debug("relays not asked", reason=error.message)  # there is no token now
                continue
            if relay is not None and current is self._current and not self._closing:
                self._resume(current, current.nearer_found(relay), hurry=False)

    def check_connections(self) -> None:
        """Resume sessions at once whose connections this machine's sleep, or change of network, has cut silently."""
        slept = self._sleep_detector.slept()
        for resumable in list(self._sessions.values()):
            if slept:
                self._resume(resumable, resumable.suspect(f"this machine slept for {slept:.0f} s"))
            elif gone := self._sleep_detector.lost_address(resumable.session.transport):
                reason = f"this machine no longer has the address {gone}"
                self._resume(resumable, resumable.suspect(reason, surely=True))

    def _fail(self, error: ArcbridgeError, *, reported: bool = False) -> None:
        quiet = reported or (self.failure is not None and self.failure.message == error.message)
        self.counters.failures += 1
        # A failure that repeats is a warning once, and at debug from then on.
        (self._log.debug if quiet else self._log.warning)("no session", reason=error.message)
        self._waiters.fail(error, asyncio.get_running_loop().time())

    def _complete(self, session: MuxSession) -> None:
        """Give the current session, which has a connection, to the callers that wait."""
        self._refused_with = None
        self.connector.revoked.end()
        self._waiters.complete(session)

    def _take(self, resumable: ResumableSession) -> None:
        """Make a fresh session the current one; where it is detached already, callers get it once it is resumed."""
        self._current = resumable
        self._established_at = asyncio.get_running_loop().time()
        self.counters.established += 1
        self._log.info(
            "session established",
            session=resumable.session.label,
            subject=self.subject,
            relay=str(resumable.relay.address),
        )
        if not resumable.detached:
            self._complete(resumable.session)

    # -- resumption ---------------------------------------------------------------------------------------------------

    def _resume(self, resumable: ResumableSession, delay: float | None, *, hurry: bool = True) -> None:
        """Begin to make tries after `delay` seconds (None: no try is called for); one task of a session makes them.

        `hurry`: a task that runs already makes its next try now.
        """
        if delay is None:
            return
        if not resumable.trying:
            resumable.start(asyncio.get_running_loop().create_task(self._try_until_attached(resumable, delay)))
        elif hurry:
            resumable.retry_now()

    async def _try_until_attached(self, resumable: ResumableSession, delay: float) -> None:
        session = resumable.session
        while await resumable.due(delay):
            try:
                if resumable.only_new_streams_move:
                    resumable.replaced(await self._replace(resumable))
                    delay = 0.0
                    continue
                await resumable.attach()
            except ArcbridgeError as error:
                if session.closed:
                    return  # `session_ended` is called with the reason
                if isinstance(error, Unauthenticated):
                    self._tokens.refused()
                delay = self._resume_failed(resumable, error)
            else:
                if session.state is State.DETACHED:
                    # The new connection was lost before this task had its turn.
                    lost = Unreachable(f'the connection to cluster "{self.cluster}" was lost')
                    delay = self._resume_failed(resumable, lost)
                elif not session.closed:
                    resumable.attached()
                    if resumable is self._current:
                        self._complete(session)
                        self._changed.set()

    def _resume_failed(self, resumable: ResumableSession, error: ArcbridgeError) -> float:
        """Note a failed try; return the seconds until the next one."""
        resumable.failed(error)
        if resumable.detached:
            self.counters.attempts += 1
            self.counters.failures += 1
            if resumable is not self._current:
                pass
            elif is_elsewhere(error):
                # Another agent of the cluster is connected: it gets new streams, while the open ones wait for theirs.
                self._current = None
                self._changed.set()
            elif resumable.detached_for >= DETACHED_WAIT or not isinstance(error, Unreachable):
                self._waiters.fail(error, asyncio.get_running_loop().time())
        return resumable.next_delay(error)

    async def _replace(self, resumable: ResumableSession) -> bool:
        """Make a fresh session the current one in place of this one; return False where this one is not current."""
        if resumable is not self._current:
            return False
        fresh = await self.connector.connect(self, leaving=resumable.relay)
        if self._closing or resumable is not self._current:
            fresh.session.close(GoawayCode.DONE, "another session was made meanwhile")
            return False
        self._take(fresh)
        self._changed.set()
        return True

    # -- callbacks of `MuxSession` ------------------------------------------------------------------------------------

    def auth_accepted(self, session: MuxSession, ok: AuthOk) -> None:
        self.subject = ok.subject
        self.targets = ok.targets
        resumable = self._sessions.get(session)
        if resumable is not None:
            resumable.renewal.accepted(float(ok.expires_in))
            self._changed.set()

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        """The agent accepts no new stream: open ones go on, the next one needs another session."""
        current = self._current
        resumable = self._sessions.get(session)
        if resumable is not None and goaway.code == GoawayCode.DRAINING:
            resumable.detachment.agent_stops = True
        if current is not None and session is current.session:
            self._current = None
            if not self._login_refused(ended_by(goaway), current):
                self._log.info(
                    "the agent drains the session", session=session.label, code=goaway.code, reason=goaway.message
                )
            self._changed.set()

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        """End the session: no agent opens streams, and each would take a window of memory (docs/threats.md#D3)."""
        session.abort(RemoteProtocolError("the other end broke the protocol: it opened a stream, which no agent does"))

    def detached(self, session: MuxSession, error: ArcbridgeError) -> None:
        resumable = self._sessions.get(session)
        if resumable is None or self._closing:
            session.abort(error)
        else:
            self._resume(resumable, resumable.connection_lost(error))
            self._changed.set()

    def move_requested(self, session: MuxSession) -> None:
        resumable = self._sessions.get(session)
        if resumable is not None and not self._closing:
            self._resume(resumable, resumable.move_requested(), hurry=False)

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        resumable = self._sessions.pop(session, None)
        if resumable is None:
            return
        was_detached = resumable.detached
        resumable.ended(error)
        if isinstance(error, ConnectionLost):
            self.connector.relays.failed(resumable.relay)
        if resumable is not self._current:
            return
        self._current = None
        if self._closing:
            return
        if not self._login_refused(error, resumable) and not was_detached:
            self._log.warning("session lost", session=session.label, reason=error.message)
        self._changed.set()

    def _login_refused(self, error: ArcbridgeError, resumable: ResumableSession) -> bool:
        """Return whether the token or the user's rights ended the session; if so, log that, and get a new token next
        time."""
        self._refused_with = of_session(error, self.cluster, self.connector.shown)
        self._refused_with.session = resumable.session.label
        self.connector.note_revoked(error, resumable.renewal.schedule.sent)
        if not isinstance(self._refused_with, Unauthenticated | PermissionRefused):
            return False
        self._fail(self._refused_with)
        self._tokens.refused()
        return True
