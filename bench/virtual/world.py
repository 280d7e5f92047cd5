"""Agents, relays and users in one virtual loop. Each is made of the product's own parts; what would need a socket, a
disk or a person is here.

* An agent is a `ControlConnections` with its `RelayChoice`, `Backoff` and `Dials`.
* A relay is a `ControlServer`, an `Admission`, a `NatsFleet`, and for its end a `Drain`. All relays have one registry,
  as over NATS; it is that of SQLite.
* A user has the client's `Relays` and `Backoff`, wants one agent, and keeps a session while nothing ends it.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import ssl
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, cast

from arcbridge.agent.control import ControlConnections
from arcbridge.agent.dials import CONNECT_DEADLINE, Dials
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.relay_choice import RelayChoice
from arcbridge.agent.sessions import Sessions
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays, RelaysFailed
from arcbridge.client.session.resumable_session import MOVE_SPREAD, RETRY_DELAY_LIMIT
from arcbridge.errors import ConnectionLost, JoinRefused, Unreachable
from arcbridge.net.address import Address
from arcbridge.net.backoff import Backoff
from arcbridge.net.join import JoinCode
from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay.admission import Admission, Purpose
from arcbridge.relay.client_join import ClientJoins
from arcbridge.relay.control import ControlServer
from arcbridge.relay.counters import Counters
from arcbridge.relay.drain import Drain
from arcbridge.relay.fleet.nats import NatsFleet
from arcbridge.relay.listener import Listener
from arcbridge.relay.membership import Membership
from arcbridge.relay.pump import Pumps
from arcbridge.relay.registry.base import Registry
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.tasks import TaskSet
from arcbridge.wire.records import Dial
from bench.virtual.bus import Bus, VirtualNats
from bench.virtual.links import AgentTransport, RelayAcceptor, VirtualSession, VirtualSocket
from bench.virtual.loop import now
from bench.virtual.model import WANTED, Model
from bench.virtual.plan import Outage, Size

if TYPE_CHECKING:
    import socket

ROUND_TRIPS = ((8, 90, 150, 230), (90, 10, 190, 140), (150, 190, 12, 75), (230, 140, 75, 9))
"""Milliseconds between regions, and within one."""
SESSION_LENGTH = 300.0
"""Seconds for which a user keeps a session, on average."""
JOIN_DEADLINE = RelayLimitsConfig().join_deadline
MOST_AGENTS = 50_000
"""Of each relay (`limits.agents`)."""


class World:
    """All of them; `clusters` is what each cluster's agents show."""

    def __init__(self, size: Size, registry: Registry, model: Model) -> None:
        self.size, self.registry, self.model = size, registry, model
        self.bus = Bus()
        self.limits = RelayLimitsConfig(agents=MOST_AGENTS, agents_per_second=size.pace)
        if size.addresses:
            self.limits = _in_proportion(self.limits)
        self.relays = [Relay(self, number) for number in range(size.relays)]
        self.by_address = {relay.address: relay for relay in self.relays}
        self.cuts: set[frozenset[int]] = set()
        self.joins: dict[str, asyncio.Future[None]] = {}
        """Joins that wait for their agent, by token."""
        self.tasks = TaskSet()
        self.accesses = [RelayAccess(str(relay.address)) for relay in self.relays]
        self.agents: list[Agent] = []
        self.users: list[User] = []

    def populate(self) -> None:
        """Make agents and users; the agents come within a minute and a half."""
        authority, cluster_ca, csr = Authority.create("relay"), Authority.create("cluster"), make_csr(make_key())
        ca_pem, size = cluster_ca.certificate_pem, self.size
        for number in range(size.agents):
            name = f"c{number // size.per_cluster}"
            if number % size.per_cluster == 0:
                pem = authority.sign_agent(csr, name, life=30 * 86400.0, cluster_ca_pin=cluster_ca.pin)
                certificate, credential = ssl.PEM_cert_to_DER_cert(pem), SimpleNamespace(cluster=name)
            self.agents.append(Agent(self, number, certificate, credential, ca_pem))
        for agent in self.agents:
            asyncio.get_running_loop().call_later(random.random() * 90, agent.start)
        self.users = [User(self, random.choice(self.agents)) for _ in range(size.users)]

    def is_cut(self, one: int, other: int) -> bool:
        return frozenset((one, other)) in self.cuts

    def one_way(self, agent: Agent | User, relay: Relay) -> float:
        """Return the seconds between both."""
        return ROUND_TRIPS[agent.region][relay.region] / 2000 * agent.detour

    async def suffer(self, outage: Outage) -> None:
        """Let one outage happen; return when it is over."""
        self.model.outage_begins(outage, now())
        relays = [self.relays[number] for number in outage.relays]
        if outage.kind == "cut":
            await self._cut(outage)
        elif outage.kind in ("drain", "upgrade"):
            for relay in relays:
                began = now()
                await relay.drain()
                await asyncio.sleep(outage.seconds)
                await relay.start()
                if len(relays) > 1:
                    await asyncio.sleep(max(0.0, 45.0 - (now() - began)))
        else:
            for relay in relays:
                relay.die(silent=outage.kind == "vanish")
            await asyncio.sleep(outage.seconds)
            for relay in relays:
                await relay.start()
        self.model.outage_ends(outage, now())

    async def _cut(self, outage: Outage) -> None:
        one, other = outage.regions
        self.cuts.add(frozenset(outage.regions))
        for relay in self.relays:
            for session, agent in list(relay.sessions.items()):
                if {agent.region, relay.region} == {one, other} and session.peer is not None:
                    session.fall_silent()
                    session.peer.fall_silent()
        await asyncio.sleep(outage.seconds)
        self.cuts.clear()


class Relay:
    """One relay: its port is here, and a process behind it while it is up."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index, self.region = world, index, index % world.size.regions
        self.address = Address(f"10.255.0.{index + 1}", 443)
        self.listens = self.silent = False
        self.starts = 0
        self.told: set[Agent] = set()
        """The agents that were connected when the relay began to drain."""
        self.sessions: dict[VirtualSession, Agent] = {}
        """The relay's ends of control connections."""
        self.pumps: dict[Held, None] = {}
        """Users' sessions."""
        self.stopping = SimpleNamespace(draining=False, joining=0, refuse_pending=lambda: None)
        """What a drain asks of the joins of clients."""

    async def start(self) -> None:
        """Start a process that knows nothing of the one before."""
        self.starts += 1
        self.tasks, self.counters = TaskSet(), Counters()
        self.nats = VirtualNats(self.world.bus, f"r{self.index}s{self.starts}")
        self.fleet = NatsFleet(self.nats)
        await self.fleet.start()
        clock = asyncio.get_running_loop().time
        self.admission = Admission(self.world.limits, clock=clock)
        self.control = ControlServer(
            _no_context,
            self.fleet,
            self.world.registry,
            self.counters,
            self.world.limits,
            clock=clock,
            acceptor=RelayAcceptor(self),
        )
        self.world.model.relay_starts(self.index)
        self.stopping.draining = False
        self.listens, self.silent = True, False

    def arrived(self, connection: VirtualSocket) -> None:
        """Take a connection whose ClientHello has come, as the listener does."""
        if self.silent or self.world.is_cut(connection.agent.region, self.region):
            return
        self.world.model.attempt(self.index, now())
        ticket = self.admission.enter(connection.agent.address) if self.listens else "down"
        if not isinstance(ticket, str) and not (reason := ticket.becomes(Purpose.CONTROL)):
            task = self.tasks.start(self.control.serve(cast("socket.socket", connection), ticket))
            task.add_done_callback(lambda _: ticket.leave())
            ticket.on_evicted = partial(_cancel, task)
            return
        if not isinstance(ticket, str):
            ticket.leave()
        self.world.model.turned_away[ticket if isinstance(ticket, str) else reason] += 1
        connection.close()

    def carries(self, session: VirtualSession, agent: Agent) -> None:
        """Note the relay's end of a control connection."""
        self.sessions[session] = agent
        session.changed = self._changed

    def _changed(self, session: VirtualSession) -> None:
        if session.closed:
            self.sessions.pop(session, None)

    def die(self, *, silent: bool = False) -> None:
        """End the process at once; `silent`: its peers are not told by the machine's kernel either."""
        self.listens, self.silent = False, silent
        self.nats.drop()
        for session in list(self.sessions):
            if session.peer is not None and silent:
                session.peer.fall_silent()
            elif session.peer is not None:
                lost = ConnectionLost("the other end closed the connection")
                asyncio.get_running_loop().call_later(session.one_way, session.peer.end, lost)
            session.closed = True
        self.sessions.clear()
        for pump in list(self.pumps):
            pump.abort("the relay is gone", after=25.0 if silent else 0.0)
        for task in self.tasks:
            task.cancel()

    async def drain(self) -> None:
        """Stop the relay in order."""
        self.told = set(self.sessions.values())
        listener = SimpleNamespace(peeking=0, leave=lambda: None, stop=lambda: setattr(self, "listens", False))
        await Drain(
            cast(Listener, listener),
            self.control,
            cast(ClientJoins, self.stopping),
            cast(Pumps, self.pumps),
            self.counters,
            Membership(),
        ).run(asyncio.Event())
        self.die()


class Agent:
    """One agent."""

    def __init__(self, world: World, number: int, certificate: bytes, credential: SimpleNamespace, ca_pem: str) -> None:
        self.world, self.number, self.region = world, number, number % world.size.regions
        self.certificate, self.instance = certificate, f"a{number}"
        self.cluster: str = credential.cluster
        place = number % (world.size.addresses or world.size.agents)
        self.address = f"10.{place >> 16}.{place >> 8 & 255}.{place & 255}"
        self.detour = random.uniform(1.0, 1.5)
        """By which factor its round trips are longer than those of its region."""
        self.pumps: dict[Held, None] = {}
        self.not_before: dict[int, float] = {}
        """Before when a relay has asked this agent not to come again."""
        keeper = cast(
            CredentialKeeper, SimpleNamespace(current=credential, stated_ca_pem=ca_pem, announcement=None, changed=None)
        )
        addresses = list(world.by_address)
        clock = asyncio.get_running_loop().time
        self.control = ControlConnections(
            addresses,
            keeper,
            cast(Sessions, self),
            instance=self.instance,
            clock=clock,
            choice=RelayChoice(addresses, WANTED),
            transport=AgentTransport(self, keeper),
        )
        self.control.dials = _VirtualDials(self, keeper)
        self.lacks_since = 0.0
        """Since when it has fewer control connections than it wants; 0: it has as many."""
        self.away_since = 0.0
        """Since when it is not connected to all the relays that it prefers; 0: it is."""
        self._looks = False

    def start(self) -> None:
        self.lacks_since = self.away_since = now()
        self.control.start()

    # -- what `ControlConnections` asks of the agent's sessions ------------------------------------------------------

    @property
    def streams_wait(self) -> bool:
        return bool(self.pumps)

    def accepts_connection(self, via: str, *, may_come_back: bool = False) -> bool:
        return True

    def ask_to_move(self, via: str, before: float) -> int:
        """Ask the users whose sessions came through this relay to move."""
        moved = [pump for pump in self.pumps if str(pump.relay.address) == via]
        for pump in moved:
            pump.move()
        return len(moved)

    def revoke(self, via: str, reason: str) -> NoReturn:
        raise AssertionError(f"a relay has revoked cluster {self.cluster}: {reason}")

    # -- what is observed --------------------------------------------------------------------------------------------

    @property
    def up(self) -> list[Address]:
        """The relays that the agent is connected to, as it sees it."""
        links = self.control._links
        return [one.relay for one in links if one.up and not one.leaving and one.session and not one.session.closed]

    def look_soon(self) -> None:
        if not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._looks = False
        up, model = self.up, self.world.model
        if len(up) < WANTED:
            self.lacks_since = self.lacks_since or now()
        elif self.lacks_since:
            model.agent_is_back(self.lacks_since, now())
            self.lacks_since = 0.0
        if not set(up).issuperset(self.control.choice.preferred):
            self.away_since = self.away_since or now()
        elif self.away_since:
            model.agent_is_home(self.away_since, now())
            self.away_since = 0.0


class _VirtualDials(Dials):
    """Decides as an agent does, and joins in memory."""

    def __init__(self, agent: Agent, keeper: CredentialKeeper) -> None:
        relays = [relay.address for relay in agent.world.relays]
        clock = asyncio.get_running_loop().time
        super().__init__(relays, keeper, cast(Sessions, agent), instance=agent.instance, clock=clock)
        self._agent = agent

    def join(self, dial: Dial, relay: Address, done: Callable[[], None]) -> None:
        world = self._agent.world

        def arrive() -> None:
            done()
            waiting = world.joins.get(dial.token)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)

        one_way = world.one_way(self._agent, world.by_address[Address(*_split(dial.address))])
        asyncio.get_running_loop().call_later(5 * one_way, arrive)


class Held:
    """A user's session through one relay; to a drain it is a `Pump`."""

    def __init__(self, user: User, relay: Relay) -> None:
        self.user, self.relay, self.closed = user, relay, False
        relay.pumps[self] = None
        user.agent.pumps[self] = None

    def close(self) -> None:
        """Leave in order."""
        self.closed = True
        self.relay.pumps.pop(self, None)
        self.user.agent.pumps.pop(self, None)

    def abort(self, reason: str, *, after: float = 0.0) -> None:
        """Be cut: by a relay that is gone, or by its drain (`Pump.abort`)."""
        if not self.closed:
            if self.relay.stopping.draining and after == 0.0:
                self.user.world.model.cut_by_drain(self.user.agent in self.relay.told)
            self.close()
            asyncio.get_running_loop().call_later(after, self.user.lost, self)

    def move(self) -> None:
        """Be asked by the agent to move."""
        after = random.random() * MOVE_SPREAD
        asyncio.get_running_loop().call_later(after, self.user.leaves, self)


class User:
    """One user, who wants one agent all the time."""

    def __init__(self, world: World, agent: Agent) -> None:
        self.world, self.agent = world, agent
        self.region, self.detour = random.randrange(world.size.regions), random.uniform(1.0, 2.0)
        self.relays = Relays(world.accesses, clock=asyncio.get_running_loop().time)
        self.held: Held | None = None
        self._leaving: RelayAccess | None = None
        self._changed = asyncio.Event()
        self._without_since = 0.0

    async def live(self) -> None:
        """Have a session, again and again."""
        backoff = Backoff(cap=RETRY_DELAY_LIMIT)
        while True:
            self._changed.clear()
            began, leaving, self._leaving = now(), self._leaving, None
            former = self.held
            self._without_since = self._without_since or (began if former is None else 0.0)
            try:
                _, held = await self.relays.first_of(self._attempt, Held.close, leaving=leaving)
            except RelaysFailed as failed:
                error = failed.summed_up(lambda error: 1)
                self.world.model.user_refused(self.agent.region, began, now(), error.message)
                hint = None if error.retry_after is None else float(error.retry_after)
                await asyncio.sleep(backoff.next_delay(hint=hint))
                continue
            self.held, was_without = held, now() - self._without_since if former is None else 0.0
            self._without_since = 0.0
            self.world.model.user_is_served(began, now(), was_without)
            backoff.reset()
            if former is not None and not former.closed:
                former.close()
            try:
                async with asyncio.timeout(random.expovariate(1 / SESSION_LENGTH)):
                    await self._changed.wait()
            except TimeoutError:
                held.close()
                self.held = None

    def lost(self, held: Held) -> None:
        if held is self.held:
            self.held = None
            self._without_since = self._without_since or now()
            self._changed.set()

    def leaves(self, held: Held) -> None:
        if held is self.held and not held.closed:
            self._leaving = self.world.accesses[held.relay.index]
            self._changed.set()

    async def _attempt(self, access: RelayAccess) -> Held:
        world, relay = self.world, self.world.by_address[access.address]
        trip = 2 * world.one_way(self, relay)
        if relay.silent or world.is_cut(self.region, relay.region):
            await asyncio.sleep(CONNECT_DEADLINE)
            raise Unreachable("no answer")
        await asyncio.sleep(2 * trip)
        if not relay.listens:
            raise Unreachable("connection refused")
        if relay.stopping.draining:
            raise Unreachable("this relay is going away", retry_after=1)
        token, agent, starts = secrets.token_hex(8), self.agent, relay.starts
        arrival = world.joins[token] = asyncio.get_running_loop().create_future()
        dial = Dial(token, str(relay.address), agent.cluster, token, agent.instance, 10)
        try:
            async with asyncio.timeout(JOIN_DEADLINE):
                await relay.fleet.dial(agent.cluster, dial, JOIN_DEADLINE)
                await arrival
        except JoinRefused as error:
            if error.code in (JoinCode.NO_AGENT, JoinCode.NO_INSTANCE):
                self.world.model.agent_is_unknown(agent.region, now())
            raise Unreachable(JoinCode(error.code).name, retry_after=error.retry_after) from error
        except TimeoutError as error:
            raise Unreachable("the agent did not come in time", retry_after=5) from error
        finally:
            del world.joins[token]
        if not relay.listens or relay.starts != starts:
            raise Unreachable("the relay is gone")
        return Held(self, relay)


def _in_proportion(limits: RelayLimitsConfig) -> RelayLimitsConfig:
    """Return the limits with those of one address in the proportion to the pace that the defaults have."""
    full = RelayLimitsConfig()
    share = limits.agents_per_second / full.agents_per_second
    return replace(
        limits,
        unauthenticated_per_address=max(round(full.unauthenticated_per_address * share), 1),
        connections_per_second_per_address=max(round(full.connections_per_second_per_address * share), 1),
    )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def _no_context() -> NoReturn:
    raise AssertionError("no TLS is made in memory")
