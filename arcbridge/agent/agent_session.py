"""One session at the agent: from AUTH to its end, over one connection after the other.

It decides when AUTH may be accepted, renews and ends the session with its caller's token, and hands streams to the
Kubernetes proxy and the TCP targets. It does not say how many sessions there may be, nor who comes first: that is
`sessions`. Invariant: nothing reaches the API server before AUTH is accepted, nor after the token has lapsed.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import structlog

from arcbridge import legacy_refusals
from arcbridge.agent.accounts import Limit
from arcbridge.agent.audit import AuditRecord
from arcbridge.agent.audit.record import AuditSubject, RequestOutcome
from arcbridge.agent.authenticator import Authenticated, UnprovedToken
from arcbridge.agent.kube.caller import Caller
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.resume import Claim, ResumeRefusal
from arcbridge.agent.revocations import AccessRevoked, Revocation, covering
from arcbridge.agent.targets import PREFIX
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
from arcbridge.identity.refusal import TokenRefused
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.refusals import NO_REFUSAL, Refusal, RefusalRule
from arcbridge.tasks import report_failure
from arcbridge.units import duration
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.records import Auth, AuthOk, Hello

if TYPE_CHECKING:
    from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions
    from arcbridge.agent.sessions import Sessions

CLOCK_CHECK = 5.0
"""Seconds between two checks of the wall clock: an expired token ends its session at most this much late, also when the
clock was set or the machine slept."""
RESENT_AUTH_GRACE = 30.0
"""Seconds after a resumption in which an AUTH may be one from before the connection was lost: its token may have
expired since then."""
KUBERNETES = "kubernetes"
"""The target of streams to the API server."""
AUTH_OK_ROOM = 3500
"""Bytes of AUTH_OK, whose frame has at most 4 KiB, for the user's name and the list of targets."""

_OTHER = "the session was asked for again with other restrictions than those that it began with"
_OTHER_ACTOR = "the session was asked for again through another actor, or without the one that it began with"
_CODES = (
    (Unauthenticated, GoawayCode.UNAUTHENTICATED),
    (AccessRevoked, GoawayCode.REVOKED),
    (PermissionRefused, GoawayCode.FORBIDDEN),
)
_log = structlog.get_logger("arcbridge.agent")


class AgentSession(BaseHandler):
    """The agent's side of one session, over one connection after the other; or of a connection that resumes one."""

    def __init__(self, sessions: Sessions, join_id: str, via: str, peer: Peer = NO_PEER) -> None:
        self._sessions = sessions
        self._join_id = join_id
        self._label_before = ""
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
        return self.session is None or not self.session.resumption.possible

    @property
    def epoch(self) -> int:
        """The epoch of the present connection."""
        return self.session.resumption.epoch if self.session is not None else 0

    @property
    def streams(self) -> int:
        """Streams that are open."""
        return len(self.session.streams.by_id) if self.session is not None else 0

    @property
    def restrictions(self) -> SessionRestrictions | None:
        """What the session gave up of its user's rights; None: nothing."""
        return self._caller.restrictions if self._caller is not None else None

    @property
    def actor(self) -> str:
        """The program that acts for the session's user; empty: the user alone."""
        return self._caller.identity.actor if self._caller is not None else ""

    @property
    def judged(self) -> bool:
        """Whether a token is being verified now."""
        return self._authenticating is not None and not self._authenticating.done()

    @property
    def join_ids(self) -> set[str]:
        """The join ids under which the session began, of its present connection, and of the one before that: a relay's
        order to end the session may cross its resumption."""
        return {self._join_id, self._label_before, "" if self.session is None else self.session.label} - {""}

    def end(self, sentence: str) -> None:
        """End the session with a sentence for its user, and record that."""
        if self.session is not None and self._caller is not None:
            self._write_audit(self._caller.identity, "session", "cut", sentence)
            self.close(GoawayCode.REVOKED, sentence)

    def close(self, code: GoawayCode, sentence: str, retry_after: int = 0, refusal: Refusal = NO_REFUSAL) -> None:
        """End the session with a sentence for its user, also for what runs in it."""
        session = self.session
        if session is None:
            return
        try:
            if self._caller is not None and not session.closed:
                self._caller.explain_end(sentence)
        finally:
            session.close(code, sentence, retry_after, refusal)

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
            known, now = self._caller, time.monotonic()
            payer = self._sessions.accounts.relays.of(self.via, now) if known is None else known.account.loop_time
            wait = 0.0 if known is not None else payer.held_until - now
            self._authenticating = asyncio.get_running_loop().create_task(
                payer.steps(self._authenticate_pending(session, wait)), name=f"auth-{self._join_id}"
            )
            self._authenticating.add_done_callback(report_failure)

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        caller = self._caller
        if caller is None:  # the state machine holds streams back until AUTH is accepted; this is the second check
            stream.abort(ResetCode.REFUSED)
            return
        now = self._sessions.monotonic()
        limit = caller.account.refuses_stream(now, plain=target.startswith(PREFIX))
        if limit is not None:
            self._report(caller, limit, f"{caller.request_prefix}-{stream.id}-0", target)
            stream.abort(ResetCode.LIMIT)
        elif target == KUBERNETES:
            self._sessions.proxy.serve(stream, caller)
        else:
            self._sessions.targets.serve(stream, target, caller, now)

    def detached(self, session: MuxSession, error: ArcbridgeError) -> None:
        self.detached_at = self._sessions.monotonic()
        if self._caller is not None:
            self._lose_connection(self._caller)
        tell = self._log.warning if isinstance(error, BytesAltered) else self._log.info
        tell("session detached", reason=error.message, streams=self.streams)

    def resumed(self, session: MuxSession) -> None:
        seconds = self._end_detachment()
        if self._caller is not None:
            self._caller.connected_since = self._sessions.monotonic()
        replayed, self._replayed = session.stats.replayed_bytes - self._replayed, session.stats.replayed_bytes
        self._sessions.counters.resumed += 1
        self._log.info(
            "session resumed",
            seconds=round(seconds, 3),
            replayed=replayed,
            streams=self.streams,
            first_session=self._join_id,
            join=session.label,
            epoch=session.resumption.epoch,
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
            self._lose_connection(self._caller)
            self._leave(self._caller)
            self._log.info("session ended", user=self._caller.identity.username, reason=error.message)
        elif isinstance(error, BytesAltered):
            self._log.warning("session refused", reason=error.message)

    def end_streams(self) -> None:
        """Reset all streams in the next turn, with LIMIT: the user may move no more bytes today."""
        if self.session is not None:
            asyncio.get_running_loop().call_soon(self.session.streams.reset_all, ResetCode.LIMIT)

    def hold(self, seconds: float) -> None:
        """Move no payload for a while: the user takes too much of the event loop."""
        if self.session is not None:
            self.session.pacing.hold(seconds)

    def end_if_revoked(self, users: Mapping[str, Revocation]) -> None:
        """End the session, with or without a connection, where its user's token counts no more."""
        if self.session is None or self._caller is None:
            return
        found = covering(users, self._caller.identity)
        if found is not None:
            self._sessions.counters.revoked += 1
            self.end(found.sentence(self._sessions.clock()))

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
        self._sessions.counters.detached_seconds += seconds
        return seconds

    def _crossed(self, session: MuxSession) -> bool:
        """Refuse a client that was joined under another id than this agent: log and audit would say that one user did
        what another one does (docs/threats.md#B2). Older clients do not say theirs."""
        hello = session.peer_hello
        if hello is None or hello.join_id in ("", self._join_id):
            return False
        self._sessions.counters.refused += 1
        reason = "the client was joined under another id than this agent: the relay has crossed two joins"
        self._log.warning("session refused", reason=reason, connection=self.via)
        session.close(GoawayCode.CROSSED, reason)
        return True

    async def _authenticate_pending(self, session: MuxSession, wait: float) -> None:
        if wait > 0.0:
            await asyncio.sleep(wait)
        while (auth := self._pending_auth) is not None:
            self._pending_auth = None
            try:
                found = await self._sessions.authenticator.authenticate(auth, self.peer)
                if found.identity.expires_at <= self._sessions.clock():
                    raise TokenRefused(RefusalRule.TOKEN_EXP, "the token has expired; log in again")
                if self._caller is None or found.identity.supersedes(self._caller.identity):
                    # A token from before a loss that is sent again changes nothing, revoked or not.
                    self._sessions.revocations.check(found.identity)
            except ArcbridgeError as error:
                verb = "authenticate" if session.resumption.resuming is None else "resume"
                over = session.closed or self._refuse(session, error)
                # No record of a token without proof while the session goes on: an honest client sends such an AUTH
                # again after a loss, and one client could write any number. Else the token may be stolen: its owner's
                # name is worth a record.
                if isinstance(error, AccessRevoked) or (over and isinstance(error, UnprovedToken)):
                    self._write_audit(error.identity, verb, "refused", error.message)
                if over:
                    return
                continue
            if session.closed:
                return
            if self._caller is not None:
                taken = self._renew(session, self._caller, found)
            elif (hello := session.resumption.resuming) is not None:
                taken = self._resume_held(session, hello, found)
            else:
                taken = self._accept(session, found)
            if not taken:
                return

    def _refuse(self, session: MuxSession, error: ArcbridgeError) -> bool:
        """Refuse an AUTH; answers whether that ends the session."""
        code = next((code for kind, code in _CODES if isinstance(error, kind)), GoawayCode.UNAVAILABLE)
        if code is GoawayCode.REVOKED:
            self._sessions.counters.revoked += 1
        if self._caller is not None:
            again = self._resumed_at is not None and self._sessions.monotonic() - self._resumed_at < RESENT_AUTH_GRACE
            if isinstance(error, UnprovedToken) and error.identity.subject != self._caller.identity.subject:
                again = False  # no client has sent the token of another user before
            if code is GoawayCode.UNAVAILABLE or (again and code is GoawayCode.UNAUTHENTICATED):
                # A renewal that cannot be verified now, or was sent before the loss of the connection and has expired
                # since, changes nothing: the session's own token is valid until it expires.
                self._log.warning("renewal changed nothing", reason=error.message, **error.log_fields())
                return False
        self._sessions.counters.refused += 1
        self._log.warning("session refused", reason=error.message, **error.log_fields())
        self.close(code, legacy_refusals.with_rule(error.message, error.refusal), refusal=error.refusal)
        return True

    def _accept(self, session: MuxSession, found: Authenticated) -> bool:
        """Open a new session for as long as its token lasts; answers whether it is open."""
        identity, sessions = found.identity, self._sessions
        account = sessions.accounts.enter(identity, self)
        caller = Caller(self._join_id, identity, account, found.restrictions, found.token_mode, found.proved_key)
        if identity.actor:
            caller.actor = sessions.accounts.enter_actor(identity.actor, self)
        for one, limit in ((account, Limit.SESSIONS), (caller.actor, Limit.ACTOR_SESSIONS)):
            if one is not None and one.has_too_many_sessions() and not sessions.evict_detached(one):
                sessions.counters.refused += 1
                self._report(caller, limit)
                session.close(GoawayCode.LIMIT, account.explain(limit).message)
                self._leave(caller)
                return False
        if not sessions.admit(self):
            sessions.counters.refused += 1
            self._log.warning("session refused", reason="the agent is at a limit", user=identity.username)
            session.close(GoawayCode.UNAVAILABLE, "the agent has as many sessions as it may: try again later")
            self._leave(caller)
            return False
        self._caller = caller
        if sessions.elevation is not None:
            sessions.elevation.enter(caller)
        session.pacing.pacer, session.payer = account, account.loop_time
        session.backlog.move(account.waiting)
        session.ahead.move(account.ahead)
        session.streams.share(account.promised, account.churn)
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
            **({"actor": identity.actor} if identity.actor else {}),
            **({} if found.restrictions is None else {"restricted": " ".join(found.restrictions.words)}),
        )
        session_id, secret = os.urandom(16), os.urandom(16)
        session.accept_auth(self._auth_ok(session_id, secret, caller))
        if session.resumption.possible:
            self._sessions.resumes.add(session_id, Claim(secret, identity.subject, found.token_mode), self)
        self._check_expiry()
        if self._sessions.draining:
            self.send_goaway()
        return not session.closed

    def _renew(self, session: MuxSession, caller: Caller, found: Authenticated) -> bool:
        """Renew the session's token; answers whether the session goes on."""
        if found.identity.subject != caller.identity.subject or found.token_mode != caller.token_mode:
            self._log.warning("session refused", reason="renewed with the token of another subject")
            self.close(GoawayCode.FORBIDDEN, "the session was renewed with a token of another user")
            return False
        if found.identity.actor != caller.identity.actor:
            self._log.warning("session refused", reason="renewed with the token of another actor")
            self.close(GoawayCode.FORBIDDEN, _OTHER_ACTOR)
            return False
        if found.restrictions != caller.restrictions:
            self._log.warning("session refused", reason="renewed with other restrictions")
            self.close(GoawayCode.FORBIDDEN, _OTHER, refusal=Refusal(RefusalRule.RESTRICTED_UNKNOWN))
            return False
        before = _adopt_newer(caller, found)
        caller.tokens.add(found.token_digest)
        session.accept_auth(self._auth_ok(session.resumption.session_id, session.resumption.secret, caller))
        self._end_disallowed(caller, before)
        self._check_expiry()
        return True

    def _end_disallowed(self, caller: Caller, before: Identity) -> None:
        """Reset the streams that the identity from before a renewal was allowed, and the present one may not be."""
        if caller.identity.keeps(before):
            return
        self._sessions.targets.end_disallowed(caller)
        if self._sessions.settings.end_upgraded_streams:
            reason = "the token was renewed with fewer groups, or with another name"
            ended = caller.end_upgraded(reason)
            self._sessions.counters.upgrades_ended += ended
            if ended:
                self._log.info("streams cut off", user=caller.identity.username, reason=reason, streams=ended)

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
            raise RequestRefusal(401, error.message, refusal=error.refusal) from error
        except (Unauthenticated, PermissionRefused):
            return False
        except ArcbridgeError as error:
            raise RequestRefusal(503, error.message) from error
        own = caller.identity
        return (identity.subject, identity.actor) == (own.subject, own.actor)

    def _auth_ok(self, session_id: bytes, secret: bytes, caller: Caller) -> AuthOk:
        restrictions, ends = caller.restrictions, caller.identity.expires_at
        tcp = self._sessions.targets.open_to(caller.identity)
        if restrictions is not None:
            ends, tcp = min(ends, restrictions.until or ends), [] if restrictions.judges else tcp
        left = max(1, int(ends - self._sessions.clock()))
        name = caller.identity.username
        targets = " ".join((KUBERNETES, *tcp))
        if len(targets) + len(name.encode()) > AUTH_OK_ROOM:
            targets = ""
        return AuthOk(session_id=session_id, resume_secret=secret, subject=name, expires_in=left, targets=targets)

    def _resume_held(self, session: MuxSession, hello: Hello, found: Authenticated) -> bool:
        """Let the held session that this HELLO names take the connection over; this handler ends either way."""
        resumes = self._sessions.resumes
        held = resumes.judge(hello, found.identity.subject, found.token_mode)
        if not isinstance(held, ResumeRefusal) and held.restrictions != found.restrictions:
            held = resumes.refuse("restrictions", GoawayCode.FORBIDDEN, _OTHER)
        if not isinstance(held, ResumeRefusal) and held.actor != found.identity.actor:
            held = resumes.refuse("actor", GoawayCode.FORBIDDEN, _OTHER_ACTOR)
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
            self._log.warning("resumption refused", reason=held.check, user=found.identity.username)
        if held.check in ("secret", "subject", "restrictions", "actor"):
            # A caller with a valid token tried to resume a session of another user, or with more rights than it has.
            self._write_audit(found.identity, "resume", "refused", f"wrong {held.check}")
        if not session.closed:
            session.close(held.code, held.message, refusal=held.refusal)
        return False

    def take_over(self, carrier: AgentSession, connection: MuxSession, found: Authenticated) -> None:
        """Resume over the connection of `carrier`, whose right to it `resume` has established.

        Raises RemoteProtocolError when the two ends disagree about what was sent; this session is over then.
        """
        session, caller = self.session, self._caller
        assert session is not None, "only sessions that were accepted can be found"
        assert caller is not None
        before = _adopt_newer(caller, found)
        caller.tokens.add(found.token_digest)
        self.via, self.joined_at, self.peer = carrier.via, carrier.joined_at, carrier.peer
        self._resumed_at = self._sessions.monotonic()
        ok = self._auth_ok(session.resumption.session_id, session.resumption.secret, caller)
        self._label_before = session.label
        session.migration.take_over(connection, ok)
        self._end_disallowed(caller, before)
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
        record = AuditRecord(
            request=request or f"{caller.request_prefix}-0-0",
            subject=caller.subject,
            verb="open" if target else "limit",
            target=target,
            outcome=RequestOutcome.REFUSED,
            limit=limit,
            omitted=omitted,
            reason=reason,
        )
        self._sessions.audit.write(record)

    def _lose_connection(self, caller: Caller) -> None:
        """Note that the caller can begin no request for now."""
        caller.connected_since = math.inf
        self._sessions.proxy.warm.end(caller)

    def _leave(self, caller: Caller) -> None:
        """End the session's part in its user's account; the last one records the refusals that no record counts yet."""
        if self._sessions.elevation is not None:
            self._sessions.elevation.leave(caller)
        caller.account.leave(self)
        if caller.actor is not None:
            caller.actor.leave(self)
        if not caller.account.members:
            for limit, omitted in caller.account.take_omitted().items():
                self._record_limit(caller, limit, omitted, "the user's last session has ended")

    def _write_audit(self, identity: Identity, verb: str, outcome: str, reason: str) -> None:
        """Record what happened to the session as a whole."""
        bound = identity.binding.kind.value
        subject = AuditSubject(self._join_id, identity.username, len(identity.groups), bound, actor=identity.actor)
        if self._caller is not None:
            subject = self._caller.audit_subject(identity)
        record = AuditRecord(
            request=f"{self._join_id}-{os.urandom(8).hex()}-0-0",
            subject=subject,
            verb=verb,
            outcome=RequestOutcome(outcome),
            reason=reason,
        )
        self._sessions.audit.write(record)

    def _age(self) -> float:
        """Return the seconds since the session began, by the clock that says more: one stands still while the machine
        sleeps, the other may be set back."""
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
            self._sessions.counters.expired += 1
            self.close(GoawayCode.EXPIRED, "the token has expired; log in again")
            return
        if caller.restrictions is not None and caller.restrictions.until:
            left = min(left, caller.restrictions.until - self._sessions.clock())
            if left <= 0:
                self._sessions.counters.expired += 1
                rule = Refusal(RefusalRule.RESTRICTED_UNTIL)
                self.close(GoawayCode.EXPIRED, "the time of this restricted session is over", refusal=rule)
                return
        left = min(left, self._sessions.settings.max_age - self._age())
        if left <= 0:
            self._sessions.counters.expired += 1
            self.close(
                GoawayCode.EXPIRED,
                f"a session lasts {duration(self._sessions.settings.max_age)} here at most; start again what ran in "
                "it, and log in again if that is asked for",
                refusal=Refusal(RefusalRule.SESSION_AGE),
            )
            return
        self._timer = asyncio.get_running_loop().call_later(min(left, CLOCK_CHECK), self._check_expiry)


def _adopt_newer(caller: Caller, found: Authenticated) -> Identity:
    """Adopt the identity of the token that was issued later: one from before a loss may be replayed behind a newer
    one (docs/threats.md#S10), and a user who lost a group keeps it no longer than until the renewal.

    Answers the identity from before.
    """
    before = caller.identity
    if found.identity.supersedes(caller.identity):
        caller.adopt(found.identity, found.proved_key)
        caller.account.adopt(found.identity)
    return before
