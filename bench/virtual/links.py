"""Connections between agents and relays that exist in memory alone: they take round trips, end, and fall silent.

They carry records and not frames, and have no keepalive of their own: when one falls silent, its ends notice it within
the time that a keepalive takes. What a socket, TLS and `mux` do for the product is here; what decides is not.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from arcbridge.agent.control import ControlLink, ControlTransport
from arcbridge.agent.dials import CONNECT_DEADLINE, HANDSHAKE_DEADLINE
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.errors import ArcbridgeError, ConnectionLost, SessionEnded, Unreachable
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.address import Address
from arcbridge.net.tls import ALPN_CONTROL
from arcbridge.relay.admission import Ticket
from arcbridge.relay.control import ControlAcceptor, ControlConnection
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.lifecycle import DRAIN_CODES, ended_by
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.records import CaSuccession, Dial, Goaway, Hello, Ledger, Revoke, Status
from arcbridge.wire.session import Introduction
from bench.virtual.loop import now

if TYPE_CHECKING:
    import socket

    from bench.virtual.world import Agent, Relay

HANDSHAKE_CPU = 0.003
"""Seconds of a relay's one core that a handshake takes (`herd` in bench/results/2026-11-24-studies.json)."""


class VirtualSession:
    """One end of a control connection; it stands for a `MuxSession`."""

    def __init__(
        self, handler: BaseHandler, introduction: Introduction, changed: Callable[[VirtualSession], None]
    ) -> None:
        self.handler = handler
        self.introduction = introduction
        self.changed = changed
        """Called when the session has begun or ended, or the other end has said that it will end."""
        self.closed = False
        self.silent = False
        """Whether nothing arrives any more, in either direction."""
        self.peer: VirtualSession | None = None
        self.one_way = 0.0
        """Seconds that a record takes to the other end."""
        self.peer_hello: Hello | None = None
        self.goaway_sent = False
        self._arrives = 0.0
        """When the last record that was sent arrives."""
        self.error: ArcbridgeError | None = None
        """Why it has ended."""
        self._waiting: list[asyncio.Future[ArcbridgeError]] = []

    @property
    def round_trip(self) -> float:
        return 2 * self.one_way

    def established(self, peer: VirtualSession) -> None:
        """Take the HELLO of the other end, which has just arrived."""
        said = peer.introduction
        self.peer_hello = Hello(agent=said.agent, software=said.software, cluster_ca=said.cluster_ca)
        self._call(self.handler.established, self)
        self.changed(self)

    def forget_cluster_ca(self) -> None:
        """Keep HELLO as it is: all agents of a cluster share one text here."""

    async def wait_established(self) -> None:
        if self.peer_hello is None and self.error is not None:
            raise self.error

    async def wait_ended(self) -> ArcbridgeError:
        if self.error is None:
            future: asyncio.Future[ArcbridgeError] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            return await future
        return self.error

    def send(self, record: Dial | Status | Revoke | Ledger | CaSuccession | Goaway) -> None:
        if self.closed or self.silent or self.peer is None:
            return
        # In order, however many are sent in one instant.
        self._arrives = max(now() + self.one_way, self._arrives + 1e-7)
        asyncio.get_running_loop().call_at(self._arrives, self.peer.receive, record)

    def goaway(self, code: GoawayCode, message: str = "", retry_after: int = 0) -> None:
        if not self.goaway_sent:
            self.goaway_sent = True
            self.send(Goaway(0, code, message, retry_after, False))

    def close(self, code: GoawayCode = GoawayCode.DONE, message: str = "", retry_after: int = 0) -> None:
        self.send(Goaway(0, code, message, retry_after, True))
        self.end(SessionEnded(code, message, retry_after=retry_after or None))

    def abort(self, error: ArcbridgeError | None = None) -> None:
        if not self.closed and not self.silent and self.peer is not None:
            lost = ConnectionLost("the connection was lost")
            asyncio.get_running_loop().call_later(self.one_way, self.peer.end, lost)
        self.end(error or ConnectionLost("the connection was aborted"))

    def receive(self, record: Any) -> None:
        """Take a record that has arrived."""
        if self.closed or self.silent:
            return
        handler = self.handler
        if isinstance(record, Goaway):
            self._call(handler.goaway_received, self, record)
            if record.final or record.code not in DRAIN_CODES:
                self.end(ended_by(record))
            self.changed(self)
            return
        methods: dict[type, Callable[..., None]] = {
            Dial: handler.dial_received,
            Status: handler.status_received,
            Ledger: handler.ledger_received,
            Revoke: handler.revoke_received,
        }
        methods[type(record)](self, record)

    def fall_silent(self) -> None:
        """Let nothing arrive any more; this end notices it as a keepalive does."""
        self.silent = True
        if not self.closed:
            after = DEFAULT.ping_timeout - random.random() * DEFAULT.ping_interval
            lost = ConnectionLost("the connection is dead: nothing arrived")
            asyncio.get_running_loop().call_later(after, self.end, lost)

    def end(self, error: ArcbridgeError) -> None:
        """End here, for this reason."""
        if self.closed:
            return
        self.closed, self.error = True, error
        for future in self._waiting:
            if not future.done():
                future.set_result(error)
        self._waiting.clear()
        asyncio.get_running_loop().call_soon(self._call, self.handler.session_ended, self, error)
        self.changed(self)

    def _call(self, method: Callable[..., None], *args: object) -> None:
        method(*args)


class VirtualSocket:
    """A connection to a relay before its handshake is complete: what the product does with a socket by then."""

    def __init__(self, agent: Agent, relay: Relay, one_way: float) -> None:
        self.agent, self.relay, self.one_way = agent, relay, one_way
        self.session: VirtualSession | None = None
        """The agent's end."""
        self.accepted: asyncio.Future[VirtualSession] = asyncio.get_running_loop().create_future()
        """The relay's end, once its part of the handshake has arrived."""
        self.ended = False
        """Whether the agent has given the connection up."""

    def setsockopt(self, *_: object) -> None:
        """Take the options of a reset: a connection in memory has no other end."""

    def getsockopt(self, *_: object) -> bytes:
        return bytes([8 if self.ended else 1])  # TCP_CLOSE_WAIT, TCP_ESTABLISHED

    def close(self) -> None:
        """Close it at the relay: the agent finds a reset."""
        if self.relay.silent:
            return
        asyncio.get_running_loop().call_later(self.one_way, self._reset)

    def _reset(self) -> None:
        if not self.accepted.done():
            self.accepted.set_exception(ConnectionResetError("reset by the relay"))
            self.accepted.exception()  # the agent may have given up


class AgentTransport(ControlTransport):
    """Connects one agent."""

    def __init__(self, agent: Agent, keeper: CredentialKeeper) -> None:
        super().__init__(keeper)
        self._agent = agent

    async def connect(self, relay: Address) -> socket.socket:
        node = self._agent.world.by_address[relay]
        if now() < self._agent.not_before.pop(node.index, 0.0):
            self._agent.world.model.found["early: an agent comes before the time that the relay has named"] += 1
        one_way = self._agent.world.one_way(self._agent, node)
        if node.silent or self._agent.world.is_cut(self._agent.region, node.region):
            await asyncio.sleep(CONNECT_DEADLINE)
            raise Unreachable(f"cannot reach {relay}: no answer")
        await asyncio.sleep(2 * one_way)
        if not node.listens:
            raise Unreachable(f"cannot reach {relay}: connection refused")
        return cast("socket.socket", VirtualSocket(self._agent, node, one_way))

    async def measure(self, relay: Address) -> float:
        node, agent = self._agent.world.by_address[relay], self._agent
        if node.silent or not node.listens or agent.world.is_cut(agent.region, node.region):
            raise Unreachable(f"cannot reach {relay}")
        there_and_back = 2 * agent.world.one_way(agent, node)
        await asyncio.sleep(2 * there_and_back)
        return there_and_back

    def make_session(self, link: ControlLink, introduction: Introduction) -> MuxSession:
        agent, index = self._agent, self._agent.world.by_address[link.relay].index

        def changed(session: VirtualSession) -> None:
            # A relay that drains has named its time before, and repeats it as it closes.
            if isinstance(session.error, SessionEnded) and session.error.retry_after and not link.relay_drains:
                agent.not_before[index] = now() + session.error.retry_after
            agent.look_soon()

        return cast(MuxSession, VirtualSession(link, introduction, changed))

    async def secure(self, session: MuxSession, sock: socket.socket, relay: Address) -> None:
        connection, own = cast(VirtualSocket, sock), cast(VirtualSession, session)
        connection.session = own
        own.one_way = connection.one_way
        asyncio.get_running_loop().call_later(own.one_way, connection.relay.arrived, connection)
        try:
            async with asyncio.timeout(HANDSHAKE_DEADLINE):
                own.peer = await connection.accepted
        except BaseException:
            connection.ended = True
            raise
        # HELLO of the relay comes with the end of its handshake.
        asyncio.get_running_loop().call_later(own.round_trip, own.established, own.peer)


class RelayAcceptor(ControlAcceptor):
    """Accepts at one relay."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._busy_until = 0.0

    def make_session(self, link: ControlConnection) -> MuxSession:
        return cast(MuxSession, VirtualSession(link, Introduction(software="relay"), lambda session: None))

    async def secure(self, session: MuxSession, sock: socket.socket, ticket: Ticket) -> asyncio.Transport:
        connection, own = cast(VirtualSocket, sock), cast(VirtualSession, session)
        self._relay.world.model.handshake(self._relay.index, now())
        self._busy_until = max(self._busy_until, now()) + HANDSHAKE_CPU
        await asyncio.sleep(self._busy_until - now() + connection.one_way)
        if connection.ended or connection.accepted.done() or connection.session is None:
            raise ConnectionResetError("the agent has given up")
        own.one_way, own.peer = connection.one_way, connection.session
        connection.accepted.set_result(own)
        await asyncio.sleep(own.one_way)
        if connection.ended:
            raise ConnectionResetError("the agent has given up")
        self._relay.carries(own, connection.agent)
        own.established(connection.session)
        return cast(asyncio.Transport, _Transport(connection.agent.certificate))


class _Transport:
    """What admission reads of a TLS connection."""

    def __init__(self, certificate: bytes) -> None:
        self._certificate = certificate

    def get_extra_info(self, name: str) -> _Transport:
        return self

    def getpeercert(self, binary_form: bool) -> bytes:
        return self._certificate

    def selected_alpn_protocol(self) -> str:
        return ALPN_CONTROL
