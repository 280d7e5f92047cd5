"""Serves sessions: from a joined socket to streams that run as the caller, until the caller's token expires.

Nothing reaches the API server before AUTH is accepted: the session's state machine holds streams back until then. A
session ends at its token's expiry by the wall clock, unless AUTH was renewed with a token of the same subject; a token
of another subject ends it at once. The groups of a renewed token count from the next request, and of two tokens the one
that was issued later counts. However often it is renewed, a session ends at its greatest age, and at once when its user
is revoked (`revocations`).

A session outlives its connection: it is held for two minutes, and resumes over a connection whose caller shows the
session's secret and a token of the same subject (`resume` decides that). Such a connection is unauthenticated first,
like any other; when its right is established the held session takes the connection over. The token's expiry counts
meanwhile. Streams see no event: they stall.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping

import structlog

from arcbridge.agent.accounts import Account, Accounts, Limit
from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.agent.authenticator import Authenticated, Authenticator, UnprovedToken
from arcbridge.agent.backlog_relief import INTERVAL, BacklogRelief
from arcbridge.agent.kube.authorize import Caller
from arcbridge.agent.kube.proxy import KubeProxy
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.resume import Claim, ResumeRefusal, Resumes
from arcbridge.agent.revocations import AccessRevoked, Revocation, Revocations, covering
from arcbridge.agent.targets import PREFIX, TcpTargets
from arcbridge.errors import (
    ArcbridgeError,
    BytesAltered,
    ConnectionLost,
    PermissionRefused,
    RemoteProtocolError,
    Unauthenticated,
)
from arcbridge.identity.claims import Identity
from arcbridge.identity.proof import NO_PEER, Peer
from arcbridge.mux import memory
from arcbridge.mux.alteration import alteration
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.fast_tls import fast_tls
from arcbridge.net.session_tls import accept_session
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk, Hello
from arcbridge.wire.session import Kind, Side, State

HANDSHAKE_DEADLINE = 5.0
CLOCK_CHECK = 5.0
"""Seconds between two checks of the wall clock: an expired token ends its session at most this much late, also when the
clock was set or the machine slept."""
MAX_SESSIONS = 1000
"""Sessions of one agent process, detached ones included; a join over it is refused before it is dialled."""
MAX_UNAUTHENTICATED = 256
"""Joined connections that have not authenticated yet; each has ten seconds."""
STALLED = 2.0
"""Seconds after which such a connection gives its place to a newcomer when all are taken, unless its token is being
verified. A login takes some round trips, and users without a token for the cluster must not keep out users with one."""
MAX_AGE = 12 * 3600.0
"""Seconds that a session lasts at most, by default: a working day, so that what was granted is asked for once a day."""
RESENT_AUTH_GRACE = 30.0
"""Seconds after a resumption in which an AUTH may be one from before the connection was lost: its token may have
expired since then."""

_log = structlog.get_logger("arcbridge.agent")


class Sessions:
    """All sessions of one agent. `close()` must be awaited."""

    def __init__(
        self,
        authenticator: Authenticator,
        proxy: KubeProxy,
        targets: TcpTargets,
        *,
        instance: str = "",
        software: str = "",
        limits: Limits = DEFAULT,
        audit: AuditLog | None = None,
        accounts: Accounts | None = None,
        revocations: Revocations | None = None,
        max_age: float = MAX_AGE,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.authenticator = authenticator
        self.proxy = proxy
        self.targets = targets
        self.audit = audit
        self.accounts = accounts if accounts is not None else Accounts()
        self.revocations = revocations if revocations is not None else Revocations(clock=clock)
        self.revocations.on_news = self._revocations_changed
        self.max_age = max_age
        self.clock = clock
        self.monotonic = monotonic
        self.resumes: Resumes[AgentSession] = Resumes(clock=monotonic)
        self._instance = instance
        self._software = software
        self._limits = limits
        fast_tls()  # now, at the agent's start, and not while the first session waits
        self.relief = BacklogRelief(memory.backlog)
        self._relief_timer: asyncio.TimerHandle | None = None
        """Runs while there are sessions."""
        self._open: set[AgentSession] = set()
        self._unauthenticated: set[AgentSession] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.opened = 0
        self.refused = 0
        self.expired = 0
        """Sessions that ended with their token, or at their greatest age."""
        self.revoked = 0
        """Sessions that ended, and AUTHs that were refused, because the user is revoked."""
        self.resumed = 0
        self.detached_seconds = 0.0
        """Seconds that sessions were detached, of all that were resumed or ended detached."""
        self.moves_asked = 0
        self.draining = False
        self._replayed = 0
        self._ending_revoked: asyncio.Handle | None = None

    def __len__(self) -> int:
        """Authenticated sessions, with or without a connection."""
        return len(self._open)

    @property
    def detached(self) -> int:
        """Sessions without a connection that may be resumed."""
        return sum(session.detached_at is not None for session in self._open)

    @property
    def replayed_bytes(self) -> int:
        """Bytes sent again after resumptions."""
        return self._replayed + sum(one.session.stats.replayed_bytes for one in self._open if one.session is not None)

    def accepts_connection(self, *, may_come_back: bool = False) -> bool:
        """Whether another connection may join: one that may resume a session also where no new session may begin."""
        if len(self._unauthenticated) >= MAX_UNAUTHENTICATED and self._stalled() is None:
            return False
        return may_come_back or not self._full(len(self._open) + len(self._unauthenticated))

    async def serve(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        join_id: str,
        *,
        via: str = "",
        peer: Peer = NO_PEER,
    ) -> None:
        """Take over a socket joined at the relay `via`; returns when the end-to-end TLS handshake is complete.

        `peer`: what `context` shows, as proofs name it. Raises ConnectionLost when the handshake fails; the socket is
        closed then.
        """
        handler = AgentSession(self, join_id, via, peer)
        session = MuxSession(
            Side.ACCEPTOR,
            Kind.SESSION,
            handler,
            limits=self._limits,
            label=join_id,
            agent=self._instance,
            software=self._software,
        )
        handler.session = session
        if len(self._unauthenticated) >= MAX_UNAUTHENTICATED and (stalled := self._stalled()) is not None:
            stalled.give_way()
        self._unauthenticated.add(handler)
        self._empty.clear()
        handler.handshaking = sock
        try:
            await accept_session(sock, context, session.protocol(), handshake_deadline=HANDSHAKE_DEADLINE)
        except (OSError, TimeoutError) as error:
            sock.close()
            lost = alteration(error) or ConnectionLost(f"the end-to-end TLS handshake failed ({type(error).__name__})")
            session.abort(lost)
            raise lost from error
        except BaseException:
            sock.close()
            session.abort()
            raise
        finally:
            handler.handshaking = None

    def drain(self) -> None:
        """Send GOAWAY on every session; open streams may finish."""
        self.draining = True
        for handler in list(self._open):  # the others get it when they authenticate
            handler.send_goaway()

    def ask_to_move(self, via: str, before: float) -> int:
        """Ask the sessions that joined at the relay `via` before that moment (monotonic seconds) to resume over another
        connection; answers how many were asked."""
        asked = 0
        for handler in self._open:
            session = handler.session
            if session is None or handler.via != via or handler.joined_at > before:
                continue
            if session.resumable and session.state is not State.DETACHED:
                session.ask_to_move()
                asked += 1
        self.moves_asked += asked
        return asked

    def end_revoked(self) -> None:
        """End the sessions of the users whom the news of the revocations name, attached or not."""
        news = self.revocations.take_news()
        for handler in list(self._open):
            handler.end_if_revoked(news)

    def revoke(self, via: str, message: str) -> None:
        """End the sessions that came through the relay `via`, attached or not: it has revoked the cluster."""
        for handler in [one for one in self._all() if one.via == via]:
            if handler.session is not None:
                handler.session.close(GoawayCode.REVOKED, message)

    async def wait_empty(self) -> None:
        """Wait until no session is left."""
        await self._empty.wait()

    async def close(self, code: GoawayCode = GoawayCode.DRAINING, message: str = "the agent has stopped") -> None:
        """End every session at once."""
        handlers = self._all()
        for handler in handlers:
            if handler.session is not None:
                handler.session.close(code, message, 1)
        await asyncio.gather(*(handler.finished() for handler in handlers))

    # -- called by the sessions -------------------------------------------------------------------------------

    def admit(self, handler: AgentSession) -> bool:
        """Count a connection whose token was accepted as a new session; False where the limit is reached."""
        if self._full(len(self._open)) and not self._evict_detached():
            return False
        self._unauthenticated.discard(handler)
        self._open.add(handler)
        self.opened += 1
        if self._relief_timer is None:
            self._relieve()
        return True

    def evict_detached(self, account: Account) -> bool:
        """End a user's session that has been detached longest, of those without a stream; whether there was one."""
        return self._evict_longest_detached([one for one in self._open if one in account.members])

    def ended(self, handler: AgentSession, error: ArcbridgeError) -> None:
        """Forget a session, or a connection that never became one."""
        if handler.session is not None:
            self._replayed += handler.session.stats.replayed_bytes
            self.resumes.remove(handler.session.session_id, error)
        self._open.discard(handler)
        self._unauthenticated.discard(handler)
        if not self._open and self._relief_timer is not None:
            self._relief_timer.cancel()
            self._relief_timer = None
        if not self._open and not self._unauthenticated:
            self._empty.set()

    # -- inside -----------------------------------------------------------------------------------------------

    def _relieve(self) -> None:
        """Look once a second whether more waits towards callers than may."""
        self._relief_timer = None
        self.relief.relieve(self._open, self.monotonic())
        if self._open:
            self._relief_timer = asyncio.get_running_loop().call_later(INTERVAL, self._relieve)

    def _revocations_changed(self) -> None:
        """End sessions in this turn of the loop, once for all that comes with it: a relay's list may be long."""
        if self._ending_revoked is None:
            self._ending_revoked = asyncio.get_running_loop().call_soon(self._end_revoked)

    def _end_revoked(self) -> None:
        self._ending_revoked = None
        self.end_revoked()

    def _all(self) -> list[AgentSession]:
        return [*self._open, *self._unauthenticated]

    def _stalled(self) -> AgentSession | None:
        """Return the connection that has waited longest for its login, if that is for longer than `STALLED`."""
        oldest = min(
            (one for one in self._unauthenticated if not one.judged), key=lambda one: one.joined_at, default=None
        )
        return None if oldest is None or self.monotonic() - oldest.joined_at < STALLED else oldest

    def _full(self, sessions: int) -> bool:
        return sessions >= MAX_SESSIONS or memory.budget.full

    def _evict_detached(self) -> bool:
        """End the session that has been detached longest, of those without a stream; whether there was one."""
        return not memory.budget.full and self._evict_longest_detached(self._open)

    def _evict_longest_detached(self, among: Iterable[AgentSession]) -> bool:
        idle = [one for one in among if one.detached_at is not None and one.streams == 0]
        if not idle:
            return False
        oldest = min(idle, key=lambda one: one.detached_at or 0.0)
        assert oldest.session is not None
        self._open.discard(oldest)
        oldest.session.close(GoawayCode.GONE, "the agent needed its place")
        return True


class AgentSession(BaseHandler):
    """The agent's side of one session, over one connection after the other; or of a connection that resumes one."""

    def __init__(self, sessions: Sessions, join_id: str, via: str, peer: Peer = NO_PEER) -> None:
        self._sessions = sessions
        self._join_id = join_id
        self.via = via
        """The relay at which the present connection was joined."""
        self.peer = peer
        """What this agent showed in the present connection, as proofs name it."""
        self.joined_at = sessions.monotonic()
        self.session: MuxSession | None = None
        self.handshaking: socket.socket | None = None
        """The socket, while the end-to-end TLS begins."""
        self.detached_at: float | None = None
        """When the session lost its connection, monotonic seconds; None while it has one."""
        self._resumed_at: float | None = None
        """When it was last resumed, monotonic seconds."""
        self._replayed = 0
        """Bytes that were sent again, as of the last resumption."""
        self._began_at = sessions.clock(), sessions.monotonic()
        """When the session was authenticated first: unix and monotonic seconds."""
        self._caller: Caller | None = None
        self._pending_auth: Auth | None = None
        """The newest AUTH that was not decided about yet."""
        self._authenticating: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._log = _log.bind(session=join_id)

    # -- read by `agent.resume` -----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it can be resumed no more."""
        return self.session is None or not self.session.resumable

    @property
    def epoch(self) -> int:
        """The epoch of the present connection."""
        return self.session.epoch if self.session is not None else 0

    @property
    def streams(self) -> int:
        """Streams that are open."""
        return self.session.streams_open if self.session is not None else 0

    @property
    def judged(self) -> bool:
        """Whether a token is being verified now."""
        return self._authenticating is not None and not self._authenticating.done()

    def give_way(self) -> None:
        """End a connection that has not logged in, because its place is needed."""
        if self.handshaking is not None:
            try:
                self.handshaking.shutdown(socket.SHUT_RDWR)
            except OSError:
                # The peer was faster.
                pass
        if self.session is not None:
            self.session.close(GoawayCode.LIMIT, "this connection did not log in, and others wait: try again", 1)

    # -- callbacks of the session -----------------------------------------------------------------------------

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        """Decide about AUTHs one at a time; of several that wait the newest counts."""
        if self._caller is None and self._crossed(session):
            return
        self._pending_auth = auth
        if self._authenticating is None or self._authenticating.done():
            self._authenticating = asyncio.get_running_loop().create_task(
                self._authenticate_pending(session), name=f"auth-{self._join_id}"
            )

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        caller = self._caller
        if caller is None:  # the state machine holds streams back until AUTH is accepted; this is the second check
            stream.abort(ResetCode.REFUSED)
            return
        limit = caller.account.refuses_stream(self._sessions.monotonic(), plain=target.startswith(PREFIX))
        if limit is not None:
            self._report(caller, limit, caller.request_id(stream.id, 0), target)
            stream.abort(ResetCode.LIMIT)
        elif target == "kubernetes":
            self._sessions.proxy.serve(stream, caller)
        else:
            self._sessions.targets.serve(stream, target, caller)

    def detached(self, session: MuxSession, error: ArcbridgeError) -> None:
        self.detached_at = self._sessions.monotonic()
        if self._caller is not None:
            self._caller.connected_since = math.inf
        tell = self._log.warning if isinstance(error, BytesAltered) else self._log.info
        tell("session detached", reason=error.message, streams=self.streams)

    def resumed(self, session: MuxSession) -> None:
        seconds = self._end_detachment()
        if self._caller is not None:
            self._caller.connected_since = self._sessions.monotonic()
        replayed, self._replayed = session.stats.replayed_bytes - self._replayed, session.stats.replayed_bytes
        self._sessions.resumed += 1
        self._log.info(
            "session resumed",
            seconds=round(seconds, 3),
            replayed=replayed,
            streams=self.streams,
            join=session.label,
            epoch=session.epoch,
        )

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._authenticating is not None:
            self._authenticating.cancel()
        self._end_detachment()
        self._sessions.ended(self, error)
        if self._caller is not None:
            self._leave(self._caller)
            self._log.info("session ended", user=self._caller.identity.username, reason=error.message)
        elif isinstance(error, BytesAltered):
            self._log.warning("session refused", reason=error.message)

    def end_streams(self) -> None:
        """Reset all streams in the next turn, with LIMIT: the user may move no more bytes today."""
        if self.session is not None:
            asyncio.get_running_loop().call_soon(self.session.reset_streams, ResetCode.LIMIT)

    def end_if_revoked(self, users: Mapping[str, Revocation]) -> None:
        """End the session, with or without a connection, where its user's token counts no more."""
        if self.session is None or self._caller is None:
            return
        found = covering(users, self._caller.identity)
        if found is not None:
            sentence = found.sentence(self._sessions.clock())
            self._sessions.revoked += 1
            self._write_audit(self._caller.identity, "session", "cut", sentence)
            self.session.close(GoawayCode.REVOKED, sentence)

    def send_goaway(self) -> None:
        """Tell the client that the agent drains; open streams may finish."""
        if self.session is not None:
            self.session.goaway(GoawayCode.DRAINING, "the agent is stopping", 1)

    async def finished(self) -> None:
        """Wait until the session and its task have ended."""
        if self.session is not None:
            await self.session.wait_ended()
        if self._authenticating is not None:
            await asyncio.wait([self._authenticating])

    # -- inside -----------------------------------------------------------------------------------------------

    def _end_detachment(self) -> float:
        """Note that the session is no longer detached; answers for how long it was, seconds."""
        if self.detached_at is None:
            return 0.0
        seconds = self._sessions.monotonic() - self.detached_at
        self.detached_at = None
        self._sessions.detached_seconds += seconds
        return seconds

    def _crossed(self, session: MuxSession) -> bool:
        """Refuse a client that was joined under another id than this agent: log and audit would say that one user did
        what another one does (docs/threats.md#B2). Older clients do not say theirs."""
        hello = session.peer_hello
        if hello is None or hello.join_id in ("", self._join_id):
            return False
        self._sessions.refused += 1
        reason = "the client was joined under another id than this agent: the relay has crossed two joins"
        self._log.warning("session refused", reason=reason, connection=self.via)
        session.refuse_auth(GoawayCode.CROSSED, reason)
        return True

    async def _authenticate_pending(self, session: MuxSession) -> None:
        while (auth := self._pending_auth) is not None:
            self._pending_auth = None
            try:
                found = await self._sessions.authenticator.authenticate(auth, self.peer)
                if found.identity.expires_at <= self._sessions.clock():
                    raise Unauthenticated("the token has expired; log in again")
                if self._caller is None or found.identity.supersedes(self._caller.identity):
                    # A token from before a loss that is sent again changes nothing, revoked or not.
                    self._sessions.revocations.check(found.identity)
            except AccessRevoked as error:
                self._sessions.revoked += 1
                self._write_audit(found.identity, self._auth_verb(session), "refused", error.message)
                if session.closed or self._refuse(session, error):
                    return
                continue
            except ArcbridgeError as error:
                verb = self._auth_verb(session)
                if not session.closed and not self._refuse(session, error):
                    # No record: an honest client sends such an AUTH again after a loss. The session goes on, so that
                    # one client could write any number of records.
                    continue
                if isinstance(error, UnprovedToken):
                    # The token may be stolen: its owner's name is worth a record.
                    self._write_audit(error.identity, verb, "refused", error.message)
                return
            if session.closed:
                return
            if self._caller is not None:
                taken = self._renew(session, self._caller, found)
            elif session.resuming is not None:
                taken = self._resume_held(session, session.resuming, found)
            else:
                taken = self._accept(session, found)
            if not taken:
                return

    @staticmethod
    def _auth_verb(session: MuxSession) -> str:
        return "authenticate" if session.resuming is None else "resume"

    def _refuse(self, session: MuxSession, error: ArcbridgeError) -> bool:
        """Refuse an AUTH; answers whether that ends the session."""
        code = GoawayCode.UNAVAILABLE
        if isinstance(error, Unauthenticated):
            code = GoawayCode.UNAUTHENTICATED
        elif isinstance(error, AccessRevoked):
            code = GoawayCode.REVOKED
        elif isinstance(error, PermissionRefused):
            code = GoawayCode.FORBIDDEN
        if self._caller is not None:
            again = self._resumed_at is not None and self._sessions.monotonic() - self._resumed_at < RESENT_AUTH_GRACE
            if isinstance(error, UnprovedToken) and error.identity.subject != self._caller.identity.subject:
                again = False  # no client has sent the token of another user before
            if code is GoawayCode.UNAVAILABLE or (again and code is GoawayCode.UNAUTHENTICATED):
                # A renewal that cannot be verified now, or was sent before the loss of the connection and has expired
                # since, changes nothing: the session's own token is valid until it expires.
                self._log.warning("renewal changed nothing", reason=error.message)
                return False
        self._sessions.refused += 1
        self._log.warning("session refused", reason=error.message, rule=getattr(error, "rule", ""))
        session.refuse_auth(code, error.message)
        return True

    def _accept(self, session: MuxSession, found: Authenticated) -> bool:
        """Open a new session for as long as its token lasts; answers whether it is open."""
        identity, sessions = found.identity, self._sessions
        account = sessions.accounts.enter(identity, self)
        caller = Caller(self._join_id, identity, account, found.token_mode, found.proved_key)
        if account.has_too_many_sessions() and not sessions.evict_detached(account):
            sessions.refused += 1
            self._report(caller, Limit.SESSIONS)
            session.refuse_auth(GoawayCode.LIMIT, account.explain(Limit.SESSIONS).message)
            self._leave(caller)
            return False
        if not sessions.admit(self):
            sessions.refused += 1
            self._log.warning("session refused", reason="the agent is at a limit", user=identity.username)
            session.refuse_auth(GoawayCode.UNAVAILABLE, "the agent has as many sessions as it may: try again later")
            self._leave(caller)
            return False
        self._caller = caller
        session.pacer = account
        session.backlog.move(account.waiting)
        session.share_churn(account.churn)
        self._began_at = sessions.clock(), sessions.monotonic()
        if found.token_mode:
            self._caller.tokens.add(found.token_digest)
            self._caller.review_token = self._is_own_token
        mode = "bearer" if found.token_mode else "oidc"
        self._log.info(
            "session opened",
            user=identity.username,
            groups=len(identity.groups),
            mode=mode,
            bound=identity.binding.kind.value,
        )
        session_id, secret = os.urandom(16), os.urandom(16)
        session.accept_auth(self._auth_ok(session_id, secret, caller))
        if session.resumable:
            self._sessions.resumes.add(session_id, Claim(secret, identity.subject, found.token_mode), self)
        self._check_expiry()
        if self._sessions.draining:
            self.send_goaway()
        return not session.closed

    def _renew(self, session: MuxSession, caller: Caller, found: Authenticated) -> bool:
        """Renew the session's token; answers whether the session goes on."""
        if found.identity.subject != caller.identity.subject or found.token_mode != caller.token_mode:
            self._log.warning("session refused", reason="renewed with the token of another subject")
            session.close(GoawayCode.FORBIDDEN, "the session was renewed with a token of another user")
            return False
        self._adopt_newer(caller, found)
        caller.tokens.add(found.token_digest)
        session.accept_auth(self._auth_ok(session.session_id, session.resume_secret, caller))
        self._check_expiry()
        return True

    @staticmethod
    def _adopt_newer(caller: Caller, found: Authenticated) -> None:
        """Adopt the identity of the token that was issued later: one from before a loss may be replayed behind a newer
        one (docs/threats.md#S10), and a user who lost a group keeps it no longer than until the renewal."""
        if found.identity.supersedes(caller.identity):
            caller.adopt(found.identity, found.proved_key)
            caller.account.adopt(found.identity)

    async def _is_own_token(self, token: str) -> bool:
        """Ask the API server whether a token that a request carries is of the user who opened the session.

        Raises RequestRefusal where that cannot be told, and for a token without proof. It does not renew the session:
        AUTH does.
        """
        caller = self._caller
        assert caller is not None, "requests come to sessions that were accepted"
        try:
            identity = await self._sessions.authenticator.review_in_session(token, caller.proved_key)
        except UnprovedToken as error:
            # The token may be stolen. Reviews have a rate (`Caller.reviews`), and so have these records.
            self._write_audit(error.identity, "authenticate", "refused", error.message)
            raise RequestRefusal(401, error.message) from error
        except (Unauthenticated, PermissionRefused):
            return False
        except ArcbridgeError as error:
            raise RequestRefusal(503, error.message) from error
        return identity.subject == caller.identity.subject

    def _auth_ok(self, session_id: bytes, secret: bytes, caller: Caller) -> AuthOk:
        left = max(1, int(caller.identity.expires_at - self._sessions.clock()))
        return AuthOk(session_id=session_id, resume_secret=secret, subject=caller.identity.username, expires_in=left)

    def _resume_held(self, session: MuxSession, hello: Hello, found: Authenticated) -> bool:
        """Let the held session that this HELLO names take the connection over; this handler ends either way."""
        resumes = self._sessions.resumes
        held = resumes.judge(hello, found.identity.subject, found.token_mode)
        if not isinstance(held, ResumeRefusal):
            try:
                held.take_over(self, session, found)
            except ConnectionLost:
                return False  # the new connection was lost meanwhile; the session stays detached
            except RemoteProtocolError as error:
                held = resumes.refuse("counts", message=error.message)
            else:
                return False
        if not held.quiet:
            self._log.warning("resumption refused", reason=held.reason, user=found.identity.username)
        if held.reason in ("secret", "subject"):  # a caller with a valid token tried to resume a session of another
            self._write_audit(found.identity, "resume", "refused", f"wrong {held.reason}")
        if not session.closed:
            session.refuse_auth(held.code, held.message)
        return False

    def take_over(self, carrier: AgentSession, connection: MuxSession, found: Authenticated) -> None:
        """Resume over the connection of `carrier`, whose right to it `resume` has established.

        Raises RemoteProtocolError when the two ends disagree about what was sent; this session is over then.
        """
        session, caller = self.session, self._caller
        assert session is not None, "only sessions that were accepted can be found"
        assert caller is not None
        self._adopt_newer(caller, found)
        caller.tokens.add(found.token_digest)
        self.via, self.joined_at, self.peer = carrier.via, carrier.joined_at, carrier.peer
        self._resumed_at = self._sessions.monotonic()
        session.take_over(connection, self._auth_ok(session.session_id, session.resume_secret, caller))
        self._check_expiry()

    def _report(self, caller: Caller, limit: Limit, request: str = "", target: str = "") -> None:
        """Count that the user is over a limit; one refusal of each burst is logged and recorded."""
        account = caller.account
        omitted = account.refuse(limit, self._sessions.monotonic())
        if omitted is not None:
            self._log.warning("limit reached", user=caller.identity.username, reason=limit.value, omitted=omitted)
            self._record_limit(caller, limit, omitted, account.explain(limit).message, request, target)

    def _record_limit(
        self, caller: Caller, limit: Limit, omitted: int, reason: str, request: str = "", target: str = ""
    ) -> None:
        if self._sessions.audit is not None:
            record = AuditRecord(
                request=request or caller.request_id(0, 0),
                session=self._join_id,
                user=caller.identity.username,
                groups=len(caller.identity.groups),
                bound=caller.bound,
                verb="open" if target else "limit",
                target=target,
                outcome="refused",
                limit=limit,
                omitted=omitted,
                reason=reason,
            )
            self._sessions.audit.write(record)

    def _leave(self, caller: Caller) -> None:
        """End the session's part in its user's account; the last one records the refusals that no record counts yet."""
        caller.account.leave(self)
        if not caller.account.members:
            for limit, omitted in caller.account.take_omitted().items():
                self._record_limit(caller, limit, omitted, "the user's last session has ended")

    def _write_audit(self, identity: Identity, verb: str, outcome: str, reason: str) -> None:
        """Record what happened to the session as a whole."""
        if self._sessions.audit is not None:
            self._sessions.audit.write(
                AuditRecord(
                    request=f"{self._join_id}-{os.urandom(8).hex()}-0-0",
                    session=self._join_id,
                    user=identity.username,
                    groups=len(identity.groups),
                    bound=identity.binding.kind.value,
                    verb=verb,
                    outcome=outcome,
                    reason=reason,
                )
            )

    def _age(self) -> float:
        """Seconds since the session began, by the clock that says more: one stands still while the machine sleeps, the
        other may be set back."""
        began, began_monotonic = self._began_at
        return max(self._sessions.clock() - began, self._sessions.monotonic() - began_monotonic)

    def _check_expiry(self) -> None:
        """End the session at its token's expiry, or at its greatest age; checked every CLOCK_CHECK, because the wall
        clock may be set."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        session, caller = self.session, self._caller
        if session is None or caller is None or session.closed:
            return
        left = caller.identity.expires_at - self._sessions.clock()
        if left <= 0:
            self._sessions.expired += 1
            session.close(GoawayCode.EXPIRED, "the token has expired; log in again")
            return
        left = min(left, self._sessions.max_age - self._age())
        if left <= 0:
            self._sessions.expired += 1
            session.close(
                GoawayCode.EXPIRED,
                f"a session lasts {_duration(self._sessions.max_age)} here at most; start again what ran in it, "
                "and log in again if that is asked for",
            )
            return
        self._timer = asyncio.get_running_loop().call_later(min(left, CLOCK_CHECK), self._check_expiry)


def _duration(seconds: float) -> str:
    """Seconds as people write them: `12 h`."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
