"""Keeps a session to one cluster up: the current one takes new streams, former ones live until their streams end.

`run` establishes sessions, one attempt at a time. A caller that needs a stream awaits `ready`: all callers share the
attempt under way and get its error when it fails. Each session has a `ResumableSession`, which resumes it alone;
meanwhile the session stays the current one, and `run` and the callers wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from arcbridge import __version__
from arcbridge.client.credentials.tokens import ClusterToken, Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.client.session.connection import Joined, join, shake_hands
from arcbridge.client.session.refusal import Shown, is_elsewhere, of_session, raise_user_error
from arcbridge.client.session.resumable_session import RETRY_HINT_LIMIT, ResumableSession, ResumableSessionStats
from arcbridge.client.session.revocation_hold import RevocationHold
from arcbridge.client.session.sleep_detector import CHECK_INTERVAL, SleepDetector
from arcbridge.client.session.trust import ClusterTrust
from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    PermissionRefused,
    RemoteProtocolError,
    SessionEnded,
    Unauthenticated,
    Unreachable,
)
from arcbridge.mux.connection import peer_certificate
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.backoff import Backoff
from arcbridge.pki.names import check_cluster_name
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import AuthOk, Goaway
from arcbridge.wire.session import Kind, Side

FAILURE_HOLD = 1.0
"""Seconds after a failed attempt during which callers get its error instead of another attempt."""
CLOSE_TIMEOUT = 2.0
"""Seconds that the end of a process may take so that the agents get its GOAWAY: some round trips of a bad line."""
DETACHED_WAIT = 5.0
"""Seconds after a loss for which a caller waits, as the open streams do, without being told of failed tries: most
resumptions take less."""
RENEWAL_RETRY = 15.0
"""Seconds between attempts_left to renew, while no newer token is there."""

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
        backoff: Backoff | None = None,
        sleep_detector: SleepDetector | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.relays = relays
        self.cluster = check_cluster_name(cluster)
        self._tokens = tokens
        self._trust = trust
        self._limits = DEFAULT if resumption else Limits(replay=0)
        self._backoff = backoff or Backoff()
        self._sleep_detector = sleep_detector or SleepDetector()
        self._clock = clock
        self._resumables: dict[MuxSession, ResumableSession] = {}
        """The sessions that have not ended: the current one, and those that drain."""
        self._current: ResumableSession | None = None
        self._waiting: set[asyncio.Future[MuxSession]] = set()
        self._waiting_before_auth: set[asyncio.Future[MuxSession]] = set()
        """Those of `_waiting` that take a session before its agent has accepted the token."""
        self._authenticating: MuxSession | None = None
        """The session whose token is on its way to an agent that has proved its identity."""
        self._closing = False
        self._ending: list[MuxSession] = []
        """Sessions that `close` has ended, whose connections may still send."""
        self._changed = asyncio.Event()
        self._stream_wanted = asyncio.Event()
        self._refused_with: ArcbridgeError | None = None
        self._revoked = RevocationHold()
        self._established_at = 0.0
        self.failure: ArcbridgeError | None = None
        """Why the last attempt failed; None while a session is up."""
        self._failed_at = float("-inf")
        self.subject = ""
        """The user name that the agent found in the token."""
        self.targets = ""
        """The targets that the user may open, as the agent's last AUTH_OK lists them; empty: it did not say."""
        self.attempts = 0
        self.established_count = 0
        self.failures = 0
        self.stats = ResumableSessionStats()
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
        session = self.current or (self._authenticating if before_auth else None)
        if session is not None:
            return session
        loop = asyncio.get_running_loop()
        if self.failure is not None and loop.time() - self._failed_at < FAILURE_HOLD:
            raise self.failure
        waiter: asyncio.Future[MuxSession] = loop.create_future()
        self._waiting.add(waiter)
        if before_auth:
            self._waiting_before_auth.add(waiter)
        self._stream_wanted.set()
        if self._current is not None:
            self._current.retry_now()
        try:
            return await waiter
        finally:
            self._waiting.discard(waiter)
            self._waiting_before_auth.discard(waiter)

    # -- for metrics and `status` -------------------------------------------------------------------------------------

    def sessions(self) -> list[MuxSession]:
        """Return the sessions that have not ended."""
        return list(self._resumables)

    @property
    def relay(self) -> RelayAccess | None:
        """The relay that new streams go through; None without a session."""
        return self._current.relay if self._current is not None else None

    def token_ends_at(self) -> float:
        """Return when the agent stops to accept the token that it was shown last, in unix seconds; 0: it does not
        say."""
        renewal = self._current.renewal if self._current is not None else None
        if renewal is None or not renewal.ends_at:
            return 0.0
        return self._clock() + renewal.ends_at - asyncio.get_running_loop().time()

    @property
    def detached_count(self) -> int:
        """Number of sessions that wait to be resumed."""
        return sum(resumable.detached for resumable in self._resumables.values())

    @property
    def replayed_bytes(self) -> int:
        """Bytes that were sent again after resumptions, of all sessions so far."""
        return self.stats.replayed_bytes + sum(session.stats.replayed_bytes for session in self._resumables)

    # -- the owner's loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a session up until cancelled, then close everything; failures of the network are logged, not raised."""
        watch = asyncio.get_running_loop().create_task(self._watch())
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
            watch.cancel()
            self._close()

    async def connect_once(self) -> None:
        """Establish the first session, before `run`; raises ArcbridgeError, so that a start fails at once."""
        try:
            await self._tokens.twice(self._establish)
        except ArcbridgeError as error:
            self._fail(error, reported=True)  # the caller reports it
            raise

    def close(self) -> None:
        """End every session, as `run` does when it is cancelled."""
        self._close()

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
        if self._current is not None:
            return
        self._take(await self._attempt())

    async def _keep_renewed(self) -> float:
        """Renew the session's token until the session ends or drains; returns how long it was usable, in seconds."""
        loop = asyncio.get_running_loop()
        while (resumable := self._current) is not None:
            self._changed.clear()
            renewal = resumable.renewal if not resumable.detached else None  # a resumption sends a new token
            wait = max(0.0, renewal.at - loop.time()) if renewal is not None and renewal.at else None
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                await self._renew(resumable)
        return loop.time() - self._established_at

    async def _wait_before_retry(self, lasted: float, hint: float | None) -> None:
        """Wait before the next attempt, until a caller asks for a stream."""
        if hint is not None:
            hint = min(float(hint), RETRY_HINT_LIMIT)
        delay = self._backoff.next_delay(lasted=lasted, hint=hint)
        if self._waiting and (self.failure is None or lasted >= FAILURE_HOLD):
            return  # a usable session has just ended: callers that wait already do not wait for the backoff too
        self._stream_wanted.clear()
        try:
            # A client that was revoked comes back when a caller asks, and not by itself.
            async with asyncio.timeout(None if self._revoked.error is not None else delay):
                await self._stream_wanted.wait()
        except TimeoutError:
            pass

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL)
            self.check_connections()

    def check_connections(self) -> None:
        """Resume sessions at once whose connections this machine's sleep, or change of network, has cut silently."""
        slept = self._sleep_detector.slept()
        for resumable in list(self._resumables.values()):
            if slept:
                resumable.suspect(f"this machine slept for {slept:.0f} s")
            elif gone := self._sleep_detector.lost_address(resumable.session.transport):
                resumable.suspect(f"this machine no longer has the address {gone}", surely=True)

    def _fail(self, error: ArcbridgeError, *, reported: bool = False) -> None:
        quiet = reported or (self.failure is not None and self.failure.message == error.message)
        self.failures += 1
        # A failure that repeats is a warning once, and at debug from then on.
        (self._log.debug if quiet else self._log.warning)("no session", reason=error.message)
        self._fail_waiters(error)

    def _fail_waiters(self, error: ArcbridgeError) -> None:
        """Give the error to the callers that wait, and to those that ask within FAILURE_HOLD."""
        self.failure = error
        self._failed_at = asyncio.get_running_loop().time()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # retrieved: a caller that was cancelled in this turn will not await it

    def _complete_waiters(self, session: MuxSession) -> None:
        self.failure = None
        self._refused_with = None
        self._revoked.end()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(session)

    def _close(self) -> None:
        self._closing = True
        for session, resumable in list(self._resumables.items()):
            resumable.stop()
            session.close(GoawayCode.DONE, "the client ended")
            self._ending.append(session)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(Unreachable("arcbridge is ending"))
                waiter.exception()  # retrieved, as in _fail_waiters

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _take(self, resumable: ResumableSession) -> None:
        """Make a fresh session the current one."""
        self._current = resumable
        self._established_at = asyncio.get_running_loop().time()
        self.established_count += 1
        self._log.info(
            "session established",
            session=resumable.session.label,
            subject=self.subject,
            relay=str(resumable.relay.address),
        )
        self._complete_waiters(resumable.session)

    async def _attempt(self, leaving: RelayAccess | None = None) -> ResumableSession:
        """Join, check the CA, connect; raises ArcbridgeError with a message for the user."""
        refusal = self._revoked.refusal(self._tokens.cluster_at_hand(), asyncio.get_running_loop().time())
        if refusal is not None:
            raise refusal
        self.attempts += 1
        attempts_left = len(self.relays)
        while True:
            try:
                joined = await join(self.relays, self.cluster, self._tokens, leaving=leaving)
            except PermissionRefused as error:
                if self._revoked.error is not None:
                    raise self._revoked.error from error  # the agent has said why, and the relay's refusal says nothing
                raise
            if not await self._is_trusted(joined):
                continue
            try:
                resumable = await self._connect(joined)
                if resumable.session.closed:  # it ended between AUTH_OK and here
                    raise await resumable.session.wait_ended()
                return resumable
            except ArcbridgeError as error:
                if not isinstance(error, SessionEnded) or error.code == GoawayCode.CROSSED:
                    self.relays.failed(joined.relay)
                attempts_left -= 1
                if attempts_left <= 0 or not isinstance(error, ConnectionLost):
                    shown = Shown(self._tokens.cluster_at_hand(), self._tokens.cluster_source)
                    raise_user_error(error, self.cluster, shown=shown, session=joined.reply.join_id)
                # The join succeeded and the connection died afterwards: another relay may work at once.

    async def _is_trusted(self, joined: Joined) -> bool:
        """Return whether to go on with this join; False when it was given up to ask the user, who has accepted the
        CA."""
        ca = joined.reply.cluster_ca
        try:
            if self._trust.check(self.cluster, ca):
                return True
            if not self._trust.asks:
                await self._trust.first_time(self.cluster, ca)
                return True
        except BaseException:
            joined.sock.close()
            raise
        # The user takes longer to answer than the agent waits: this join is given up, the next one succeeds.
        joined.sock.close()
        await self._trust.first_time(self.cluster, ca)
        return False

    async def _connect(self, joined: Joined) -> ResumableSession:
        """Establish a session over a joined socket whose cluster CA is trusted; owns the socket from here on."""
        session: MuxSession | None = None
        token: ClusterToken | None = None

        async def established() -> None:
            assert session is not None
            self._authenticating = session
            for waiter in self._waiting_before_auth:
                if not waiter.done():
                    waiter.set_result(session)
            await session.wait_established()

        try:
            token = await self._tokens.cluster()
            session = MuxSession(
                Side.INITIATOR,
                Kind.SESSION,
                self,
                limits=self._limits,
                label=joined.reply.join_id,
                software=f"arcbridge {__version__}",
            )
            resumable = self._resumables[session] = self._make_resumable(session, joined)
            sent = token
            await shake_hands(
                joined,
                self.cluster,
                lambda: session.protocol(lambda certificate: resumable.auth(sent, certificate)),
                established,
            )
        except BaseException as error:
            if isinstance(error, SessionEnded | ConnectionLost | Unreachable | RemoteProtocolError):
                error.session = joined.reply.join_id  # an error of this machine has nothing to do with the session
            self._note_revoked(error, token)
            if session is not None:
                session.abort()
                self._resumables.pop(session, None)
            joined.sock.close()
            raise
        finally:
            self._authenticating = None
        resumable.schedule_renewal(token)
        return resumable

    def _make_resumable(self, session: MuxSession, joined: Joined) -> ResumableSession:
        return ResumableSession(
            session,
            self.cluster,
            self.relays,
            self._tokens,
            joined,
            stats=self.stats,
            clock=self._clock,
            on_attached=self._on_attached,
            on_failed=self._on_resume_failed,
            replace=self._replace,
        )

    # -- callbacks of `ResumableSession` ------------------------------------------------------------------------------

    def _on_attached(self, resumable: ResumableSession) -> None:
        if resumable is self._current:
            self._complete_waiters(resumable.session)
            self._changed.set()

    def _on_resume_failed(self, resumable: ResumableSession, error: ArcbridgeError) -> None:
        self.attempts += 1
        self.failures += 1
        if resumable is not self._current:
            return
        if is_elsewhere(error):
            # Another agent of the cluster is connected: it gets new streams, while the open ones wait for their agent.
            self._current = None
            self._changed.set()
        elif resumable.detached_for >= DETACHED_WAIT or not isinstance(error, Unreachable):
            self._fail_waiters(error)

    async def _replace(self, resumable: ResumableSession) -> bool:
        if resumable is not self._current:
            return False
        fresh = await self._attempt(leaving=resumable.relay)
        if self._closing or resumable is not self._current:
            fresh.session.close(GoawayCode.DONE, "another session was made meanwhile")
            return False
        self._take(fresh)
        self._changed.set()
        return True

    # -- renewal ------------------------------------------------------------------------------------------------------

    async def _renew(self, resumable: ResumableSession) -> None:
        """Send a newer token in the session; where there is none, schedule another try."""
        session, renewal = resumable.session, resumable.renewal
        if renewal is None:
            return
        loop = asyncio.get_running_loop()
        try:
            token = await self._tokens.cluster()
            if resumable.renewal is not renewal:
                return  # a resumption has sent a token meanwhile
            newer = token.text != renewal.sent.text and session.usable
            # The proof may fail as the token may: the file of its key can be damaged, or gone.
            auth = resumable.auth(token, peer_certificate(session.transport)) if newer else None
        except ArcbridgeError as error:
            self._log.warning("the login cannot be renewed", session=session.label, reason=error.message)
        else:
            if auth is not None:
                session.authenticate(auth)
                resumable.expires_in = 0.0
                resumable.schedule_renewal(token)
                self._log.debug("token renewed", session=session.label)
                return
            if renewal.ends_at and renewal.ends_at - loop.time() < 60:
                self._log.warning("the login ends soon and there is no newer token", session=session.label)
        renewal.again(loop.time(), RENEWAL_RETRY)

    # -- callbacks of `MuxSession` ------------------------------------------------------------------------------------

    def auth_accepted(self, session: MuxSession, ok: AuthOk) -> None:
        self.subject = ok.subject
        self.targets = ok.targets
        resumable = self._resumables.get(session)
        if resumable is not None:
            resumable.accepted(float(ok.expires_in))
            self._changed.set()

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        """The agent accepts no new stream: open ones go on, the next one needs another session."""
        current = self._current
        resumable = self._resumables.get(session)
        if resumable is not None and goaway.code == GoawayCode.DRAINING:
            resumable.agent_stops = True
        if current is not None and session is current.session:
            self._current = None
            if not self._login_refused(SessionEnded(goaway.code, goaway.message), current):
                self._log.info(
                    "the agent drains the session", session=session.label, code=goaway.code, reason=goaway.message
                )
            self._changed.set()

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        """End the session: no agent opens streams, and each would take a window of memory (docs/threats.md#D3)."""
        session.abort(RemoteProtocolError("the other end broke the protocol: it opened a stream, which no agent does"))

    def detached(self, session: MuxSession, error: ArcbridgeError) -> None:
        resumable = self._resumables.get(session)
        if resumable is None or self._closing:
            session.abort(error)
        else:
            resumable.connection_lost(error)
            self._changed.set()

    def move_requested(self, session: MuxSession) -> None:
        resumable = self._resumables.get(session)
        if resumable is not None and not self._closing:
            resumable.move()

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        resumable = self._resumables.pop(session, None)
        if resumable is None:
            return
        was_detached = resumable.detached
        resumable.ended(error)
        if isinstance(error, ConnectionLost):
            self.relays.failed(resumable.relay)
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
        shown = Shown(self._tokens.cluster_at_hand(), self._tokens.cluster_source)
        self._refused_with = of_session(error, self.cluster, shown)
        self._refused_with.session = resumable.session.label
        self._note_revoked(error, resumable.renewal.sent if resumable.renewal is not None else None)
        if not isinstance(self._refused_with, Unauthenticated | PermissionRefused):
            return False
        self._fail(self._refused_with)
        self._tokens.refused()
        return True

    def _note_revoked(self, error: BaseException, sent: ClusterToken | None) -> None:
        """Hold back from further attempts where the agent has revoked the token that the session sent last."""
        if isinstance(error, SessionEnded) and error.code == GoawayCode.REVOKED:
            token = sent.text if sent is not None else ""
            self._tokens.refused()
            self._revoked.begin(of_session(error, self.cluster), token, asyncio.get_running_loop().time())
