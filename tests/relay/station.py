"""A relay's connection handlers in this process, on a real port with real TLS and registry, and the ends that meet it.

`Agent` is a scripted one: it keeps a control connection and does with a dial request what the test says.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from arcbridge.errors import ArcbridgeError, JoinRefused, Unauthenticated
from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import KnownGroups, PolicyFile
from arcbridge.identity.proof import UNBOUND, Binding, ProofChecker, ProofPolicy
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.loop_shares import LoopTimes
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net import client_hello
from arcbridge.net.address import Address
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.join import client_join
from arcbridge.net.sockets import receive
from arcbridge.net.tls import ALPN_CONTROL, ALPN_HTTP, ALPN_JOIN
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.relay.access import Access, CallerChecks
from arcbridge.relay.admission import Admission
from arcbridge.relay.client_join import ClientJoins
from arcbridge.relay.control import ControlServer
from arcbridge.relay.counters import Counters
from arcbridge.relay.fleet.base import Fleet
from arcbridge.relay.fleet.workers import WorkersFleet
from arcbridge.relay.http.server import HttpHandler
from arcbridge.relay.listener import Listener
from arcbridge.relay.pending_dials import Detour, PendingDials
from arcbridge.relay.proxy_protocol import Networks
from arcbridge.relay.pump import Pump, Pumps
from arcbridge.relay.registry.sqlite import SqliteRegistry
from arcbridge.relay.rendezvous import AgentJoins, Rendezvous
from arcbridge.relay.siblings.group import Siblings
from arcbridge.relay.siblings.handover import Handovers
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.wire.records import Dial, Goaway, JoinReply, JoinRequest, Status
from arcbridge.wire.session import Introduction, Kind, Side
from tests.net.ends import RELAY, authority, client_context, server_contexts
from tests.support.eventually import until


class StubVerifier(TokenVerifier):
    """The token *is* the user name; `bad` is none."""

    def __init__(self, bindings: Mapping[str, Binding], groups: Mapping[str, tuple[str, ...]]) -> None:
        self.bindings = bindings
        """How tokens are bound; the others are not."""
        self.groups = groups
        """The groups of users; the others' tokens have no such claim."""

    async def verify(self, token: str) -> Identity:
        if token == "bad":
            raise Unauthenticated("the token has expired")
        now, groups = time.time(), self.groups.get(token, ())
        return Identity(
            token,
            "",
            groups,
            f"https://issuer.test#{token}",
            "https://issuer.test",
            now + 600,
            issued_at=now,
            binding=self.bindings.get(token, UNBOUND),
            missing_groups_claim="" if groups else "groups",
        )


class StubPolicy(PolicyFile):
    def __init__(self) -> None:
        self.allowed = {("alice", "prod"), ("alice", "other"), ("alice", "unknown"), ("bob", "prod")}

    def allows(self, identity: Identity, cluster: str) -> bool:
        return (identity.username, cluster) in self.allowed

    def current(self) -> Any:
        return _Policy(self.allowed)


class _Policy(frozenset[tuple[str, str]]):
    """What `StubPolicy` has in force; it names the groups `platform` and `developers`."""

    def known_groups(self, identity: Identity) -> KnownGroups:
        known = tuple(group for group in identity.groups if group in ("platform", "developers"))
        return KnownGroups(known, len(identity.groups) - len(known))


class EchoUpper(asyncio.Protocol):
    """The protocol behind the HTTP handler in these tests: it echoes in upper case."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # No isinstance: uvloop's transports are not derived from asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data.upper())


class Station:
    def __init__(self, directory: Path, limits: RelayLimitsConfig, dial_deadline: float, peek_deadline: float) -> None:
        self.directory = directory
        # Tests that do without such a share work for both ends in one loop.
        self.limits = replace(limits, loop_share_per_address=0)
        self.dial_deadline = dial_deadline
        self.peek_deadline = peek_deadline
        self.counters = Counters()
        self.siblings: Siblings | None = None
        """Set before `open`: this station is one of several workers."""
        self.fleet = Fleet()
        self.detour: Detour | None = None
        """Set before `open`: how joins of agents reach another station."""
        self.policy = StubPolicy()
        self.access = Access(self.policy)
        self.access.learn_users({})
        self.balancers: Networks = ()
        """Set before `open`: where connections begin with a PROXY protocol header."""
        self.bindings: dict[str, Binding] = {}
        """How the tokens of users are bound to keys."""
        self.groups: dict[str, tuple[str, ...]] = {}
        """The groups of users."""
        self.ended: list[Pump] = []
        self.on_pump_ended: Callable[[Pump], None] = lambda pump: None
        self.address = Address("127.0.0.1", 0)

    async def open(self) -> None:
        contexts = server_contexts()
        if self.siblings is not None:
            self.fleet, self.detour = WorkersFleet(self.siblings), Handovers(self.siblings)
        self.registry = await SqliteRegistry.open(self.directory)
        self.admission = Admission(self.limits)
        shares = self.admission.loop_times.shares
        self.pumps = Pumps(self._pump_ended, payers=LoopTimes(0.0, size=100, shares=shares))
        self.control = ControlServer(
            lambda: contexts[ALPN_CONTROL], self.fleet, self.registry, self.counters, self.limits
        )
        dials = PendingDials(self.counters, self.detour)
        self.checks = CallerChecks(
            StubVerifier(self.bindings, self.groups), ProofChecker(ProofPolicy.IF_BOUND, "the relay"), self.access
        )
        self.clients = ClientJoins(
            dials,
            self.fleet,
            self.registry,
            self.checks,
            self.pumps,
            self.counters,
            address="relay.test:443",
            limits=self.limits,
            dial_deadline=self.dial_deadline,
        )
        self.dials = dials
        self.agents = AgentJoins(dials, self.registry, self.counters, self.detour, self.clients.require_room)
        rendezvous = Rendezvous(lambda: contexts[ALPN_JOIN], self.clients, self.agents, self.counters)
        http = HttpHandler(lambda: contexts[ALPN_HTTP], lambda ticket: EchoUpper(), self.counters)
        self.listener = Listener(
            {
                client_hello.CONTROL: self.control.serve,
                client_hello.JOIN: rendezvous.serve,
                client_hello.JOIN_1: rendezvous.serve,
                client_hello.HTTP: http.serve,
            },
            self.admission,
            self.counters,
            peek_deadline=self.peek_deadline,
            balancers=self.balancers,
        )
        self.address = self.listener.start(self.address)

    def _pump_ended(self, pump: Pump) -> None:
        self.ended.append(pump)
        self.on_pump_ended(pump)

    async def close(self) -> None:
        self.listener.stop()
        await self.listener.close()
        self.pumps.close()
        await self.registry.close()
        # Transports that were aborted close their sockets in the loop's next turns.
        for _ in range(3):
            await asyncio.sleep(0)

    async def enrol(self, cluster: str) -> None:
        text = await self.registry.create_join_token(cluster, expires_at=time.time() + 60)
        await self.registry.redeem_join_token(text, f"hash of {cluster}'s key", authority().certificate_pem)

    async def dial(self) -> socket.socket:
        return await connect(self.address, deadline=5, proxy=DIRECT)

    async def join(
        self,
        user: str = "alice",
        cluster: str = "prod",
        instance: str = "",
        prove: Callable[[bytes], str] | None = None,
        first_session: str = "",
        restricted: str = "",
        relay_ca: str = "",
    ) -> tuple[socket.socket, JoinReply]:
        """Join as a client; return the raw socket and the reply."""
        sock = await self.dial()
        request = JoinRequest(
            role="client",
            cluster=cluster,
            token=user,
            instance=instance,
            first_session=first_session,
            restricted=restricted,
            relay_ca=relay_ca,
        )
        return sock, await client_join(sock, client_context(), RELAY, request, prove=prove)

    async def settled(self) -> None:
        """Wait until no join is pending and no connection waits for admission."""
        await until(lambda: not self.clients.pending and not self.admission.waiting)


@contextlib.asynccontextmanager
async def station(
    directory: Path,
    *clusters: str,
    limits: RelayLimitsConfig | None = None,
    dial_deadline: float = 10.0,
    peek_deadline: float = 5.0,
) -> AsyncIterator[Station]:
    made = Station(directory, limits or RelayLimitsConfig(), dial_deadline, peek_deadline)
    await made.open()
    try:
        for cluster in clusters:
            await made.enrol(cluster)
        yield made
    finally:
        await made.close()


def places_limits(total: int = 1000, per_source: int = 1000, *, rate: int = 10_000) -> RelayLimitsConfig:
    """Limits by which no address takes too much of the loop's time. `rate`: connections per second and address."""
    return RelayLimitsConfig(
        unauthenticated=total,
        unauthenticated_per_address=per_source,
        connections_per_second_per_address=rate,
        loop_share_per_address=0,
    )


def places(*limits: int, clock: Callable[[], float] = time.monotonic, **named: int) -> Admission:
    """Places of a relay with `places_limits`."""
    return Admission(places_limits(*limits, **named), clock=clock)


async def exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = await receive(sock, size - len(data))
        assert chunk, "ended early"
        data += chunk
    return data


async def is_cut(*ends: socket.socket) -> None:
    """Require that each of these connections ends with a reset."""
    for end in ends:
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(receive(end, 10), 5)
        end.close()


async def echoes(sock: socket.socket, context: ssl.SSLContext | None = None) -> TlsPipe:
    """Reach what is behind the HTTP handler of a station on this connection."""
    pipe = TlsPipe(sock, context or client_context(ALPN_HTTP), server_hostname=RELAY)
    await pipe.handshake()
    await pipe.write(b"hello")
    assert await pipe.read() == b"HELLO"
    return pipe


async def asking(sock: socket.socket, request: JoinRequest | None = None, cluster: str = "") -> TlsPipe:
    """Say JOIN on a connection to a relay, as alice or with another request and an agent's certificate; return what
    answers."""
    pipe = TlsPipe(sock, client_context(ALPN_JOIN, cluster), server_hostname=RELAY)
    await pipe.handshake()
    record = (request or JoinRequest(role="client", cluster="prod", token="alice")).encode()
    await pipe.write(len(record).to_bytes(4, "big") + record)
    return pipe


async def refused(call: Awaitable[object], words: str = "") -> JoinRefused:
    """Return the refusal with which `call` ends; `words`: an expression that is in its message."""
    with pytest.raises(JoinRefused, match=words or None) as caught:
        await call
    return caught.value


OnDial = Callable[["Agent", Dial], Awaitable[None]]


class Agent(BaseHandler):
    """A control connection, registered or refused; each dial request runs `on_dial` in a task of this object."""

    server_name = RELAY
    features = ""

    def __init__(
        self, relay: Station, cluster: str = "prod", instance: str = "i1", on_dial: OnDial | None = None
    ) -> None:
        self.relay = relay
        self.cluster = cluster
        self.instance = instance
        self.round_trip = 0
        """What it says of its distance in joins, microseconds."""
        self.on_dial = on_dial or consent_and_join
        self.dials: list[Dial] = []
        self.sockets: list[socket.socket] = []
        self.goaway: Goaway | None = None
        self.ended: ArcbridgeError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        introduction = Introduction(instance, "test 1", features=self.features)
        self.session = MuxSession(Side.INITIATOR, Kind.CONTROL, self, introduction=introduction)

    def context(self, alpn: str, cluster: str = "") -> ssl.SSLContext:
        """Return the TLS of a connection, with the certificate of `cluster` (default: its own)."""
        return client_context(alpn, cluster or self.cluster)

    async def connect(self) -> None:
        await asyncio.get_running_loop().create_connection(
            self.session.protocol,
            sock=await self.relay.dial(),
            ssl=self.context(ALPN_CONTROL),
            server_hostname=self.server_name,
        )
        await self.session.wait_established()

    async def __aenter__(self) -> Agent:
        await self.connect()
        await until(lambda: self.ended or any(link.instance == self.instance for link in self.relay.fleet.links()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.session.abort()
        for sock in self.sockets:
            sock.close()
        await asyncio.sleep(0)

    async def left(self) -> Goaway:
        """Wait for the end of the connection; return what the relay said of it."""
        await asyncio.wait_for(self.session.wait_ended(), 5)
        assert self.goaway is not None
        return self.goaway

    def dial_received(self, session: MuxSession, dial: Dial) -> None:
        self.dials.append(dial)
        task = asyncio.get_running_loop().create_task(self._run(dial))
        self._tasks.add(task)

    async def _run(self, dial: Dial) -> None:
        await self.on_dial(self, dial)

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        self.goaway = goaway

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        self.ended = error

    async def join(self, token: str, cluster: str = "") -> socket.socket:
        """Join as the agent under a token, with the certificate of `cluster` (default: its own)."""
        sock = await self.relay.dial()
        request = JoinRequest(role="agent", token=token, instance=self.instance, round_trip=self.round_trip)
        await client_join(sock, self.context(ALPN_JOIN, cluster), self.server_name, request)
        self.sockets.append(sock)
        return sock


async def consent_and_join(agent: Agent, dial: Dial) -> None:
    agent.session.send(Status(token=dial.token))
    await agent.join(dial.token)


async def swallow(agent: Agent, dial: Dial) -> None:
    """Ignore the dial."""


async def refuse(agent: Agent, dial: Dial) -> None:
    agent.session.send(Status(token=dial.token, code=1, message="I am full"))
