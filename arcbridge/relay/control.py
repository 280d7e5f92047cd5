"""An agent's control connection, from its TLS handshake to its end.

The certificate is the only thing believed: TLS has verified it under the relay's CA before the first byte of HELLO,
its URI names the cluster, and the registry says whether that cluster is still welcome. The instance id in HELLO tells
the pods of one cluster apart and decides nothing across clusters.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final

import structlog

from arcbridge.errors import ArcbridgeError, ConnectionLost, EnrolmentRefused, JoinRefused
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.join import JoinCode
from arcbridge.net.ready import reset
from arcbridge.net.tls import ALPN_CONTROL
from arcbridge.net.tlspipe import CLOSE_DEADLINE, HANDSHAKE_DEADLINE
from arcbridge.pki.authority import agent_cluster
from arcbridge.relay.admission import Ticket
from arcbridge.relay.counters import Counters
from arcbridge.relay.fleet.base import AgentInfo, Fleet
from arcbridge.relay.registry.base import Registry, RegistryUnavailable, admit
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Dial, Goaway, Status
from arcbridge.wire.session import Kind, Side

HELLO_DEADLINE: Final = 10.0
MAX_DIALS: Final = 64
"""Dials that wait for one agent's status: it would refuse more."""
RETRY_AFTER: Final = 1
"""Seconds after which an agent may try a relay again that is going away: an idle one is back within that."""
_MAX_INSTANCE: Final = 128
_UNREGISTER_DEADLINE: Final = 0.5
"""Of the engine, at the beginning of a drain; one that does not answer must not hold it up."""

log = structlog.get_logger("arcbridge.relay")


class ControlConnection(BaseHandler):
    """One registered agent; a `fleet.base.AgentLink`."""

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        self.instance = ""
        self.version = ""
        self.since = time.time()
        self.draining = False
        self.ready = True
        """The agent's last word on itself."""
        self.session: MuxSession | None = None
        self._dials: dict[str, asyncio.Future[Status]] = {}

    @property
    def info(self) -> AgentInfo:
        return AgentInfo(self.instance, self.version, self.since)

    @property
    def pending(self) -> int:
        return len(self._dials)

    async def dial(self, dial: Dial) -> Status:
        session = self.session
        if session is None or session.closed:
            raise _lost(self.cluster)
        if len(self._dials) >= MAX_DIALS:
            raise JoinRefused(
                JoinCode.OVERLOADED, f"the agent of cluster {self.cluster} has too many requests waiting", retry_after=2
            )
        answer: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._dials[dial.token] = answer
        try:
            session.send_dial(dial)
            status = await answer
        finally:
            self._dials.pop(dial.token, None)
        if status.code:
            words = _printable(status.message, 200) or "no reason given"
            raise JoinRefused(
                JoinCode.AGENT_REFUSED, f"the agent of cluster {self.cluster} refused: {words}", retry_after=5
            )
        return status

    def replaced(self) -> None:
        self.leave(GoawayCode.REPLACED, "another agent with the same instance id has connected")

    def leave(self, code: GoawayCode, message: str, retry_after: int = 0) -> None:
        """End the connection with a reason; its dials fail."""
        self.draining = True
        if self.session is not None and not self.session.closed:
            self.session.close(code, message, retry_after)

    # -- the session's callbacks -----------------------------------------------------------------------------------

    def status_received(self, session: MuxSession, status: Status) -> None:
        if not status.token:
            self.ready = status.ready
            return
        answer = self._dials.get(status.token)
        # A status that comes late, twice, or for a token that was never sent changes nothing.
        if answer is not None and not answer.done():
            answer.set_result(status)

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        self.draining = True

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        self.draining = True
        for answer in self._dials.values():
            if not answer.done():
                answer.set_exception(_lost(self.cluster))


class ControlRoom:
    """Accepts control connections; `serve` is a room of the listener."""

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        fleet: Fleet,
        registry: Registry,
        counters: Counters,
    ) -> None:
        self._context = context
        self._fleet = fleet
        self._registry = registry
        self._counters = counters
        self._open: set[ControlConnection] = set()
        self._leaving = ""

    def __len__(self) -> int:
        return len(self._open)

    async def serve(self, sock: socket.socket, ticket: Ticket) -> None:
        """Handshake, admission, registration, and then the connection's life."""
        link = ControlConnection("")
        session = MuxSession(Side.ACCEPTOR, Kind.CONTROL, link)
        link.session = session
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.connect_accepted_socket(
                session.protocol,
                sock,
                ssl=self._context(),
                ssl_handshake_timeout=HANDSHAKE_DEADLINE,
                ssl_shutdown_timeout=CLOSE_DEADLINE,
            )
        except (OSError, TimeoutError) as error:
            self._counters.rejected["handshake"] += 1
            log.info("control connection refused", source=ticket.address, cause=_cause(error))
            session.abort(ConnectionLost("the TLS handshake failed"))
            sock.close()
            return
        except BaseException:
            session.abort(ConnectionLost("the relay is stopping"))
            reset(sock)
            raise
        try:
            if not await self._admit(link, session, transport.get_extra_info("ssl_object"), ticket):
                return
            ticket.leave()
            await self._live(link, session)
        finally:
            if not session.closed:
                session.abort(ConnectionLost("the relay is stopping"))

    async def drain(self, message: str) -> None:
        """No dial any more, GOAWAY(DRAINING) to every agent, and to who comes from now on."""
        self._leaving = message
        links = list(self._open)
        for link in links:
            link.draining = True
        # Before the GOAWAYs: another relay of the fleet must not count on an agent that is about to leave.
        leaving = [asyncio.ensure_future(self._fleet.unregister(link)) for link in links]
        if leaving:
            await asyncio.wait(leaving, timeout=_UNREGISTER_DEADLINE)
        for link in links:
            if link.session is not None and not link.session.closed:
                link.session.goaway(GoawayCode.DRAINING, message, RETRY_AFTER)

    def close(self) -> None:
        """The end of a drain: who is still there is sent away."""
        for link in list(self._open):
            link.leave(GoawayCode.DRAINING, self._leaving or "this relay has stopped", RETRY_AFTER)

    def revoke(self, clusters: frozenset[str]) -> None:
        """Cut the agents of these clusters."""
        for link in [link for link in self._open if link.cluster in clusters]:
            log.warning("agent cut off", cluster=link.cluster, connection=link.instance, cause="revoked")
            link.leave(GoawayCode.REVOKED, "this cluster is revoked: the relay's operator has to restore it first")

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _admit(
        self, link: ControlConnection, session: MuxSession, tls: ssl.SSLObject | None, ticket: Ticket
    ) -> bool:
        """Whether the agent may stay; otherwise it has been told why."""
        certificate = None if tls is None else tls.getpeercert(binary_form=True)
        if tls is None or certificate is None or tls.selected_alpn_protocol() != ALPN_CONTROL:
            # The peek promised this protocol and the handshake made another: somebody plays games (J13).
            self._refused(ticket, "", "the handshake is not that of a control connection")
            session.abort(ConnectionLost("not a control connection"))
            return False
        try:
            link.cluster = agent_cluster(certificate)
            admit(await self._registry.cluster(link.cluster), certificate)
        except EnrolmentRefused as error:
            self._refused(ticket, link.cluster, error.message)
            session.close(GoawayCode.REVOKED, error.message)
            return False
        except RegistryUnavailable as error:
            self._refused(ticket, link.cluster, error.message)
            session.close(GoawayCode.UNAVAILABLE, "the relay's registry does not answer", error.retry_after or 5)
            return False
        try:
            async with asyncio.timeout(HELLO_DEADLINE):
                await session.wait_established()
        except (ArcbridgeError, TimeoutError) as error:
            self._refused(ticket, link.cluster, f"no HELLO: {_cause(error)}")
            session.close(GoawayCode.TIMEOUT, "no HELLO in time")
            return False
        hello = session.peer_hello
        if hello is None or not hello.agent or _printable(hello.agent, _MAX_INSTANCE) != hello.agent:
            self._refused(ticket, link.cluster, "HELLO without a usable instance id")
            session.close(GoawayCode.PROTOCOL, "HELLO of an agent names its instance, at most 128 printable characters")
            return False
        link.instance = hello.agent
        link.version = _printable(hello.software, 64)
        if self._leaving:
            session.close(GoawayCode.DRAINING, self._leaving, RETRY_AFTER)
            return False
        return True

    async def _live(self, link: ControlConnection, session: MuxSession) -> None:
        bound = log.bind(cluster=link.cluster, connection=link.instance)
        older = [one for one in self._open if (one.cluster, one.instance) == (link.cluster, link.instance)]
        self._open.add(link)
        try:
            await self._fleet.register(link)
            self._counters.agents_total += 1
            if older:
                self._counters.agents_replaced += 1
                bound.warning("agent replaced an older connection of the same instance id")
            bound.info("agent connected", version=link.version)
            await self._seen(link)
            error = await session.wait_ended()
            bound.info("agent disconnected", cause=error.message, seconds=round(time.time() - link.since))
        finally:
            self._open.discard(link)
            await self._fleet.unregister(link)
        await self._seen(link)

    async def _seen(self, link: ControlConnection) -> None:
        try:
            await self._registry.seen(link.cluster, time.time(), version=link.version)
        except RegistryUnavailable as error:
            # Only a date for people; the agent stays connected.
            log.warning("cluster not noted as seen", cluster=link.cluster, cause=error.message)

    def _refused(self, ticket: Ticket, cluster: str, cause: str) -> None:
        self._counters.agents_refused += 1
        log.warning("agent refused", source=ticket.address, cluster=cluster, cause=cause)


def _lost(cluster: str) -> JoinRefused:
    return JoinRefused(JoinCode.NO_AGENT, f"the agent of cluster {cluster} lost its connection", retry_after=2)


def _cause(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or 'unknown'}"
    return getattr(error, "message", "") or type(error).__name__


def _printable(text: str, limit: int) -> str:
    """An agent's words, cut to what may be shown."""
    return "".join(character for character in text[:limit] if character.isascii() and character.isprintable())
