"""One session to one cluster, kept up: join, pin, end-to-end TLS, AUTH, renewal, reconnection.

`run` owns the work, one attempt at a time. Whoever needs a stream asks `ready`: all share that attempt, and all get
its error when it fails. What a step may send is fixed by its order: the relay's TLS is verified before the access
token is said; the cluster's CA is checked against its pin, and the agent's TLS against that CA, before the cluster's
token is.

A session here lives as long as its connection; `_connect` is where a detached one will be resumed.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable

import structlog

from arcbridge import __version__
from arcbridge.client.refusal import RETRY_SOON, of_join, of_session
from arcbridge.client.relay_access import RelayAccess
from arcbridge.client.tokens import ClusterToken, Tokens
from arcbridge.client.trust import ClusterTrust
from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    JoinRefused,
    PermissionRefused,
    PinMismatch,
    RemoteProtocolError,
    SessionEnded,
    Unauthenticated,
    Unreachable,
)
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.backoff import Backoff
from arcbridge.net.dialer import connect
from arcbridge.net.join import client_join
from arcbridge.net.tls import ALPN_JOIN, inner_client_context
from arcbridge.pki.names import check_cluster_name, cluster_server_name
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Auth, AuthOk, Goaway, JoinReply, JoinRequest
from arcbridge.wire.session import Kind, Side

CONNECT_DEADLINE = 10.0
"""Seconds to reach the relay by TCP, all its addresses and the proxy included."""
HANDSHAKE_DEADLINE = 10.0
"""Seconds for the end-to-end TLS, HELLO and AUTH together; the agent allows as many."""
QUIET = 1.0
"""Seconds after a failed attempt in which others get its error instead of an attempt of their own."""
RENEW_AGAIN = 15.0
"""Seconds between tries to renew, while no newer token is there."""
HINT_MOST = 600.0
"""A relay's or agent's retry time is obeyed up to here."""

log = structlog.get_logger("arcbridge.client")


class _Renewal:
    """When the session's token has to be followed by a newer one; monotonic seconds."""

    __slots__ = ("at", "ends_at", "sent")

    def __init__(self, sent: ClusterToken, life: float, now: float) -> None:
        self.sent = sent
        self.ends_at = now + life if life > 0 else 0.0
        # 80 % of the life, or five minutes before its end, but not in the first half.
        self.at = now + max(min(0.8 * life, life - 300), 0.5 * life) if life > 0 else 0.0


class ClusterSession(BaseHandler):
    """Keeps one session to `cluster`; counters are read by metrics and `status`."""

    def __init__(
        self,
        relay: RelayAccess,
        cluster: str,
        tokens: Tokens,
        trust: ClusterTrust,
        *,
        backoff: Backoff | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.relay = relay
        self.cluster = check_cluster_name(cluster)
        self._tokens = tokens
        self._trust = trust
        self._backoff = backoff or Backoff()
        self._wall = wall
        self._current: MuxSession | None = None
        self._draining: set[MuxSession] = set()
        self._waiting: set[asyncio.Future[MuxSession]] = set()
        self._closing = False
        self._changed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._renewal: _Renewal | None = None
        self._life = 0.0
        """Seconds that the agent gives the current token; 0: it did not say."""
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
        self._log = log.bind(cluster=cluster)

    # -- for those who need streams -----------------------------------------------------------------------------------

    @property
    def current(self) -> MuxSession | None:
        """The session for new streams, or None."""
        session = self._current
        return session if session is not None and session.usable else None

    async def ready(self) -> MuxSession:
        """The session, when one is up; raises why there is none. Cancelling disturbs nobody."""
        session = self.current
        if session is not None:
            return session
        loop = asyncio.get_running_loop()
        if self.failure is not None and loop.time() - self._failed_at < QUIET:
            raise self.failure
        waiter: asyncio.Future[MuxSession] = loop.create_future()
        self._waiting.add(waiter)
        self._wanted.set()
        try:
            return await waiter
        finally:
            self._waiting.discard(waiter)

    def sessions(self) -> list[MuxSession]:
        """All that are not over, for counters."""
        return [*self._draining, *([self._current] if self._current is not None else [])]

    # -- the owner's loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a session up until cancelled; then everything is closed. Raises nothing of the network's."""
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

    async def _establish(self) -> None:
        if self.current is not None:
            return
        self.attempts += 1
        session = await self._attempt()
        if session.closed:  # between AUTH_OK and here
            raise of_session(await session.wait_ended(), self.cluster)
        self._current = session
        self._established_at = asyncio.get_running_loop().time()
        self.established_count += 1
        self.failure = None
        self._refused_with = None
        self._log.info("session established", session=session.label, subject=self.subject)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(session)

    async def _stay(self) -> float:
        """Until the session is over or drains, renewing its token; how long it was good, in seconds."""
        loop = asyncio.get_running_loop()
        while self.current is not None:
            self._changed.clear()
            renewal = self._renewal
            wait = max(0.0, renewal.at - loop.time()) if renewal is not None and renewal.at else None
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                await self._renew()
        return loop.time() - self._established_at

    async def _pause(self, lasted: float, hint: float | None) -> None:
        """Wait before the next attempt, unless somebody wants a stream now."""
        if hint is not None:
            hint = min(float(hint), HINT_MOST)
        delay = self._backoff.next_delay(lasted=lasted, hint=hint)
        if self.failure is None and self._waiting:
            return  # a good session ended: what waits already shall not wait for the backoff
        self._wanted.clear()
        try:
            async with asyncio.timeout(delay):
                await self._wanted.wait()
        except TimeoutError:
            pass

    def _fail(self, error: ArcbridgeError, *, told: bool = False) -> None:
        again = told or (self.failure is not None and self.failure.message == error.message)
        self.failure = error
        self._failed_at = asyncio.get_running_loop().time()
        self.failures += 1
        # The same failure over and over is told once, then only to those who debug.
        (self._log.debug if again else self._log.warning)("no session", reason=error.message)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # a waiter that was cancelled at the same moment need not know

    def _close(self) -> None:
        self._closing = True
        for session in self.sessions():
            session.close(GoawayCode.DONE, "the client ended")
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(Unreachable("arcbridge is ending"))
                waiter.exception()  # as in _fail

    # -- one attempt --------------------------------------------------------------------------------------------------

    async def _attempt(self) -> MuxSession:
        """Join, check the CA, connect; raises ArcbridgeError in the person's words."""
        try:
            while True:
                sock, reply = await self._join()
                try:
                    known = self._trust.check(self.cluster, reply.cluster_ca)
                    if not known and not self._trust.asks:
                        await self._trust.first_time(self.cluster, reply.cluster_ca)
                        known = True
                except BaseException:
                    sock.close()
                    raise
                if known:
                    return await self._connect(sock, reply)
                # Asking a person takes longer than the agent waits: this join is given up, the next one succeeds.
                sock.close()
                await self._trust.first_time(self.cluster, reply.cluster_ca)
        except JoinRefused as error:
            raise of_join(error, self.cluster) from error
        except (SessionEnded, ConnectionLost) as error:
            raise of_session(error, self.cluster) from error
        except RemoteProtocolError as error:
            raise Unreachable(f'cannot reach cluster "{self.cluster}": {error.message}') from error

    async def _join(self) -> tuple[socket.socket, JoinReply]:
        token = await self._tokens.access()
        context = await self.relay.context(ALPN_JOIN)
        sock = await connect(self.relay.address, deadline=CONNECT_DEADLINE)
        request = JoinRequest(role="client", cluster=self.cluster, token=token, version=__version__)
        try:
            reply = await client_join(sock, context, self.relay.address.host, request)
        except Unreachable as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                self.relay.forget()
            raise
        if not reply.cluster_ca:
            sock.close()
            raise RemoteProtocolError("the relay did not say the cluster's CA")
        return sock, reply

    async def _connect(self, sock: socket.socket, reply: JoinReply) -> MuxSession:
        """The session over a joined socket whose cluster CA is trusted. Owns the socket from here on."""
        session: MuxSession | None = None
        try:
            context = inner_client_context(reply.cluster_ca)
            token = await self._tokens.cluster()
            session = MuxSession(
                Side.INITIATOR, Kind.SESSION, self, label=reply.join_id, software=f"arcbridge {__version__}"
            )
            self._renewal, self._life = None, 0.0
            session.authenticate(Auth(kind=token.kind, token=token.text))
            async with asyncio.timeout(HANDSHAKE_DEADLINE):
                await asyncio.get_running_loop().create_connection(
                    session.protocol, sock=sock, ssl=context, server_hostname=cluster_server_name(self.cluster)
                )
                await session.wait_established()
        except BaseException as error:
            if session is not None:
                session.abort()
            sock.close()
            if isinstance(error, TimeoutError):
                raise Unreachable(
                    f'the agent of cluster "{self.cluster}" did not answer in time; try again', retry_after=RETRY_SOON
                ) from error
            if isinstance(error, ssl.SSLCertVerificationError):
                raise PinMismatch(
                    f'whoever answered for cluster "{self.cluster}" is not certified by its CA; '
                    "somebody may be in between: tell whoever runs the relay"
                ) from error
            if isinstance(error, OSError):
                raise ConnectionLost("it ended during the handshake with the agent") from error
            raise
        self._schedule_renewal(token)
        return session

    # -- renewal ------------------------------------------------------------------------------------------------------

    def _schedule_renewal(self, token: ClusterToken, expires_in: float = 0.0) -> None:
        """By the agent's word, or else by the token's own. AUTH_OK may come before this is called, or after."""
        life = expires_in or self._life
        if not life and token.expires_at:
            life = max(1.0, token.expires_at - self._wall())
        self._renewal = _Renewal(token, life, asyncio.get_running_loop().time())

    async def _renew(self) -> None:
        """Send a newer token in the session; without one try again soon, until the agent ends the session."""
        session, renewal = self.current, self._renewal
        if session is None or renewal is None:
            return
        loop = asyncio.get_running_loop()
        try:
            token = await self._tokens.cluster()
        except ArcbridgeError as error:
            self._log.warning("the login cannot be renewed", session=session.label, reason=error.message)
        else:
            if token.text != renewal.sent.text and not session.closed:
                session.authenticate(Auth(kind=token.kind, token=token.text))
                self._life = 0.0
                self._schedule_renewal(token)
                self._log.debug("token renewed", session=session.label)
                return
            if renewal.ends_at and renewal.ends_at - loop.time() < 60:
                self._log.warning("the login ends soon and there is no newer token", session=session.label)
        renewal.at = loop.time() + RENEW_AGAIN

    # -- what the session tells ---------------------------------------------------------------------------------------

    def auth_accepted(self, session: MuxSession, ok: AuthOk) -> None:
        self.subject = ok.subject
        self._life = float(ok.expires_in)
        if self._renewal is not None and session is self._current:
            self._schedule_renewal(self._renewal.sent, float(ok.expires_in))
            self._changed.set()

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        """The agent accepts nothing new: what runs goes on there, the next stream needs another session."""
        if session is self._current:
            self._current = None
            self._draining.add(session)
            if not self._told_to_go(SessionEnded(goaway.code, goaway.message)):
                self._log.info("the agent drains the session", session=session.label, code=goaway.code)
            self._changed.set()

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        self._draining.discard(session)
        if session is not self._current:
            return
        self._current = None
        if self._closing:
            return
        if not self._told_to_go(error):
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
