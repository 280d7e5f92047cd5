"""Serves sessions: from a joined socket to streams that run as the caller, until the caller's token expires.

Nothing reaches the API server before AUTH is accepted: the session's state machine holds streams back until then. A
session ends at its token's expiry by the wall clock, unless AUTH was renewed with a token of the same subject; a token
of another subject ends it at once. The groups of a renewed token count from the next request; streams that they do not
allow end, to TCP targets and upgraded ones. Of two tokens the one that was issued later counts. However often it is
renewed, a session ends at its greatest age, and at once when its user is revoked (`revocations`).

A session outlives its connection: it is held for two minutes, and resumes over a connection whose caller shows the
session's secret and a token of the same subject (`resume` decides that). Such a connection is unauthenticated first,
like any other; when its right is established the held session takes the connection over. The token's expiry counts
meanwhile. Streams see no event: they stall.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

import structlog

from arcbridge import __version__
from arcbridge.agent.accounts import Account, Accounts
from arcbridge.agent.agent_session import AgentSession
from arcbridge.agent.authenticator import Authenticator
from arcbridge.agent.kube.proxy import KubeProxy
from arcbridge.agent.relief import INTERVAL, AheadRelief, BacklogRelief
from arcbridge.agent.resume import Resumes
from arcbridge.agent.revocations import MAX_REASON, Revocations
from arcbridge.agent.targets import TcpTargets
from arcbridge.errors import ArcbridgeError, ConnectionLost
from arcbridge.identity.proof import NO_PEER, Peer
from arcbridge.mux import memory
from arcbridge.mux.alteration import alteration
from arcbridge.mux.session import MuxSession
from arcbridge.net.fast_tls import fast_tls
from arcbridge.net.session_tls import accept_session
from arcbridge.observe.untrusted_text import clean
from arcbridge.settings.config import SessionConfig
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import RESTRICTIONS_FEATURE
from arcbridge.wire.session import Introduction, Kind, Side, State

if TYPE_CHECKING:
    from arcbridge.agent.actor_accounts import ActorAccount
    from arcbridge.agent.elevation.elevation import Elevation

HANDSHAKE_DEADLINE = 5.0
MAX_SESSIONS = 1000
"""Sessions of one agent process, detached ones included; a join over it is refused before it is dialled."""
MAX_UNAUTHENTICATED = 256
"""Joined connections that have not authenticated yet; each has ten seconds."""
STALLED = 2.0
"""Seconds after which such a connection gives its place to a newcomer when all are taken, unless its token is being
verified. A login takes some round trips, and users without a token for the cluster must not keep out users with one."""
_log = structlog.get_logger("arcbridge.agent")


@dataclass
class AgentSessionCounters:
    """Counters over all sessions of one agent."""

    opened: int = 0
    refused: int = 0
    expired: int = 0
    """Sessions that ended with their token, or at their greatest age."""
    revoked: int = 0
    """Sessions that ended, and AUTHs that were refused, because the user is revoked."""
    upgrades_ended: int = 0
    """Upgraded streams that ended at a renewal that lacks a group, or has another name."""
    resumed: int = 0
    detached_seconds: float = 0.0
    """Seconds that sessions were detached, of all that were resumed or ended detached."""
    moves_asked: int = 0


@dataclass(eq=False, repr=False)
class Sessions:
    """All sessions of one agent. `close()` must be awaited."""

    authenticator: Authenticator
    proxy: KubeProxy
    targets: TcpTargets
    _: KW_ONLY
    instance: str = ""
    limits: Limits = DEFAULT
    accounts: Accounts = field(default_factory=Accounts)
    settings: SessionConfig = field(default_factory=SessionConfig)
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.audit = self.targets.audit
        self.revocations = Revocations(clock=self.clock)
        self.revocations.on_news = self._revocations_changed
        self.elevation: Elevation | None = None
        """Lends groups to users; None: no group is ever lent."""
        self.resumes: Resumes[AgentSession] = Resumes(clock=self.monotonic)
        fast_tls()  # now, at the agent's start, and not while the first session waits
        self.relief = BacklogRelief(memory.backlog)
        self.ahead_relief = AheadRelief()
        self._relief_timer: asyncio.TimerHandle | None = None
        """Runs while there are sessions."""
        self._open: set[AgentSession] = set()
        self._unauthenticated: set[AgentSession] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.counters = AgentSessionCounters()
        self.draining = False
        self._replayed = 0
        self._ending_revoked: asyncio.Handle | None = None
        self._named: dict[str, str] = {}
        """Join ids of sessions that a relay's operator has ended in this turn, with the reason of each."""

    def __len__(self) -> int:
        """Authenticated sessions, with or without a connection."""
        return len(self._open)

    @property
    def restricted(self) -> int:
        """Sessions that gave up rights of their users."""
        return sum(session.restrictions is not None for session in self._open)

    @property
    def detached(self) -> int:
        """Sessions without a connection that may be resumed."""
        return sum(session.detached_at is not None for session in self._open)

    @property
    def streams_wait(self) -> bool:
        """Whether streams wait until their session has a connection again."""
        return any(session.detached_at is not None and session.streams for session in self._open)

    @property
    def replayed_bytes(self) -> int:
        """Bytes sent again after resumptions."""
        return self._replayed + sum(one.session.stats.replayed_bytes for one in self._open if one.session is not None)

    def accepts_connection(self, via: str = "", *, may_come_back: bool = False) -> bool:
        """Return whether another connection may join at the relay `via`: one that may resume a session also where no
        new session may begin."""
        if len(self._unauthenticated) >= MAX_UNAUTHENTICATED and self._giving_way(via) is None:
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
        oldest_ca_pem: str = "",
    ) -> None:
        """Take over a socket joined at the relay `via`; returns when the end-to-end TLS handshake is complete.

        `peer`: what `context` shows, as proofs name it. `oldest_ca_pem`: the oldest CA of the cluster that counts, for
        the client; empty where there was only one. Raises ConnectionLost when the handshake fails; the socket is
        closed then.
        """
        handler = AgentSession(self, join_id, via, peer)
        session = MuxSession(
            Side.ACCEPTOR,
            Kind.SESSION,
            handler,
            limits=self.limits,
            label=join_id,
            introduction=Introduction(self.instance, __version__, oldest_ca_pem, RESTRICTIONS_FEATURE),
        )
        handler.session = session
        if len(self._unauthenticated) >= MAX_UNAUTHENTICATED and (leaves := self._giving_way(via)) is not None:
            leaves.give_way()
        self._unauthenticated.add(handler)
        self._empty.clear()
        handler.handshaking = sock
        try:
            payer = self.accounts.relays.of(via, time.monotonic())
            await accept_session(sock, context, session.protocol(), payer, handshake_deadline=HANDSHAKE_DEADLINE)
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
        self.proxy.warm.change(0)
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
            if session.resumption.possible and session.state is not State.DETACHED:
                session.migration.ask()
                asked += 1
        self.counters.moves_asked += asked
        return asked

    def revoke(self, via: str, message: str) -> None:
        """End the sessions that came through the relay `via`, attached or not: it has revoked the cluster."""
        for handler in [one for one in self._all() if one.via == via]:
            handler.close(GoawayCode.REVOKED, message)

    def end_one(self, join_id: str, reason: str) -> None:
        """End the session that has this join id now, or had it when it began: a relay's operator wants it to end."""
        self._named[join_id] = reason
        self._revocations_changed()

    async def wait_empty(self) -> None:
        """Wait until no session is left."""
        await self._empty.wait()

    async def close(self, code: GoawayCode = GoawayCode.DRAINING, message: str = "the agent has stopped") -> None:
        """End every session at once."""
        handlers = self._all()
        for handler in handlers:
            handler.close(code, message, 1)
        await asyncio.gather(*(handler.finished() for handler in handlers))

    # -- called by the sessions -------------------------------------------------------------------------------

    def admit(self, handler: AgentSession) -> bool:
        """Count a connection whose token was accepted as a new session; False where the limit is reached."""
        if self._full(len(self._open)) and (memory.budget.full or not self.evict_detached()):
            return False
        self._unauthenticated.discard(handler)
        self._open.add(handler)
        self.counters.opened += 1
        if self._relief_timer is None:
            self._relieve()
        return True

    def evict_detached(self, account: Account | ActorAccount | None = None) -> bool:
        """End the session, of one user, of one actor or of all, that has been detached longest, of those without a
        stream; return whether there was one."""
        among = self._open if account is None else [one for one in self._open if one in account.members]
        idle = [one for one in among if one.detached_at is not None and one.streams == 0]
        if not idle:
            return False
        oldest = min(idle, key=lambda one: one.detached_at or 0.0)
        assert oldest.session is not None
        self._open.discard(oldest)
        oldest.session.close(GoawayCode.GONE, "the agent needed its place")
        return True

    def ended(self, handler: AgentSession, error: ArcbridgeError) -> None:
        """Forget a session, or a connection that never became one."""
        if handler.session is not None:
            self._replayed += handler.session.stats.replayed_bytes
            self.resumes.remove(handler.session.resumption.session_id, error)
        self._open.discard(handler)
        self._unauthenticated.discard(handler)
        if not self._open and self._relief_timer is not None:
            self._relief_timer.cancel()
            self._relief_timer = None
        if not self._open and not self._unauthenticated:
            self._empty.set()

    # -- inside -----------------------------------------------------------------------------------------------

    def _relieve(self) -> None:
        """Look once a second whether more waits towards callers, or for readers that stopped, than may."""
        self._relief_timer = None
        now = self.monotonic()
        self.relief.relieve(self._open, now)
        self.ahead_relief.relieve([one.session for one in self._open if one.session is not None], now)
        if self._open:
            self._relief_timer = asyncio.get_running_loop().call_later(INTERVAL, self._relieve)

    def _revocations_changed(self) -> None:
        """End sessions in this turn of the loop, once for all that comes with it: what a relay names may be long."""
        if self._ending_revoked is None:
            self._ending_revoked = asyncio.get_running_loop().call_soon(self._end_revoked)

    def _end_revoked(self) -> None:
        """End the sessions that were named, and those of the users whom the news of the revocations name, attached or
        not."""
        self._ending_revoked = None
        news = self.revocations.take_news()
        named, self._named = self._named, {}
        for handler in list(self._open):
            if found := handler.join_ids & named.keys():
                reason = clean(named[found.pop()], MAX_REASON)
                handler.end(f"the relay's operator has ended this session: {reason}")
                self.counters.revoked += 1
            else:
                handler.end_if_revoked(news)

    def _all(self) -> list[AgentSession]:
        return [*self._open, *self._unauthenticated]

    def _giving_way(self, via: str) -> AgentSession | None:
        """Return the connection that makes room for another one of the relay `via`, None where that one has to wait.

        The oldest of the relay that has most, where that relay keeps as many as `via` has then: one relay whose
        connections never log in keeps no other relay's users out. Else the oldest of `via`, or of relays that have
        more, if it has waited for its login for longer than `STALLED`.
        """
        waiting = sorted((one for one in self._unauthenticated if not one.judged), key=lambda one: one.joined_at)
        counts = Counter(one.via for one in waiting)
        most = max(counts.values(), default=0)
        if most > counts[via] + 1:
            return next(one for one in waiting if counts[one.via] == most)
        oldest = next((one for one in waiting if one.via == via or counts[one.via] > counts[via]), None)
        return None if oldest is None or self.monotonic() - oldest.joined_at < STALLED else oldest

    def _full(self, sessions: int) -> bool:
        return sessions >= MAX_SESSIONS or memory.budget.full
