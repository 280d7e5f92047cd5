"""Keeps the control connections: to some relays of the list, always as many as are wanted.

One loop compares the connections that exist with those wanted and starts or ends some; `relay_choice` decides which
relays come next, and `dials` answers what the relays ask for. The rules:

* Of the list, the first ones of this process's own order are kept. One that is lost is replaced by the next in the
  order; when it is back, and has stayed, the stand-in is left in order, once no dial is under way on it. In the same
  way a relay is left to which another one is to be preferred by now: it is nearer.
* A relay that says it will go away (GOAWAY with DRAINING) is replaced first. Then the sessions that came through it
  are asked to move, and only then is it left; where nothing replaces it, it is kept until it closes.
* A relay's word when to come back is obeyed. A cluster that was revoked, and an instance id that is used twice, are
  never tried again within 30 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from arcbridge.agent.dials import CONNECT_DEADLINE, HANDSHAKE_DEADLINE, Dials, DialStatus
from arcbridge.agent.enrol import CredentialKeeper, outer_context
from arcbridge.agent.relay_choice import RelayChoice
from arcbridge.agent.sessions import Sessions
from arcbridge.build import build
from arcbridge.errors import ArcbridgeError, ConfigError, ConnectionLost, PinMismatch, RemoteProtocolError, SessionEnded
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.address import Address
from arcbridge.net.dialer import connect
from arcbridge.net.tls import ALPN_CONTROL, ALPN_HTTP, cure_of, measure_round_trip
from arcbridge.net.tlstransport import connect_tls
from arcbridge.observe.untrusted_text import clean
from arcbridge.tasks import TaskSet, cancel_and_wait, in_time, report_failure
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.ledger import FEATURE, LedgerEntries, entries_of, frames
from arcbridge.wire.records import CaSuccession, Dial, Goaway, Ledger, Revoke, Status
from arcbridge.wire.session import Introduction, Kind, Side

STOPPING = "the agent is stopping"
"""What relays and `/readyz` are told from a stop on."""
HEAD_START = 2.0
"""Seconds after which an attempt that hangs no longer counts: the next relay is tried beside it."""
FAIL_OVER_SPREAD = 2.0
"""Seconds within which a lost connection is replaced, at random: the agents of a dead relay must not come to another
one all at once. Without any other connection it is a quarter of that."""
BALANCE_FIRST, BALANCE_LAST = 60.0, 100.0
"""Seconds between two attempts to connect to a preferred relay again while another one stands in for it, at random."""
REMEASURED = 3600.0
"""Seconds after which the round trip to a relay without a control connection is measured anew, by one handshake."""
MEASURING = 1.0
"""Seconds for which a start waits for the round trips to relays that it does not know."""
SETTLED = 15.0
"""Seconds that a connection must have been up before a stand-in is left for it."""
LEAVE_GRACE = 3.0
"""Seconds between the GOAWAY to a relay and the end of the connection: a dial may be on its way."""
PROBATION = 0.5
"""Seconds until a new connection counts as a replacement: a relay that limits its rate, or drains too, completes the
HELLO first and sends GOAWAY then."""
REPLACEMENT_WAIT = 5.0
"""Seconds for which sessions stay where they are while the replacement of a draining relay is being connected; then the
other connections have to do."""
DEPARTURE_MEMORY = 60.0
"""Seconds after which a relay's GOAWAY is forgotten: it has cut what came through it long before."""
FOLLOW_PAUSE, REFUSED_PAUSE = 2.0, 30.0
"""Seconds behind an announcement of a relay's CAs, which costs signatures, until its next one is looked at: behind one
that was taken, and behind one that was refused or could not be kept."""
FAILURE_LIMIT = 200
"""Bytes of a failure's reason that are kept: a relay may have written it."""
RETRY_DELAY_LIMIT = 5.0
"""Largest delay between two tries of a relay, seconds, while no relay is up and streams wait for one: their clients try
as often. The backoff alone would make them wait for up to half a minute."""
SLOW = 30
"""Seconds to wait at least after REVOKED and REPLACED: trying more often cannot help."""

CLUSTER_REVOKED = "access was revoked: the relay says that this cluster is revoked; ask the relay's operator"
"""What users are told whose sessions end with that. The relay's own words are for this agent's log: in the sentence of
an agent they would be believed (docs/threats.md#V14)."""

_log = structlog.get_logger("arcbridge.agent")


@dataclass(slots=True)
class _Departure:
    """A draining relay whose sessions are still to be asked to move."""

    relay: Address
    at: float
    """When its GOAWAY came, seconds of the clock."""


class ControlConnections:
    """All control connections of one agent.

    `start()` begins to connect; `close()` ends everything and must be awaited. Counters are read by the metrics.
    """

    def __init__(
        self,
        relays: Sequence[Address],
        keeper: CredentialKeeper,
        sessions: Sessions,
        *,
        instance: str,
        choice: RelayChoice,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        transport: ControlTransport | None = None,
    ) -> None:
        self.relays = tuple(relays)
        self._keeper = keeper
        keeper.changed = self.send_reports
        self._sessions = sessions
        self.instance = instance
        self._clock = clock
        self._draw = draw
        self.choice = choice
        self._transport = transport or ControlTransport(keeper)
        self.dials = Dials(
            relays, keeper, sessions, instance=instance, clock=clock, round_trips=self.choice.round_trips
        )
        self._links: set[ControlLink] = set()
        self._tasks = TaskSet()
        self._balancing: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._departures: list[_Departure] = []
        self._start_after = 0.0
        self._balance_at = 0.0
        self.ledgers = {relay: LedgerEntries() for relay in relays}
        """What each relay has given this agent to keep of its revocations, for the case that it loses its own."""
        self.connected = asyncio.Event()
        """Set while at least one control connection is up, to a relay that does not drain."""
        self.draining = False
        self.report: Callable[[float], Status] = lambda round_trip: Status(instance=instance, ready=True)
        """Makes the report on this agent for a connection with this round trip, seconds (`agent.reports`)."""
        self.connects_failed = 0
        self.last_failure = ""
        """Why a control connection could not be made, or ended, the last time; empty while none has."""

    @property
    def wanted(self) -> int:
        """How many control connections the agent keeps."""
        return self.choice.wanted

    @property
    def up(self) -> int:
        """Control connections that are up, to relays that do not drain."""
        return len(self._staying())

    def round_trip(self) -> float:
        """Return the least round trip to a relay that is connected, seconds; 0: none is known."""
        trips = [link.session.round_trip for link in self._staying() if link.session is not None]
        return min((one for one in trips if one > 0), default=0.0)

    def unready(self) -> str | None:
        """Return why the agent is not ready, or None."""
        if self.draining:
            return STOPPING
        if not self._staying():
            last = f"; the last attempt: {self.last_failure}" if self.last_failure else ""
            return f"no control connection to a relay is up (0 of {self.wanted}){last}"
        return self.dials.unready([link.relay for link in self._staying()])

    def start(self) -> None:
        """Begin to connect."""
        self._plan_balancing()
        self._balancing = asyncio.get_running_loop().create_task(self._balance(), name="control")
        self._balancing.add_done_callback(report_failure)

    def drain(self) -> None:
        """Ask the relays for no more dials but those of sessions that are here; joins under way go on."""
        self.draining = True
        self._changed.set()
        for link in list(self._links):
            if link.up:
                self._announce_leaving(link, GoawayCode.DRAINING, STOPPING)
            elif link.task is not None and not self._awaits_sessions:
                link.task.cancel()

    async def close(self) -> None:
        """End connections, dials and tasks."""
        self.draining = True
        await cancel_and_wait(*self._tasks, *([self._balancing] if self._balancing is not None else []))
        await self.dials.close()

    # -- the loop ---------------------------------------------------------------------------------------------

    async def _balance(self) -> None:
        """Start, leave and move whenever something has changed or is due, until cancelled."""
        await self._measure(MEASURING)
        self.choice.rerank()
        while not self.draining or self._awaits_sessions:
            self._changed.clear()
            now = self._clock()
            due = [self._connect_missing(now), self._leave_surplus(now), self._move_sessions(now)]
            wait = min((when - now for when in due if when is not None), default=None)
            await in_time(self._changed.wait(), None if wait is None else max(wait, 0.001))

    @property
    def _awaits_sessions(self) -> bool:
        """Whether clients come back for what runs here; without a connection to a relay they have been lost too."""
        return self._sessions.streams_wait or (len(self._sessions) > 0 and not self._staying())

    def _staying(self) -> list[ControlLink]:
        return [link for link in self._links if link.up and not link.leaving]

    def _connect_missing(self, now: float) -> float | None:
        """Start the connections that are missing; answers when to look again."""
        staying = self._staying()
        recent = [link for link in self._links if not link.up and now - link.began < HEAD_START]
        taken = {link.relay for link in self._links if not link.leaving}
        missing = self.wanted - len(staying) - len(recent)
        due = [link.began + HEAD_START for link in recent]
        if missing > 0 and now < self._start_after:
            return min([self._start_after, *due])
        while missing > 0:
            relay = self.choice.next(taken, now)
            if relay is None:
                when = self.choice.next_time(taken)
                due += [when] if when is not None else []
                break
            self._start(relay, now)
            taken.add(relay)
            due.append(now + HEAD_START)
            missing -= 1
        if missing <= 0 and (back := self._preferred_back(staying, taken, now)) is not None:
            due.append(back)
        return min(due, default=None)

    def _preferred_back(self, staying: list[ControlLink], taken: set[Address], now: float) -> float | None:
        """Try the preferred relays that others stand in for, now and then; answers when to look again."""
        if self.wanted == len(self.relays) or len(staying) < self.wanted:
            return None
        if now < self._balance_at:
            return self._balance_at
        self._plan_balancing()
        self.choice.rerank()
        absent = [one for one in self.choice.preferred if one not in taken and self.choice.may_try(one, now)]
        for relay in absent:
            self._start(relay, now)
        if not absent:
            self._tasks.start(self._measure(CONNECT_DEADLINE), "measure")
        return self._balance_at

    async def _measure(self, deadline: float) -> None:
        """Measure the round trips that are not known, or old: of relays without a connection, all at once."""
        round_trips = self.choice.round_trips

        async def measure(relay: Address) -> None:
            with contextlib.suppress(ArcbridgeError, OSError, EOFError):  # it may be away, and is measured later
                async with asyncio.timeout(deadline):
                    round_trips.note(str(relay), await self._transport.measure(relay))

        taken = {link.relay for link in self._links}
        await asyncio.gather(*map(measure, self.choice.unmeasured(taken, REMEASURED)))
        if round_trips.unsaved:
            await asyncio.to_thread(round_trips.save)

    def _plan_balancing(self) -> None:
        self._balance_at = self._clock() + BALANCE_FIRST + self._draw() * (BALANCE_LAST - BALANCE_FIRST)

    def _leave_surplus(self, now: float) -> float | None:
        """Leave relays that others have made superfluous; answers when to look again."""
        staying = {link.relay: link for link in self._staying()}
        surplus = self.choice.surplus(staying)
        if not surplus:
            return None
        settled = max(link.up_since + SETTLED for relay, link in staying.items() if relay not in surplus)
        if now < settled:
            return settled
        for relay in surplus:
            if not staying[relay].dials:  # the end of the last one sets `_changed`
                self._leave(staying[relay], "the agent has enough relays without this one")
        return None

    def _move_sessions(self, now: float) -> float | None:
        """Ask the sessions of draining relays to move, once another relay serves; answers when to look again."""
        staying = self._staying()
        due = []
        for departure in list(self._departures):
            late = departure.at + REPLACEMENT_WAIT
            fresh = [link.up_since + PROBATION for link in staying if link.up_since >= departure.at]
            replaced = any(when <= now for when in fresh)
            being_replaced = bool(fresh) or any(not link.up for link in self._links)
            others = len(staying) > len(fresh)
            if replaced or (others and (now >= late or not being_replaced)):
                self._departures.remove(departure)
                moved = self._sessions.ask_to_move(str(departure.relay), departure.at)
                _log.info("sessions asked to move", connection=str(departure.relay), sessions=moved)
                for link in list(self._links):
                    if link.relay == departure.relay and link.relay_drains:
                        self._close_link(link, "the agent has another relay now")
            elif now >= departure.at + DEPARTURE_MEMORY:
                self._departures.remove(departure)
            else:
                due += [late if now < late else departure.at + DEPARTURE_MEMORY, *fresh]
        return min(due, default=None)

    # -- one connection ---------------------------------------------------------------------------------------

    def _start(self, relay: Address, now: float) -> None:
        link = ControlLink(self, relay, now)
        self._links.add(link)
        link.task = self._tasks.start(self._run_link(link), f"control-{relay}")

    async def _run_link(self, link: ControlLink) -> None:
        """Connect, and wait until the connection is over."""
        try:
            session = await self._connect(link)
            error = await session.wait_ended()
        except ArcbridgeError as refusal:
            error = refusal
        finally:
            self._links.discard(link)
            if link.ending is not None:
                link.ending.cancel()
            if link.session is not None and not link.session.closed:
                link.session.close(GoawayCode.DONE, "the agent has stopped")
            self._note_connected()
        self._ended(link, error)
        self._changed.set()

    async def _connect(self, link: ControlLink) -> MuxSession:
        relay = link.relay
        sock = await self._transport.connect(relay)
        link.began = self._clock()
        introduction = Introduction(self.instance, build(), self._keeper.stated_ca_pem, FEATURE)
        session = self._transport.make_session(link, introduction)
        link.session = session
        try:
            await self._transport.secure(session, sock, relay)
        except (OSError, TimeoutError) as error:
            sock.close()
            lost = ConnectionLost(f"the TLS handshake with {relay} failed: {_tls_reason(error)}")
            session.abort(lost)
            raise lost from error
        except BaseException:
            sock.close()
            session.abort()
            raise
        return session

    def link_established(self, link: ControlLink) -> None:
        """Both HELLOs were exchanged."""
        link.up = True
        link.up_since = self._clock()
        self._note_connected()
        self._changed.set()
        _log.info("control connection up", connection=str(link.relay), up=self.up, wanted=self.wanted)
        if link.session is not None and not link.session.closed:
            link.session.send(Ledger(digest=self.ledgers[link.relay].digest()))
        self._send_report(link)
        if self.draining:
            self._announce_leaving(link, GoawayCode.DRAINING, STOPPING)

    def send_reports(self) -> None:
        """Report to each relay how the agent is."""
        for link in self._staying():
            self._send_report(link)

    def _send_report(self, link: ControlLink) -> None:
        if link.session is None or link.session.closed or not link.up:
            return
        self.choice.round_trips.note(str(link.relay), link.session.round_trip)
        announcement = self._keeper.announcement
        if announcement is not None and announcement != link.announced:
            link.announced = announcement
            link.session.send(announcement)
        # Behind it: a relay that has missed a rotation waits for no longer.
        link.session.send(self.report(link.session.round_trip))

    def succession_received(self, link: ControlLink, succession: CaSuccession) -> None:
        """A relay announces its CAs: take that over; of those that come meanwhile, the last one."""
        link.unfollowed = succession.cas
        if link.following is None or link.following.done():
            link.following = self._tasks.start(self._follow(link))

    async def _follow(self, link: ControlLink) -> None:
        while link.unfollowed and link in self._links:
            cas, link.unfollowed = link.unfollowed, ""
            try:
                await self._keeper.follow_relay(cas)
                pause = FOLLOW_PAUSE
            except ArcbridgeError as error:
                _log.error("relay CA not followed", connection=str(link.relay), reason=error.message)
                pause = REFUSED_PAUSE
                if not isinstance(error, ConfigError | PinMismatch):
                    # The store failed, and the relay announces each step once.
                    link.unfollowed = link.unfollowed or cas
            await asyncio.sleep(pause)

    def _note_connected(self) -> None:
        if self._staying():
            self.connected.set()
        else:
            self.connected.clear()

    def relay_sent_goaway(self, link: ControlLink, goaway: Goaway) -> None:
        """The relay has sent GOAWAY: with DRAINING the connection goes on for a while, with other codes it is over."""
        link.code, link.retry_after = goaway.code, goaway.retry_after
        if goaway.code != GoawayCode.DRAINING or goaway.final or not link.up or link.relay_drains:
            return
        now = self._clock()
        link.leaving = link.relay_drains = True
        delay = self.choice.failed(link.relay, now, lasted=now - link.up_since, hint=goaway.retry_after or None)
        link.not_before = now + delay
        self._departures = [one for one in self._departures if one.relay != link.relay]
        self._departures.append(_Departure(link.relay, now))
        self._note_connected()
        self._changed.set()
        _log.info("relay goes away", connection=str(link.relay), reason=goaway.message, up=self.up, wanted=self.wanted)

    def _leave(self, link: ControlLink, message: str) -> None:
        """End a control connection in order: no more dials, LEAVE_GRACE for those on their way, then the end."""
        if link.goodbye_sent:
            return
        link.goodbye_sent = link.leaving = True
        self._note_connected()
        self._announce_leaving(link, GoawayCode.DONE, message)
        link.ending = asyncio.get_running_loop().call_later(LEAVE_GRACE, self._close_link, link, message)

    def _close_link(self, link: ControlLink, message: str) -> None:
        if link.session is not None and not link.session.closed:
            link.session.close(GoawayCode.DONE, message)

    def _announce_leaving(self, link: ControlLink, code: GoawayCode, message: str) -> None:
        if link.session is not None and not link.session.closed:
            link.session.send(Status(instance=self.instance, ready=False, message=message))
            link.session.goaway(code, message, 0)

    def _ended(self, link: ControlLink, error: ArcbridgeError) -> None:
        """A control connection is over, or was never established: decide when its relay is tried again."""
        now = self._clock()
        log = _log.bind(connection=str(link.relay))
        code = error.code if isinstance(error, SessionEnded) else link.code
        lasted = now - link.up_since if link.up else 0.0
        if link.leaving:
            if link.relay_drains:
                self.choice.failed(link.relay, now, lasted=lasted, not_before=link.not_before)
            else:
                self.choice.left(link.relay, now)
            log.info("control connection left", reason=error.message)
            return
        hint = link.retry_after or error.retry_after
        self.last_failure = f"{link.relay}: {clean(error.message, FAILURE_LIMIT)}"
        if not link.up:
            self.connects_failed += 1
        if code == GoawayCode.REVOKED:
            hint = max(hint or 0, SLOW)
            self._sessions.revoke(str(link.relay), CLUSTER_REVOKED)
        elif code == GoawayCode.REPLACED and not any(other.relay == link.relay for other in self._links):
            hint = max(hint or 0, SLOW)
            log.error(
                "another agent uses the same instance id",
                instance=self.instance,
                advice="ids are made at random, so one of the two is a copy of a running machine: restart this agent",
            )
        within = self._draw() * RETRY_DELAY_LIMIT if self._sessions.streams_wait and not self._staying() else math.inf
        delay = self.choice.failed(link.relay, now, lasted=lasted, hint=hint, within=within)
        untrusted = isinstance(error.__cause__, ssl.SSLCertVerificationError)
        if link.session is not None and lasted < PROBATION and not untrusted:
            if 2 * self.choice.turned_away(link.relay, now, within=within) > len(self.relays):
                self._plan_balancing()  # all come at once: turns are for those that lack a connection
        elif link.up and len(self.relays) > 1:
            spread = FAIL_OVER_SPREAD if self._staying() else FAIL_OVER_SPREAD / 4
            self._start_after = now + self._draw() * spread
            if not self._staying():
                self.choice.cap_delays(now, self._start_after - now)
        if not self.draining:
            log.warning("control connection lost", reason=error.message, retry_in=round(delay, 1), up=self.up)

    def revoked(self, link: ControlLink, revoke: Revoke) -> None:
        """The relay has revoked a user, or taken a revocation back; or it ends one session. Its list outlives the
        connection."""
        if revoke.session:
            self._sessions.end_one(revoke.session, revoke.reason)
            return
        _log.debug("revocation", connection=str(link.relay), user=revoke.user, before=revoke.before, first=revoke.first)
        if not self._sessions.revocations.hear(str(link.relay), revoke):
            _log.error(
                "a relay's list of revocations is too long",
                connection=str(link.relay),
                advice="the user's sessions were ended and the relay refuses new ones; at this agent alone the user "
                "is not revoked: take back revocations that are no longer needed",
            )

    def keep(self, link: ControlLink, ledger: Ledger) -> None:
        """Keep what the relay sends of its ledger, or give all of it back."""
        held = self.ledgers[link.relay]
        if ledger.wanted:
            # Once: a relay that asks again and again would have this agent gather all of it each time.
            asked, link.gave_back = link.gave_back, True
            if asked or link.session is None:
                return
            for one in frames(held, last=True):
                link.session.send(one)
            return
        if ledger.first:
            held.clear()
        for entry in entries_of(ledger):
            held.put(entry)

    # -- dials ------------------------------------------------------------------------------------------------

    def dial(self, link: ControlLink, dial: Dial) -> None:
        """Decide about a DIAL at once, answer with a STATUS, and join."""
        code, message = self.dials.decide(dial, link.relay, draining=self.draining)
        if link.session is not None:
            ready = not self.draining and not link.leaving
            link.session.send(Status(token=dial.token, code=code, message=message, instance=self.instance, ready=ready))
        if code is not DialStatus.WILL_JOIN:
            self.dials.refused += 1
            _log.warning("dial refused", connection=str(link.relay), session=dial.join_id, reason=message)
            return
        link.dials += 1

        def done() -> None:
            link.dials -= 1
            if not link.dials and len(self._links) > self.wanted:  # one that is superfluous may have waited for this
                self._changed.set()

        self.dials.join(dial, link.relay, done)


class ControlTransport:
    """Makes the sessions of control connections: TCP, TLS, and frames over both. A simulation has another one."""

    def __init__(self, keeper: CredentialKeeper) -> None:
        self._keeper = keeper

    async def connect(self, relay: Address) -> socket.socket:
        """Return a socket that is connected to the relay. Raises `Unreachable`."""
        return await connect(relay, deadline=CONNECT_DEADLINE)

    async def measure(self, relay: Address) -> float:
        """Return the round trip to a relay, seconds. Raises `Unreachable`, `OSError`, `EOFError`."""
        return await measure_round_trip(relay, outer_context(self._keeper.current, ALPN_HTTP))

    def make_session(self, link: ControlLink, introduction: Introduction) -> MuxSession:
        """Return the session of a link, which has no connection yet."""
        return MuxSession(Side.INITIATOR, Kind.CONTROL, link, label=str(link.relay), introduction=introduction)

    async def secure(self, session: MuxSession, sock: socket.socket, relay: Address) -> None:
        """Make TLS over the socket and give it to the session. Raises `OSError`, `TimeoutError`, `ConfigError`."""
        # Not the loop's: uvloop closes the descriptor itself where the relay resets the connection at once, and closing
        # the socket behind that closes whichever connection has the number by then.
        context = outer_context(self._keeper.current, ALPN_CONTROL)
        async with asyncio.timeout(HANDSHAKE_DEADLINE):
            await connect_tls(sock, context, session.protocol(), relay.host)


class ControlLink(BaseHandler):
    """One control connection, from the first attempt to its end."""

    def __init__(self, room: ControlConnections, relay: Address, began: float) -> None:
        self._control = room
        self.relay = relay
        self.began = began
        """When the attempt to connect began, or its handshake, which waits for a turn; seconds of the clock."""
        self.session: MuxSession | None = None
        self.task: asyncio.Task[None] | None = None
        self.ending: asyncio.TimerHandle | None = None
        self.up = False
        """Both HELLOs were exchanged."""
        self.up_since = 0.0
        """When that was, seconds of the clock."""
        self.leaving = False
        """The relay drains or the agent leaves it: the connection no longer counts."""
        self.relay_drains = False
        """It was the relay that sent GOAWAY."""
        self.goodbye_sent = False
        """The agent has sent GOAWAY."""
        self.gave_back = False
        """The relay has asked for its ledger."""
        self.dials = 0
        """Joins under way that this relay asked for."""
        self.announced: CaSuccession | None = None
        """The last announcement of the cluster's CAs that was sent to the relay."""
        self.following: asyncio.Task[None] | None = None
        """Takes over what the relay announces of its own CAs."""
        self.unfollowed = ""
        """The relay's last announcement that was not taken over yet; empty: none."""
        self.code = -1
        """The code of the relay's GOAWAY; -1: none came."""
        self.retry_after = 0
        self.not_before = 0.0
        """When a draining relay may be tried again, seconds of the clock."""

    def established(self, session: MuxSession) -> None:
        self._control.link_established(self)

    def dial_received(self, session: MuxSession, dial: Dial) -> None:
        self._control.dial(self, dial)

    def revoke_received(self, session: MuxSession, revoke: Revoke) -> None:
        self._control.revoked(self, revoke)

    def ledger_received(self, session: MuxSession, ledger: Ledger) -> None:
        try:
            self._control.keep(self, ledger)
        except RemoteProtocolError as error:
            session.close(GoawayCode.PROTOCOL, error.message)

    def succession_received(self, session: MuxSession, succession: CaSuccession) -> None:
        self._control.succession_received(self, succession)

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        self._control.relay_sent_goaway(self, goaway)


def _tls_reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        cure = cure_of(error, "check relay_ca_pin or relay_ca_file")
        return f"its certificate is not trusted ({error.verify_message}); {cure}"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "unknown")
    return type(error).__name__
