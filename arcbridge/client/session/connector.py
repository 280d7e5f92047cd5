"""Makes one attempt at a session: joins, checks the cluster's CA, shakes hands with the agent.

It keeps no session up and schedules no attempt. Invariant: the cluster's token is sent to an agent of a CA that is
trusted, and to no other.

The token that an agent has revoked will be refused again, until an operator takes the revocation back. So after REVOKED
the client makes no attempt by itself; and for a caller that wants a stream only after a wait that doubles each time, or
at once with another token: with one token there is at most one attempt in HOLD_LONGEST seconds, once the wait is long.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from arcbridge import __version__
from arcbridge.client.credentials.tokens import ClusterToken
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.session.connection import ClusterAccess, Joined, join, shake_hands
from arcbridge.client.session.nearest_relay import NearestRelay
from arcbridge.client.session.refusal import Shown, of_session, raise_user_error
from arcbridge.client.session.restrictions import older_agent, time_is_over
from arcbridge.client.session.resumable_session import ResumableSession, SessionCounters
from arcbridge.client.session.trust import ClusterTrust
from arcbridge.client.session.waiters import Waiters
from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    PermissionRefused,
    RemoteProtocolError,
    SessionEnded,
    Unreachable,
)
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.pki.succession import Succession
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import RESTRICTIONS_FEATURE, UNRESTRICTED
from arcbridge.wire.session import Introduction, Kind, Side

HOLD_FIRST = 5.0
"""Seconds until the first attempt with the same token: an operator who made a mistake takes it back at once."""
HOLD_LONGEST = 60.0
"""Seconds at which the wait stops to grow."""


@dataclass(slots=True)
class RevocationHold:
    """The hold of one cluster's session; `now` is monotonic seconds."""

    error: ArcbridgeError | None = None
    """The error for callers; None while no revocation is known."""
    _token: bytes = b""
    _wait: float = 0.0
    _until: float = 0.0

    def begin(self, error: ArcbridgeError, token: str, now: float) -> None:
        """Hold attempts back: the agent has revoked what `token` (empty: not known) opened, or would have opened."""
        self._wait = min(2 * self._wait or HOLD_FIRST, HOLD_LONGEST)
        self.error, self._token, self._until = error, _digest(token), now + self._wait

    def end(self) -> None:
        """Hold nothing back any more: a session was established."""
        self.error, self._token, self._wait, self._until = None, b"", 0.0, 0.0

    def refusal(self, token: str, now: float) -> ArcbridgeError | None:
        """Return the error for a caller while no attempt may be made with `token`; empty: the token to come is not
        known."""
        if self.error is None or now >= self._until or (token and _digest(token) != self._token):
            return None
        return self.error


def _digest(token: str) -> bytes:
    """Return what is kept of a token, for comparison alone."""
    return hashlib.sha256(token.encode()).digest() if token else b""


class Connector:
    """Makes the sessions to one cluster."""

    def __init__(
        self,
        access: ClusterAccess,
        trust: ClusterTrust,
        *,
        resumption: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.access = access
        self.relays, self.cluster, self.tokens, self._restrictions = access
        self.nearest = NearestRelay(access)
        self._trust = trust
        self.limits = DEFAULT if resumption else Limits(replay=0)
        self._clock = clock
        self.counters = SessionCounters()
        self.revoked = RevocationHold()
        self.waiters = Waiters()
        self._presented = ""
        """The token that the cluster was shown last; what a login or a workload gives is nowhere else to be read."""
        self.sessions: dict[MuxSession, ResumableSession] = {}
        """The sessions that have not ended; one whose handshake is under way is among them."""

    @property
    def shown(self) -> Shown:
        """The token that the cluster is shown, as errors name it."""
        return Shown(self._presented or self.tokens.cluster_at_hand(), self.tokens.cluster_source)

    async def connect(self, handler: BaseHandler, leaving: RelayAccess | None = None) -> ResumableSession:
        """Return a new session, whose events go to `handler`, by another relay than `leaving` where that is possible.

        It may be detached already. Raises ArcbridgeError with a message for the user, also where the session has ended
        or drains since AUTH_OK; one that drains stays among `sessions` until its streams have ended.
        """
        if 0 < self._restrictions.until <= self._clock():
            raise time_is_over(self.cluster)
        if self.revoked.error is not None:
            refusal = self.revoked.refusal(self.tokens.cluster_at_hand(), asyncio.get_running_loop().time())
            if refusal is not None:
                raise refusal
        self.counters.attempts += 1
        attempts_left = len(self.relays)
        await self.nearest.learn()
        while True:
            try:
                joined = await join(self.access, leaving=leaving)
            except PermissionRefused as error:
                if self.revoked.error is not None:
                    raise self.revoked.error from error  # the agent gave the reason, and the relay's refusal has none
                raise
            cas = await self._trusted(joined)
            if cas is None:
                continue
            try:
                resumable = await self._shake_hands(joined._replace(cas=cas), handler)
                if resumable.session.usable or resumable.detached:
                    return resumable
                raise await self._end_behind_auth_ok(resumable)
            except ArcbridgeError as error:
                if not isinstance(error, SessionEnded) or error.code == GoawayCode.CROSSED:
                    self.relays.failed(joined.relay)
                attempts_left -= 1
                if attempts_left <= 0 or not isinstance(error, ConnectionLost):
                    raise_user_error(error, self.cluster, shown=self.shown, session=joined.reply.join_id)
                # The join succeeded and the connection died afterwards: another relay may work at once.

    async def _end_behind_auth_ok(self, resumable: ResumableSession) -> ArcbridgeError:
        """Return why a session takes no new stream whose agent has just accepted the token."""
        if not resumable.session.closed:
            return SessionEnded(GoawayCode.DRAINING, "the agent drains the session")
        error = await resumable.session.wait_ended()
        self.note_revoked(error, resumable.renewal.schedule.sent)
        return error

    def note_revoked(self, error: BaseException, sent: ClusterToken | None) -> None:
        """Hold back from further attempts where the agent has revoked the token that the session sent last."""
        if isinstance(error, SessionEnded) and error.code == GoawayCode.REVOKED:
            token = sent.text if sent is not None else ""
            self.tokens.refused()
            self.revoked.begin(of_session(error, self.cluster), token, asyncio.get_running_loop().time())

    async def _trusted(self, joined: Joined) -> Succession | None:
        """Return the CAs to go on with this join with; None when it was given up to ask the user, who has accepted the
        CA."""
        try:
            if (cas := self._trust.check(self.cluster, joined.cas)) is not None:
                return cas
            if not self._trust.asks:
                return await self._trust.first_time(self.cluster, joined.cas)
        except BaseException:
            joined.close()
            raise
        # The user takes longer to answer than the agent waits: this join is given up, the next one succeeds.
        joined.close()
        await self._trust.first_time(self.cluster, joined.cas)
        return None

    def _is_too_old(self, session: MuxSession, error: BaseException) -> bool:
        """Return whether an agent has refused restrictions because it does not know them."""
        hello = session.peer_hello
        refused = isinstance(error, SessionEnded) and error.code == GoawayCode.UNAUTHENTICATED
        restricted = self._restrictions != UNRESTRICTED
        return restricted and refused and (hello is None or RESTRICTIONS_FEATURE not in hello.features.split())

    async def _shake_hands(self, joined: Joined, handler: BaseHandler) -> ResumableSession:
        """Establish a session over a joined socket whose cluster CA is trusted; owns the socket from here on."""
        session: MuxSession | None = None
        token: ClusterToken | None = None

        async def established() -> None:
            assert session is not None
            self.waiters.begin_auth(session)
            await session.wait_established()

        try:
            token = await self.tokens.cluster()
            self._presented = token.text
            session = MuxSession(
                Side.INITIATOR,
                Kind.SESSION,
                handler,
                limits=self.limits,
                label=joined.reply.join_id,
                introduction=Introduction(software=f"arcbridge {__version__}"),
            )
            resumable = self.sessions[session] = ResumableSession(
                session,
                self.access,
                joined,
                self.counters,
                self._clock,
                lambda cas: self._trust.keep(self.cluster, cas),
            )
            sent = token
            await shake_hands(
                joined,
                self.cluster,
                lambda: session.protocol(lambda certificate: resumable.renewal.auth(sent, certificate)),
                established,
            )
        except BaseException as error:
            too_old = session is not None and self._is_too_old(session, error)
            if isinstance(error, SessionEnded | ConnectionLost | Unreachable | RemoteProtocolError):
                error.session = joined.reply.join_id  # an error of this machine has nothing to do with the session
            self.note_revoked(error, token)
            if session is not None:
                session.abort()
                if (dropped := self.sessions.pop(session, None)) is not None:
                    dropped.stop()  # a try that an event of this flight has called for waits for the handover
            joined.close()
            if too_old:
                raise older_agent(self.cluster) from error
            raise
        finally:
            self.waiters.authenticating = None
        resumable.begin(token)
        return resumable
