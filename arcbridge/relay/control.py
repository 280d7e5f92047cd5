"""An agent's control connection, from its TLS handshake to its end.

The certificate is the only thing believed: TLS has verified it under the relay's CA before the first byte of HELLO,
its URI names the cluster, and the registry says whether that cluster is still welcome. The instance id in HELLO tells
the pods of one cluster apart and decides nothing across clusters.

Handshakes begin at a bounded rate. When a relay comes back, all its agents come at once, and a full handshake with two
signatures costs both ends more than anything else here: without a bound the handshakes would take the whole loop, and
the connections that wait longest would give up just before their turn. A connection that would wait for longer than
`LONGEST_WAIT` is refused at once, and the agent's own jitter brings it back later.

A turn is no reward for strangers: an address from which too many handshakes came to nothing has a turn only while no
other connection waits for one. So a flood without certificates takes what is left over, and its neighbours behind the
same address are not shut out.

Where all places are taken, the cluster that holds most gives one of its own to a cluster that has fewer
(`agent_slots`).

Each agent is told which users' logins are revoked: all of them when its connection begins, each change later
(docs/protocol.md, "Revocations"). While the relay does not know yet, it says nothing, and the agent keeps what it knew.

The newer of two connections of one instance id stays, because mostly the older one is dead and has not been noticed
(docs/threats.md#E10). Where two processes have one id (a machine that was copied with its memory) each would replace
the other for ever; so an instance that has just replaced a connection cannot be replaced for `SETTLE` seconds.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from functools import partial
from typing import Final

import structlog

from arcbridge.errors import ArcbridgeError, ConnectionLost, EnrolmentRefused, JoinRefused, StateError
from arcbridge.limiters import KeyedTokenBucket, TokenBucket
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.address import source_of
from arcbridge.net.join import JoinCode
from arcbridge.net.sockets import reset
from arcbridge.net.tls import ALPN_CONTROL
from arcbridge.net.tlspipe import HANDSHAKE_DEADLINE
from arcbridge.net.tlstransport import accepted_tls
from arcbridge.observe.untrusted_text import printable
from arcbridge.pki.authority import agent_ca_pin, agent_cluster, agent_expiry, check_ca_certificate
from arcbridge.pki.pins import pin_of, same_pin
from arcbridge.relay.admission import Purpose, Ticket
from arcbridge.relay.agent_slots import AgentSlots
from arcbridge.relay.audit.log import RelayAudit
from arcbridge.relay.audit.record import Actor
from arcbridge.relay.cluster_reports import read_report
from arcbridge.relay.counters import Counters
from arcbridge.relay.fleet.base import AgentReport, Fleet, Lost, lost_agent
from arcbridge.relay.ledger import Intake, LedgerBook
from arcbridge.relay.registry.base import (
    REVOKED,
    ClusterRecord,
    ForeignCa,
    Registry,
    RegistryUnavailable,
    UserRevocation,
    admit,
    follow_cluster_ca,
)
from arcbridge.relay.tcp_state import has_ended
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.ledger import FEATURE, frames
from arcbridge.wire.records import CaSuccession, Dial, Goaway, Hello, Ledger, Revoke, Status
from arcbridge.wire.session import Kind, Side

HELLO_DEADLINE: Final = 10.0
RETURN_DEADLINE: Final = 10.0
"""Seconds for an agent to begin to give back what it keeps of the ledger, and for each further `RETURN_LEAST` of it."""
RETURN_RETRY: Final = 5
"""Seconds after which an agent may try again whose ledger did not arrive."""
RETURN_LEAST: Final = 16 * 1024
"""Bytes that are progress: 13 kbit/s, so an agent on a slow line gives back a whole ledger, and one that sends nothing
more is known by its silence."""
MAX_DIALS: Final = 64
"""Dials that wait for one agent's status: it would refuse more."""
FULL: Final = "this relay holds all the agents it may"
FULL_RETRY: Final = 60
"""Seconds after which an agent may ask again at a relay that holds all it may: another relay is the better choice."""
BURST: Final = 50
"""Handshakes at once after a pause: a small installation's agents need not wait at all."""
SETTLE: Final = 10.0
"""Seconds for which an instance that has just replaced another cannot be replaced. An agent that lost its connection
in silence needs 25 to notice, so it does not come twice in less."""
INSTANCES: Final = 4096
"""Instances whose last replacement is remembered."""
FAILURES: Final = 20
"""Handshakes of one address that may come to nothing at once before it has its turns after all others."""
FAILURES_RATE: Final = 0.5
"""Such handshakes per second that are forgotten."""
SOURCES: Final = 4096
"""Addresses whose failures are counted."""
LONGEST_WAIT: Final = 1.5
"""Seconds that a connection waits for its handshake: an agent gives the whole of it 5, and after 2 it tries another
relay beside, so that a longer queue would serve many agents twice."""
LAPSED_MARGIN: Final = 30.0
"""Seconds, once to twice, for which a connection outlives its certificate: for clocks that differ, and because the
agents of one cluster share a certificate and should not come back all at once."""
RETRY_AFTER: Final = 1
"""Seconds after which an agent may try a relay again that is going away: an idle one is back within that."""
ANNOUNCEMENTS: Final = 4
"""Announcements of one agent that wait; each has at most 16 KiB."""
FOLLOW_PAUSE: Final = 2.0
"""Seconds between two of them that are judged: each may cost a millisecond of signatures."""
LONGEST_PAUSE: Final = 300.0
"""Seconds between two that change something, of an agent that announces one after the other: each is a durable write
and a record."""
ANNOUNCED: Final = 3
"""An agent is told of a step of the relay's rotation each time so many might come anew (`limits.agents_per_second`): it
renews within half a minute, which costs the relay a connection, two signatures and a durable write."""
LEDGER_RATE: Final = 16 * 1024 * 1024
"""Bytes per second of ledgers that are given anew then: all of them wait in memory for agents that read slowly."""
_MAX_INSTANCE: Final = 128
_UNREGISTER_DEADLINE: Final = 0.5
"""Of the engine, at the beginning of a drain; one that does not answer must not hold it up."""

log = structlog.get_logger("arcbridge.relay")


class ControlConnection(BaseHandler):
    """One registered agent; a `fleet.base.AgentLink`."""

    def __init__(
        self,
        cluster: str,
        intake: Intake | None = None,
        reported: Callable[[ControlConnection], None] = lambda link: None,
    ) -> None:
        """`reported` is called with each report, and when the agent begins to drain, while the connection is registered
        or is about to be."""
        self.reported = reported
        self.cluster = cluster
        self.intake = intake
        """What the agent gives back of the ledger; None: this process has none."""
        self.instance = ""
        self.version = ""
        self.since = time.time()
        self.draining = False
        self.report = AgentReport()
        """What the agent has reported last."""
        self.lapses = math.inf
        """When this connection is to be made again with a newer certificate, unix seconds."""
        self.announced: list[CaSuccession] = []
        """What the agent has announced of its cluster's CAs and is not judged yet, the oldest first."""
        self.on_announced: Callable[[], None] | None = None
        """Called when there is more of that, once the agent is admitted."""
        self.following: asyncio.Task[None] | None = None
        """Judges that; None: there was none yet. Agents announce once a year, and a task takes a kilobyte."""
        self.follow_pause = FOLLOW_PAUSE
        """Seconds between two that are judged."""
        self.introduced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the agent has announced these, or has begun to report: an agent announces first."""
        self.session: MuxSession | None = None
        self._dials: dict[str, asyncio.Future[Status]] = {}

    @property
    def pending(self) -> int:
        return len(self._dials)

    @property
    def names(self) -> dict[str, str]:
        """The fields of a line in the log. A logger that is bound to them would stay as long as the agent does."""
        return {"cluster": self.cluster, "connection": self.instance}

    async def dial(self, dial: Dial) -> Status:
        session = self.session
        if session is None or session.closed:
            raise lost_agent(self.cluster)
        if len(self._dials) >= MAX_DIALS:
            raise JoinRefused(
                JoinCode.OVERLOADED, f"the agent of cluster {self.cluster} has too many requests waiting", retry_after=2
            )
        answer: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._dials[dial.token] = answer
        try:
            session.send(dial)
            status = await answer
        finally:
            self._dials.pop(dial.token, None)
        if status.code:
            reason = printable(status.message, 200) or "no reason given"
            raise JoinRefused(
                JoinCode.AGENT_REFUSED, f"the agent of cluster {self.cluster} refused: {reason}", retry_after=5
            )
        return status

    def tell(self, records: Iterable[Revoke | Ledger | CaSuccession]) -> None:
        """Tell the agent of users, or of the relay's CAs; one that is older than a frame does not know it, and skips
        it."""
        if self.session is not None and not self.session.closed:
            for record in records:
                self.session.send(record)

    def keep(self, book: LedgerBook, fresh: Iterable[bytes] | None = None) -> int:
        """Have the agent keep these entries of the ledger, or all of it where it holds something else; return how many
        bytes of them were sent."""
        if self.intake is None or not self.intake.digest or self.intake.digest == book.digest:
            return 0
        sent = list(book.frames() if fresh is None else frames(fresh))
        self.tell(sent)
        self.intake.digest = book.digest
        return sum(len(one.entries) for one in sent)

    def replaced(self) -> None:
        self.leave(GoawayCode.REPLACED, "another agent with the same instance id has connected", int(SETTLE))

    def leave(self, code: GoawayCode, message: str, retry_after: int = 0) -> None:
        """End the connection with a reason; its dials fail."""
        self.draining = True
        if self.session is not None and not self.session.closed:
            self.session.close(code, message, retry_after)

    # -- the session's callbacks -----------------------------------------------------------------------------------

    def status_received(self, session: MuxSession, status: Status) -> None:
        if not status.token:
            self.report = read_report(status)
            self.reported(self)
            self._introduce()
            return
        answer = self._dials.get(status.token)
        # A status that comes late, twice, or for a token that was never sent changes nothing.
        if answer is not None and not answer.done():
            answer.set_result(status)

    def ledger_received(self, session: MuxSession, ledger: Ledger) -> None:
        if self.intake is not None and (question := self.intake.receive(ledger)) is not None:
            session.send(question)

    def succession_received(self, session: MuxSession, succession: CaSuccession) -> None:
        if len(self.announced) < ANNOUNCEMENTS:  # an agent announces one step of a rotation, days apart
            self.announced.append(succession)
        self._introduce()
        if self.on_announced is not None:
            self.on_announced()

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        self.draining = True
        self.reported(self)  # other workers of this relay must not ask it any more

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        self.draining = True
        self._introduce()
        if self.intake is not None:
            self.intake.done.cancel()
        for answer in self._dials.values():
            if not answer.done():
                answer.set_exception(lost_agent(self.cluster))

    def _introduce(self) -> None:
        if not self.introduced.done():
            self.introduced.set_result(None)


class ControlAcceptor:
    """Makes the sessions of the control connections that come: TLS and frames over a socket. A simulation has another
    one."""

    def __init__(self, context: Callable[[], ssl.SSLContext]) -> None:
        self._context = context

    def make_session(self, link: ControlConnection) -> MuxSession:
        """Return the session of a link, which has no connection yet."""
        return MuxSession(Side.ACCEPTOR, Kind.CONTROL, link)

    async def secure(self, session: MuxSession, sock: socket.socket, ticket: Ticket) -> asyncio.Transport:
        """Make TLS over the socket, which the address of `ticket` pays for, and give it to the session. Raises
        `OSError`, `TimeoutError`."""
        # Our own transport reads through the process's one buffer. The loop's TLS has a buffer of 256 KiB for each
        # connection, of which an agent that is idle for days keeps two pages.
        payer, deadline = ticket.loop_time, HANDSHAKE_DEADLINE
        transport = await accepted_tls(sock, self._context(), session.protocol(), deadline=deadline, payer=payer)
        transport.payer = None
        return transport


@dataclass(eq=False, repr=False)
class ControlServer:
    """Accepts control connections; `serve` is the listener's handler for control connections."""

    context: Callable[[], ssl.SSLContext]
    fleet: Fleet
    registry: Registry
    counters: Counters
    limits: InitVar[RelayLimitsConfig]
    _: KW_ONLY
    audit: RelayAudit = field(default_factory=lambda: RelayAudit(""))
    """Where adoptions are recorded."""
    cas: Callable[[], CaSuccession | None] = lambda: None
    """The relay's CAs as agents are told of them; None: there was no rotation."""
    clock: Callable[[], float] = time.monotonic
    acceptor: ControlAcceptor | None = None

    def __post_init__(self, limits: RelayLimitsConfig) -> None:
        self._acceptor = self.acceptor or ControlAcceptor(self.context)
        self._open: AgentSlots[ControlConnection] = AgentSlots()
        self._instances: Counter[tuple[str, str]] = Counter()
        """How many connections of each (cluster, instance) are among them: mostly one."""
        self._handshakes = TokenBucket(BURST, limits.agents_per_second)
        self._refusals = TokenBucket(1, 1)
        """Handshakes that are made only to say that there is no turn."""
        self.change_limits(limits)
        self._failures: KeyedTokenBucket[str] = KeyedTokenBucket(FAILURES, FAILURES_RATE, size=SOURCES)
        """Handshakes that came to nothing, by address."""
        self.waiting = 0
        """Connections that wait for their turn."""
        self._noted: KeyedTokenBucket[tuple[str, str]] = KeyedTokenBucket(1, 1, size=INSTANCES)
        """Clusters, each with a version of its agents, that were noted as seen."""
        self._replacements: KeyedTokenBucket[tuple[str, str]] = KeyedTokenBucket(1, 1 / SETTLE, size=INSTANCES)
        """Replacements of a connection, by (cluster, instance)."""
        self._leaving = ""
        self._users: Mapping[str, UserRevocation] | None = None
        """Users whose logins are revoked, as the agents were told; None: they were told nothing yet."""
        self.book: LedgerBook | None = None
        """What agents keep for the case that the registry is lost."""
        self.on_returned: Callable[[str, Intake], Awaitable[None]] | None = None
        """Takes what an agent of this cluster has given back, and refuses it where that revokes it; set with `book`."""
        self.recovering = False
        """Whether revocations may be missing: what an agent has been told is not voided before it was given back."""
        self._uninformed: dict[ControlConnection, None] = {}
        """Agents that have not been told of the last step of a rotation."""
        self._announcing: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._open)

    def reports(self) -> Iterator[tuple[str, AgentReport]]:
        """Yield the cluster and the report of each agent that is connected here and stays."""
        return ((link.cluster, link.report) for link in self._open if not link.draining)

    def heard(self) -> set[str]:
        """Return the clusters of which a connected agent has given back all that it keeps of the ledger."""
        return {link.cluster for link in self._open if link.intake is not None and link.intake.complete}

    async def serve(self, sock: socket.socket, ticket: Ticket) -> None:
        """Serve one connection: its turn, the handshake, admission, registration, and then its life."""
        in_turn = await self._turn(sock, ticket)
        if in_turn is None:
            return
        intake = None if self.book is None else Intake(self.book, time.time)
        link = ControlConnection("", intake, self.fleet.reported)
        session = self._acceptor.make_session(link)
        link.session = session
        try:
            transport = await self._acceptor.secure(session, sock, ticket)
        except (OSError, TimeoutError) as error:
            self.counters.rejected["handshake"] += 1
            self._failed(ticket)
            log.info("control connection refused", source=ticket.address, reason=_reason(error))
            session.abort(ConnectionLost("the TLS handshake failed"))
            sock.close()
            return
        except BaseException:
            # The relay is stopping, or the handshake has stalled and has to make room.
            self._failed(ticket)
            session.abort(ConnectionLost("the relay closed the connection during its handshake"))
            reset(sock)
            raise
        try:
            if not in_turn:
                backlog = self._handshakes.wait(self.clock())
                retry_after = 1 + int(backlog * (1 + random.random()))
                session.close(GoawayCode.LIMIT, "too many agents come at once: this one comes later", retry_after)
                return
            if not await self._admit(link, session, transport.get_extra_info("ssl_object"), ticket):
                return
            ticket.leave()
            session.forget_cluster_ca()
            await self._live(link, session)
        finally:
            if not session.closed:
                session.abort(ConnectionLost("the relay closed the connection"))

    def change_limits(self, limits: RelayLimitsConfig) -> None:
        """Take so many agents from now on; none that is connected is cut."""
        now = self.clock()
        self._most = limits.agents
        self._pause = ANNOUNCED / limits.agents_per_second
        self._handshakes.change(now, BURST, limits.agents_per_second)
        self._refusals.change(now, 1, max(limits.agents_per_second / 10, 1.0))

    async def drain(self, message: str) -> None:
        """Take no dial any more; send GOAWAY(DRAINING) to every agent, and to those that come from now on."""
        self._leaving = message
        links = list(self._open)
        for link in links:
            link.draining = True
        # Before the GOAWAYs: another relay of the fleet must not count on an agent that is about to leave.
        leaving = [asyncio.ensure_future(self.fleet.drain())]
        leaving += [asyncio.ensure_future(self.fleet.unregister(link)) for link in links]
        await asyncio.wait(leaving, timeout=_UNREGISTER_DEADLINE)
        for link in links:
            if link.session is not None and not link.session.closed:
                link.session.goaway(GoawayCode.DRAINING, message, RETRY_AFTER)

    def close(self) -> None:
        """End the drain: close the connections that are left."""
        if self._announcing is not None:
            self._announcing.cancel()
        for link in self._open:
            link.leave(GoawayCode.DRAINING, self._leaving or "this relay has stopped", RETRY_AFTER)

    def revoke(self, clusters: frozenset[str]) -> None:
        """Cut the agents of these clusters."""
        for link in [link for link in self._open if link.cluster in clusters]:
            log.warning("agent cut off", cluster=link.cluster, connection=link.instance, reason="revoked")
            link.leave(GoawayCode.REVOKED, "this cluster is revoked: the relay's operator has to restore it first")

    def tell_users(self, users: Mapping[str, UserRevocation] | None) -> None:
        """Tell the agents what has changed of the users whose logins are revoked; None: that is not known yet."""
        if users is None or users is self._users:
            return
        changes = list(_all_users(users) if self._users is None else _changes(self._users, users))
        self._users = users
        for link in self._open:
            link.tell(changes)

    def share_ledger(self, fresh: Sequence[bytes]) -> None:
        """Have the agents keep the entries that are new."""
        if self.book is not None:
            for link in self._open:
                if link not in self._uninformed:
                    link.keep(self.book, fresh or None)

    def announce(self) -> None:
        """Tell every agent of the relay's CAs, which were rotated, and have it keep the ledger as it is sealed now: one
        after the other, for each of them then renews its certificate."""
        self._uninformed = dict.fromkeys(self._open)
        if self._announcing is None or self._announcing.done():
            self._announcing = asyncio.get_running_loop().create_task(self._announce(), name="announce-cas")

    async def _announce(self) -> None:
        while self._uninformed:
            link = next(iter(self._uninformed))
            del self._uninformed[link]
            if (cas := self.cas()) is not None:
                link.tell([cas])
            size = 0 if self.book is None else link.keep(self.book)
            await asyncio.sleep(max(self._pause, size / LEDGER_RATE))

    def end_sessions(self, lost: Lost) -> None:
        """Have the agents of a cluster end the sessions of a user who has lost the right to it.

        What they are told of the user is taken back in the same breath, down to what is revoked besides: it ends what
        runs, leaves nothing behind, and does not stand in the way of a right that the policy gives again.
        """
        if lost.session:
            self._tell_cluster(lost.cluster, [Revoke(reason=lost.reason, session=lost.session)])
            return
        if self._users is None:
            return
        told = []
        for name in dict.fromkeys(filter(None, (lost.username, lost.subject))):
            held = self._users.get(name)
            told.append(Revoke(name, lost.before, reason=lost.reason))
            told.append(Revoke(name) if held is None else Revoke(name, held.before, reason=held.reason))
        self._tell_cluster(lost.cluster, told)

    def _tell_cluster(self, cluster: str, told: Sequence[Revoke]) -> None:
        for link in self._open:
            if link.cluster == cluster:
                link.tell(told)

    def expire(self, now: float) -> None:
        """End the connections whose certificate has lapsed: the agent has a newer one, or is no agent any more."""
        for link in [link for link in self._open if link.lapses <= now]:
            log.info(
                "agent has to come again", cluster=link.cluster, connection=link.instance, reason="certificate lapsed"
            )
            link.leave(GoawayCode.EXPIRED, "the certificate of this connection has lapsed: come with the renewed one")

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _turn(self, sock: socket.socket, ticket: Ticket) -> bool | None:
        """Wait for this connection's turn. Return false when it has none and may be told so, None when it is closed."""
        now = self.clock()
        last_in_line = self._failures.wait(source_of(ticket.address), now) > 0
        wait = self._handshakes.reserve(now, 0.0 if last_in_line else LONGEST_WAIT)
        if wait is None:
            self.counters.agents_paced += 1
            if self._refusals.reserve(now) is not None:
                return False
            # Telling it costs the handshake that there is no time for. The agent's own jitter brings it back.
            reset(sock)
            return None
        if wait:
            # It may wait for longer than strangers may otherwise, and in greater number: the rate bounds it.
            ticket.set_aside()
            self.waiting += 1
            try:
                await asyncio.sleep(wait)
            except BaseException:
                reset(sock)
                raise
            finally:
                self.waiting -= 1
            if has_ended(sock):
                reset(sock)
                return None
            # From here on it waits for its peer, as any other: handshakes that stall are bounded by the places.
            if ticket.becomes(Purpose.CONTROL):
                self.counters.agents_paced += 1
                reset(sock)
                return None
        return True

    async def _admit(
        self, link: ControlConnection, session: MuxSession, tls: ssl.SSLObject | None, ticket: Ticket
    ) -> bool:
        """Return whether the agent may stay; otherwise it has been told why."""
        certificate = None if tls is None else tls.getpeercert(binary_form=True)
        if tls is None or certificate is None or tls.selected_alpn_protocol() != ALPN_CONTROL:
            # The peek promised this protocol and the handshake made another one (docs/threats.md#J13).
            self._failed(ticket)
            self._refused(ticket, "", "the handshake is not that of a control connection")
            session.abort(ConnectionLost("not a control connection"))
            return False
        try:
            link.cluster = agent_cluster(certificate)
            link.lapses = agent_expiry(certificate) + LAPSED_MARGIN * (1 + random.random())
            ticket.works()
            record = await self.registry.cluster(link.cluster)
            adoptable = record is None and agent_ca_pin(certificate) != ""
            foreign = not adoptable and _is_foreign(record, certificate)
            ticket.waits()
            if not await self._introduced(link, session, ticket):
                return False
            if foreign:
                await self._admit_follower(link, certificate)
            elif adoptable:
                ticket.works()
                await self._adopt(link.cluster, certificate, session.peer_hello, ticket)
            ticket.waits()
            if not await self._take_what_returns(link, session, ticket):
                return False
        except EnrolmentRefused as error:
            self._failed(ticket)
            self._refused(ticket, link.cluster, error.message)
            session.close(GoawayCode.REVOKED, error.message)
            return False
        except (RegistryUnavailable, StateError) as error:
            self._refused(ticket, link.cluster, error.message)
            session.close(GoawayCode.UNAVAILABLE, "the relay's registry does not answer", error.retry_after or 5)
            return False
        if self._leaving:
            session.close(GoawayCode.DRAINING, self._leaving, RETRY_AFTER)
            return False
        if session.closed:  # the agent has left meanwhile: it takes no place, and replaces no connection
            return False
        known = (link.cluster, link.instance) in self._instances
        if not known and not self._has_place(link, session, ticket):  # one that replaces its older one is none more
            return False
        if known and (wait := self._replacements.wait((link.cluster, link.instance), self.clock())):
            self.counters.agents_flapping += 1
            self._refused(ticket, link.cluster, "two agents with one instance id replace each other")
            session.close(
                GoawayCode.REPLACED, "another agent with the same instance id has just connected", math.ceil(wait)
            )
            return False
        return True

    def _has_place(self, link: ControlConnection, session: MuxSession, ticket: Ticket) -> bool:
        """Return whether one agent more finds a place, or is given one; otherwise it has been told why."""
        if len(self._open) < self._most:
            return True
        leaves = self._open.giving_way(link.cluster)
        if leaves is None:
            self._failed(ticket)  # one that comes again and again to be refused has its turns after all others
            self._refused(ticket, link.cluster, "this relay holds all the agents it may: see limits.agents")
            session.close(GoawayCode.LIMIT, FULL, FULL_RETRY)
            return False
        self._open.discard(leaves)
        reason = "its cluster held most places: see limits.agents"
        log.warning("agent gave way", cluster=leaves.cluster, connection=leaves.instance, reason=reason)
        leaves.leave(GoawayCode.LIMIT, FULL, FULL_RETRY)
        return True

    async def _introduced(self, link: ControlConnection, session: MuxSession, ticket: Ticket) -> bool:
        """Wait for HELLO; return false when it did not come, or is unfit, and the agent was told."""
        try:
            async with asyncio.timeout(HELLO_DEADLINE):
                await session.wait_established()
        except (ArcbridgeError, TimeoutError) as error:
            self._refused(ticket, link.cluster, f"no HELLO: {_reason(error)}")
            session.close(GoawayCode.TIMEOUT, "no HELLO in time")
            return False
        hello = session.peer_hello
        if hello is None or not hello.agent or printable(hello.agent, _MAX_INSTANCE) != hello.agent:
            self._refused(ticket, link.cluster, "HELLO without a usable instance id")
            session.close(GoawayCode.PROTOCOL, "HELLO of an agent names its instance, at most 128 printable characters")
            return False
        link.instance = hello.agent
        link.version = printable(hello.software, 64)
        if link.intake is not None and FEATURE not in hello.features.split():
            link.intake.end()  # an older agent keeps no ledger, so there is none to wait for
        return True

    async def _take_what_returns(self, link: ControlConnection, session: MuxSession, ticket: Ticket) -> bool:
        """Wait for what the agent gives back of the ledger; raises `EnrolmentRefused` where that revokes it. Return
        false where the agent keeps one, did not give back all of it, and was told."""
        intake = link.intake
        if intake is None or self.on_returned is None:
            return True
        received = -RETURN_LEAST
        while not intake.done.done() and intake.received - received >= RETURN_LEAST:
            received = intake.received
            await asyncio.wait([intake.done], timeout=RETURN_DEADLINE)
        if not intake.done.done():
            intake.cut_off()
        if not intake.done.cancelled():
            await self.on_returned(link.cluster, intake)
        if not intake.was_cut_off:
            return True
        # To go on would replace the agent's ledger, and it may be the only one that has these revocations.
        self._refused(ticket, link.cluster, "it did not give back the revocations that it keeps")
        session.close(GoawayCode.UNAVAILABLE, "the ledger did not arrive in time: try again", RETURN_RETRY)
        return False

    async def _admit_follower(self, link: ControlConnection, certificate: bytes) -> None:
        """Admit an agent whose cluster's CA was rotated while this relay was away, by what it announces before its
        first report; raises `EnrolmentRefused` where the known CA has not led to the one of its certificate."""
        await asyncio.wait([link.introduced], timeout=HELLO_DEADLINE)
        if link.announced:
            await self._take_succession(link, link.announced.pop(0))
        admit(await self.registry.cluster(link.cluster), certificate)

    async def _adopt(self, cluster: str, certificate: bytes, hello: Hello | None, ticket: Ticket) -> None:
        """Take in a cluster that enrolled at another relay of the same CA; raises `EnrolmentRefused`.

        That relay has put the pin of the cluster's CA into the certificate; so the CA itself, which clients are given,
        may come from the agent.
        """
        if hello is None or not hello.cluster_ca:
            raise EnrolmentRefused(
                "this cluster is not enrolled here, and its agent does not send its CA: upgrade the agent, or enrol it "
                "with a new join token of this relay"
            )
        ca_pem = check_ca_certificate(hello.cluster_ca)
        pin, stated = pin_of(ca_pem), agent_ca_pin(certificate)
        if not same_pin(pin, stated):
            raise EnrolmentRefused(
                f"this cluster is not enrolled here, and its agent sends another CA than its certificate states: "
                f"expected {stated}, found {pin}. Restore the agent's stored credential, or enrol it again"
            )
        if await self.registry.adopt(cluster, ca_pem, time.time()):
            self.counters.clusters_adopted += 1
            log.info("cluster adopted", cluster=cluster, cluster_ca_pin=pin, source=ticket.address)
            agent = Actor("agent", hello.agent, {"source": ticket.address})
            self.audit.note("cluster adopt", {"cluster": cluster, "cluster_ca_pin": pin}, agent)
            await self.registry.certificate_issued(cluster, agent_expiry(certificate))
        # Another relay may have adopted it meanwhile, with another CA; or the operator has revoked the name.
        record = await self.registry.cluster(cluster)
        if record is None:
            raise EnrolmentRefused(REVOKED)
        admit(record, certificate)

    async def _live(self, link: ControlConnection, session: MuxSession) -> None:
        key = (link.cluster, link.instance)
        older = self._instances[key] > 0
        self._instances[key] += 1
        self._open.add(link)
        if self._users is not None:
            complete = link.intake is None or link.intake.complete
            link.tell(_all_users(self._users, first=complete or not self.recovering))
        if self.book is not None:
            link.keep(self.book)
        if (cas := self.cas()) is not None:
            link.tell([cas])
        link.on_announced = partial(self._begin_to_follow, link)
        link.on_announced()
        try:
            await self.fleet.register(link)
            self.counters.agents_total += 1
            if older:
                self._replacements.reserve(key, self.clock())
                self.counters.agents_replaced += 1
                log.warning("agent replaced an older connection of the same instance id", **link.names)
            log.info("agent connected", **link.names, version=link.version)
            await self._seen(link)
            error = await session.wait_ended()
            seconds = round(time.time() - link.since)
            log.info("agent disconnected", **link.names, reason=error.message, seconds=seconds)
        finally:
            link.on_announced = None
            if link.following is not None:
                link.following.cancel()
            self._open.discard(link)
            self._uninformed.pop(link, None)
            self._instances[key] -= 1
            if not self._instances[key]:
                del self._instances[key]
            await self.fleet.unregister(link)
        if not self._leaving:
            # At the end of a drain all of them would be noted at once, for a date that is a minute old at most.
            await self._seen(link)

    def _begin_to_follow(self, link: ControlConnection) -> None:
        if link.announced and (link.following is None or link.following.done()):
            link.following = asyncio.get_running_loop().create_task(self._follow(link))

    async def _follow(self, link: ControlConnection) -> None:
        """Take over what an agent has announced of its cluster's CAs, at most one announcement in `FOLLOW_PAUSE`, and
        one that changes something ever more seldom."""
        while link.announced:
            if await self._take_succession(link, link.announced.pop(0)):
                link.follow_pause = min(2 * link.follow_pause, LONGEST_PAUSE)
            await asyncio.sleep(link.follow_pause)

    async def _take_succession(self, link: ControlConnection, announced: CaSuccession) -> bool:
        """Take over one announcement; return whether it has changed what the registry holds."""
        bound, agent = log.bind(cluster=link.cluster, connection=link.instance), Actor("agent", link.instance)
        try:
            if pin := await follow_cluster_ca(self.registry, link.cluster, announced):
                bound.info("cluster CA followed", cluster_ca_pin=pin)
                self.audit.note("cluster ca follow", {"cluster": link.cluster, "cluster_ca_pin": pin}, agent)
                return True
        except RegistryUnavailable as error:
            bound.warning("cluster CA not followed yet", reason=error.message)
            if len(link.announced) < ANNOUNCEMENTS:
                link.announced.append(announced)
        except ArcbridgeError as error:
            bound.error("cluster CA not followed", reason=error.message)
            self.audit.note_stranger("cluster ca follow", {"cluster": link.cluster}, agent, error.message)
        return False

    async def _seen(self, link: ControlConnection) -> None:
        """Note that the cluster was seen, once in a second: the agents of one come and go together."""
        if self._noted.reserve((link.cluster, link.version), self.clock()) is None:
            return
        try:
            await self.registry.seen(link.cluster, time.time(), version=link.version)
        except (RegistryUnavailable, StateError) as error:
            # Only a date for people; the agent stays connected.
            log.warning("cluster not noted as seen", cluster=link.cluster, reason=error.message)

    def _failed(self, ticket: Ticket) -> None:
        """Count a handshake that came to nothing because of the peer."""
        self._failures.reserve(source_of(ticket.address), self.clock())

    def _refused(self, ticket: Ticket, cluster: str, reason: str) -> None:
        self.counters.agents_refused += 1
        log.warning("agent refused", source=ticket.address, cluster=cluster, reason=reason)


def _is_foreign(record: ClusterRecord | None, certificate: bytes) -> bool:
    """Return whether an agent is to be refused for its cluster's CA alone; raises `EnrolmentRefused` where for more."""
    try:
        admit(record, certificate)
    except ForeignCa:
        return True
    return False


def _all_users(users: Mapping[str, UserRevocation], *, first: bool = True) -> Iterator[Revoke]:
    """Say the whole list, for a connection that begins; without `first` it voids nothing that was said before."""
    for entry in users.values():
        yield Revoke(entry.user, entry.before, first, entry.reason)
        first = False
    if first:
        yield Revoke(first=True)


def _changes(before: Mapping[str, UserRevocation], now: Mapping[str, UserRevocation]) -> Iterator[Revoke]:
    """Say what an agent that knows `before` must hear: `before` 0 for a user who is restored."""
    for user, entry in now.items():
        if before.get(user) != entry:
            yield Revoke(user, entry.before, reason=entry.reason)
    for user in before:
        if user not in now:
            yield Revoke(user)


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or 'unknown'}"
    return getattr(error, "message", "") or type(error).__name__
