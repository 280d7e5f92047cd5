"""The way to one cluster, kept up: a session for new streams, and whatever streams still run in former ones.

`run` owns the work for new streams, one attempt at a time. Whoever needs a stream asks `ready`: all share that
attempt, and all get its error when it fails. Each session has a `ResumableSession` of its own, which resumes it
while `run` and whoever waits stand by: a session that is detached is still the one for new streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from arcbridge import __version__
from arcbridge.client.connection import Joined, join, shake_hands
from arcbridge.client.refusal import is_elsewhere, of_session, raise_user_error
from arcbridge.client.relay_access import RelayAccess
from arcbridge.client.relays import Relays
from arcbridge.client.resumable_session import HINT_MOST, ResumableSession, ResumableSessionStats
from arcbridge.client.sleep_detector import LOOK_EVERY, SleepDetector
from arcbridge.client.tokens import Tokens
from arcbridge.client.trust import ClusterTrust
from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    PermissionRefused,
    SessionEnded,
    Unauthenticated,
    Unreachable,
)
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.backoff import Backoff
from arcbridge.pki.names import check_cluster_name
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk, Goaway
from arcbridge.wire.session import Kind, Side

QUIET = 1.0
"""Seconds after a failed attempt in which others get its error instead of an attempt of their own."""
FAREWELL = 2.0
"""Seconds that the end of a process may take so that the agents hear of it: some round trips of a bad line."""
PATIENCE = 5.0
"""Seconds after a loss in which whoever asks for a stream waits with those that run: most resumptions take less, and a
failure in between is no answer."""
RENEW_AGAIN = 15.0
"""Seconds between tries to renew, while no newer token is there."""

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
        whereabouts: SleepDetector | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.relays = relays
        self.cluster = check_cluster_name(cluster)
        self._tokens = tokens
        self._trust = trust
        self._limits = DEFAULT if resumption else Limits(replay=0)
        self._backoff = backoff or Backoff()
        self._whereabouts = whereabouts or SleepDetector()
        self._wall = wall
        self._lives: dict[MuxSession, ResumableSession] = {}
        """Every session that is not over: the current one, and those that drain."""
        self._current: ResumableSession | None = None
        self._waiting: set[asyncio.Future[MuxSession]] = set()
        self._hasty: set[asyncio.Future[MuxSession]] = set()
        """Those of `_waiting` that take a session before its agent has said yes."""
        self._asking: MuxSession | None = None
        """A session whose token is on its way to an agent that has shown who it is."""
        self._closing = False
        self._parting: list[MuxSession] = []
        """What `close` has ended."""
        self._changed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._refused_with: ArcbridgeError | None = None
        self._established_at = 0.0
        self.failure: ArcbridgeError | None = None
        """Why the last attempt failed; None while a session is up."""
        self._failed_at = float("-inf")
        self.subject = ""
        """Who we are in the cluster, as the agent said."""
        self.attempts = 0
        self.established_count = 0
        self.failures = 0
        self.stats = ResumableSessionStats()
        self._log = log.bind(cluster=cluster)

    # -- for those who need streams -----------------------------------------------------------------------------------

    @property
    def current(self) -> MuxSession | None:
        """The session for new streams, or None."""
        life = self._current
        return life.session if life is not None and life.session.usable else None

    async def ready(self, *, before_auth: bool = False) -> MuxSession:
        """The session, when one is up; raises why there is none. Cancelling disturbs nobody.

        `before_auth`: as soon as the agent has shown who it is and our token is on its way to it. What is opened then
        travels behind the token, which saves a round trip, and ends with the session when the agent refuses.
        """
        session = self.current or (self._asking if before_auth else None)
        if session is not None:
            return session
        loop = asyncio.get_running_loop()
        if self.failure is not None and loop.time() - self._failed_at < QUIET:
            raise self.failure
        waiter: asyncio.Future[MuxSession] = loop.create_future()
        self._waiting.add(waiter)
        if before_auth:
            self._hasty.add(waiter)
        self._wanted.set()
        if self._current is not None:
            self._current.wanted()
        try:
            return await waiter
        finally:
            self._waiting.discard(waiter)
            self._hasty.discard(waiter)

    # -- for those who look -------------------------------------------------------------------------------------------

    def sessions(self) -> list[MuxSession]:
        """All that are not over."""
        return list(self._lives)

    @property
    def relay(self) -> RelayAccess | None:
        """The relay that new streams go through, while there is a session."""
        return self._current.relay if self._current is not None else None

    @property
    def detached_count(self) -> int:
        """Sessions that wait to be resumed."""
        return sum(life.detached for life in self._lives.values())

    @property
    def replayed_bytes(self) -> int:
        """Bytes that were sent again after a resumption."""
        return self.stats.replayed_bytes + sum(session.stats.replayed_bytes for session in self._lives)

    # -- the owner's loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a session up until cancelled; then everything is closed. Raises nothing of the network's."""
        watch = asyncio.get_running_loop().create_task(self._watch())
        try:
            while True:
                lasted = 0.0
                hint = None
                try:
                    await self._establish()
                    lasted = await self._stay()
                    hint = self._refused_with.retry_after if self._refused_with is not None else None
                except ArcbridgeError as error:
                    self._fail(error)
                    hint = error.retry_after
                    if isinstance(error, Unauthenticated):
                        self._tokens.refused()
                await self._pause(lasted, hint)
        finally:
            watch.cancel()
            self._close()

    async def first(self) -> None:
        """One attempt, before `run`: raises what is wrong, so that a start fails at once and clearly."""
        try:
            await self._establish()
        except ArcbridgeError as error:
            self._fail(error, told=True)  # by whoever started us
            raise

    def close(self) -> None:
        """End the session and what is left of former ones; what `run` does at its end."""
        self._close()

    async def gone(self) -> None:
        """After `close`: until the connections have ended in order, at most FAREWELL seconds.

        When a process ends before, the kernel closes its sockets: by RST if anything unread has come, and the RST
        overtakes our GOAWAY. The agent then believes in an accident and keeps the session, with all that runs in it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FAREWELL
        while loop.time() < deadline and any(session.transport is not None for session in self._parting):
            await asyncio.sleep(0.01)

    async def _establish(self) -> None:
        if self._current is not None:
            return
        self._take(await self._attempt())

    async def _stay(self) -> float:
        """Until the session is over or drains, renewing its token; how long it was good, in seconds."""
        loop = asyncio.get_running_loop()
        while (life := self._current) is not None:
            self._changed.clear()
            renewal = life.renewal if not life.detached else None  # a resumption brings a new token itself
            wait = max(0.0, renewal.at - loop.time()) if renewal is not None and renewal.at else None
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                await self._renew(life)
        return loop.time() - self._established_at

    async def _pause(self, lasted: float, hint: float | None) -> None:
        """Wait before the next attempt, unless somebody wants a stream now."""
        if hint is not None:
            hint = min(float(hint), HINT_MOST)
        delay = self._backoff.next_delay(lasted=lasted, hint=hint)
        if self._waiting and (self.failure is None or lasted >= QUIET):
            return  # a good session ended: what waits already shall not wait for the backoff
        self._wanted.clear()
        try:
            async with asyncio.timeout(delay):
                await self._wanted.wait()
        except TimeoutError:
            pass

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            self.look_around()

    def look_around(self) -> None:
        """Resume at once what a sleep of this machine, or its change of network, has cut without a word."""
        slept = self._whereabouts.slept()
        for life in list(self._lives.values()):
            if slept:
                life.suspect(f"this machine slept for {slept:.0f} s")
            elif gone := self._whereabouts.lost_address(life.session.transport):
                life.suspect(f"this machine no longer has the address {gone}", surely=True)

    def _fail(self, error: ArcbridgeError, *, told: bool = False) -> None:
        again = told or (self.failure is not None and self.failure.message == error.message)
        self.failures += 1
        # The same failure over and over is told once, then only to those who debug.
        (self._log.debug if again else self._log.warning)("no session", reason=error.message)
        self._disappoint(error)

    def _disappoint(self, error: ArcbridgeError) -> None:
        """Whoever waits, and whoever asks soon, gets this."""
        self.failure = error
        self._failed_at = asyncio.get_running_loop().time()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # a waiter that was cancelled at the same moment need not know

    def _satisfy(self, session: MuxSession) -> None:
        self.failure = None
        self._refused_with = None
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(session)

    def _close(self) -> None:
        self._closing = True
        for session, life in list(self._lives.items()):
            life.stop()
            session.close(GoawayCode.DONE, "the client ended")
            self._parting.append(session)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(Unreachable("arcbridge is ending"))
                waiter.exception()  # as in _disappoint

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _take(self, life: ResumableSession) -> None:
        """A fresh session becomes the one for new streams."""
        self._current = life
        self._established_at = asyncio.get_running_loop().time()
        self.established_count += 1
        self._log.info(
            "session established", session=life.session.label, subject=self.subject, relay=str(life.relay.address)
        )
        self._satisfy(life.session)

    async def _attempt(self, leaving: RelayAccess | None = None) -> ResumableSession:
        """Join, check the CA, connect; raises ArcbridgeError in the person's words."""
        self.attempts += 1
        tries = len(self.relays)
        while True:
            joined = await join(self.relays, self.cluster, self._tokens, leaving=leaving)
            if not await self._trusts(joined):
                continue
            try:
                life = await self._connect(joined)
                if life.session.closed:  # between AUTH_OK and here
                    raise await life.session.wait_ended()
                return life
            except ArcbridgeError as error:
                if not isinstance(error, SessionEnded):
                    self.relays.failed(joined.relay)
                tries -= 1
                if tries <= 0 or not isinstance(error, ConnectionLost):
                    raise_user_error(error, self.cluster)
                # It joined, and then it died: another relay may work at once.

    async def _trusts(self, joined: Joined) -> bool:
        """Whether the join may go on; False when it was given up while a person was asked, who said yes."""
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
        # Asking a person takes longer than the agent waits: this join is given up, the next one succeeds.
        joined.sock.close()
        await self._trust.first_time(self.cluster, ca)
        return False

    async def _connect(self, joined: Joined) -> ResumableSession:
        """The session over a joined socket whose cluster CA is trusted. Owns the socket from here on."""
        session: MuxSession | None = None

        async def established() -> None:
            assert session is not None
            self._asking = session
            for waiter in self._hasty:
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
            life = self._lives[session] = self._live(session, joined)
            session.authenticate(Auth(kind=token.kind, token=token.text))
            await shake_hands(joined, self.cluster, session.protocol, established)
        except BaseException:
            if session is not None:
                session.abort()
                self._lives.pop(session, None)
            joined.sock.close()
            raise
        finally:
            self._asking = None
        life.schedule_renewal(token)
        return life

    def _live(self, session: MuxSession, joined: Joined) -> ResumableSession:
        return ResumableSession(
            session,
            self.cluster,
            self.relays,
            self._tokens,
            joined,
            stats=self.stats,
            wall=self._wall,
            back=self._is_back,
            failed=self._not_back,
            replace=self._replace,
        )

    # -- what a life asks of its owner --------------------------------------------------------------------------------

    def _is_back(self, life: ResumableSession) -> None:
        if life is self._current:
            self._satisfy(life.session)
            self._changed.set()

    def _not_back(self, life: ResumableSession, error: ArcbridgeError) -> None:
        self.attempts += 1
        self.failures += 1
        if life is not self._current:
            return
        if is_elsewhere(error):
            # Another agent of the cluster is there: it can have the new streams, while these wait for theirs.
            self._current = None
            self._changed.set()
        elif life.waited >= PATIENCE or not isinstance(error, Unreachable):
            self._disappoint(error)

    async def _replace(self, life: ResumableSession) -> bool:
        if life is not self._current:
            return False
        fresh = await self._attempt(leaving=life.relay)
        if self._closing or life is not self._current:
            fresh.session.close(GoawayCode.DONE, "another session was made meanwhile")
            return False
        self._take(fresh)
        self._changed.set()
        return True

    # -- renewal ------------------------------------------------------------------------------------------------------

    async def _renew(self, life: ResumableSession) -> None:
        """Send a newer token in the session; without one try again soon, until the agent ends the session."""
        session, renewal = life.session, life.renewal
        if renewal is None:
            return
        loop = asyncio.get_running_loop()
        try:
            token = await self._tokens.cluster()
        except ArcbridgeError as error:
            self._log.warning("the login cannot be renewed", session=session.label, reason=error.message)
        else:
            if life.renewal is not renewal:
                return  # a resumption brought a token meanwhile
            if token.text != renewal.sent.text and session.usable:
                session.authenticate(Auth(kind=token.kind, token=token.text))
                life.expires_in = 0.0
                life.schedule_renewal(token)
                self._log.debug("token renewed", session=session.label)
                return
            if renewal.ends_at and renewal.ends_at - loop.time() < 60:
                self._log.warning("the login ends soon and there is no newer token", session=session.label)
        renewal.at = loop.time() + RENEW_AGAIN

    # -- what the session tells ---------------------------------------------------------------------------------------

    def auth_accepted(self, session: MuxSession, ok: AuthOk) -> None:
        self.subject = ok.subject
        life = self._lives.get(session)
        if life is not None:
            life.accepted(float(ok.expires_in))
            self._changed.set()

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        """The agent accepts nothing new: what runs goes on there, the next stream needs another session."""
        if self._current is not None and session is self._current.session:
            self._current = None
            if not self._told_to_go(SessionEnded(goaway.code, goaway.message)):
                self._log.info("the agent drains the session", session=session.label, code=goaway.code)
            self._changed.set()

    def detached(self, session: MuxSession, error: ArcbridgeError) -> None:
        life = self._lives.get(session)
        if life is None or self._closing:
            session.abort(error)
        else:
            life.lost(error)
            self._changed.set()

    def move_requested(self, session: MuxSession) -> None:
        life = self._lives.get(session)
        if life is not None and not self._closing:
            life.move()

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        life = self._lives.pop(session, None)
        if life is None:
            return
        was_detached = life.detached
        life.over(error)
        if isinstance(error, ConnectionLost):
            self.relays.failed(life.relay)
        if life is not self._current:
            return
        self._current = None
        if self._closing:
            return
        if not self._told_to_go(error) and not was_detached:
            self._log.warning("session lost", session=session.label, reason=error.message)
        self._changed.set()

    def _told_to_go(self, error: ArcbridgeError) -> bool:
        """Whether the end is about this login, not about the way: then the person is told, and a new token needed."""
        self._refused_with = of_session(error, self.cluster)
        if not isinstance(self._refused_with, Unauthenticated | PermissionRefused):
            return False
        self._fail(self._refused_with)
        self._tokens.refused()
        return True
