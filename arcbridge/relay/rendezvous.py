"""The rendezvous: the listener's handler for joins, at which a client and an agent of its cluster become one pump.

Both ends say JOIN inside an outer TLS of their own, and meet in `pending_dials`. `client_join` serves clients. Here an
agent's certificate is checked, and its dial token is claimed where the client waits: in this process, or in another
one, to which it is passed on (`Detour`); a join that another relay of the fleet passes on arrives by `serve_hop`.

Invariants: every join connection ends handed over (to the pump, or to another process), or closed; an agent of another
cluster that shows a valid token has no effect on the join that the token belongs to.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from arcbridge.errors import ConnectionLost, EnrolmentRefused, JoinRefused, RemoteProtocolError, StateError
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.net.join import JoinCode, ServerJoin
from arcbridge.net.tls import ALPN_HOP, ServerContext
from arcbridge.pki.authority import agent_cluster, is_relay
from arcbridge.relay.admission import Ticket
from arcbridge.relay.client_join import MAX_SHOWN, ClientJoins
from arcbridge.relay.counters import Counters
from arcbridge.relay.pending_dials import VOID, Detour, PendingDials
from arcbridge.relay.registry.base import Registry, RegistryUnavailable, admit
from arcbridge.wire.records import JoinReply, JoinRequest

GUESSES: Final = 50
"""Void dial tokens that the agents of one cluster may show at once; those whose client has left show some, too."""
GUESSES_RATE: Final = 1.0
"""Void dial tokens per second that grow back."""
CLUSTERS: Final = 4096
"""Clusters whose void tokens are counted."""
log = structlog.get_logger("arcbridge.relay")


@dataclass(eq=False, repr=False)
class AgentJoins:
    """The joins of agents at one process."""

    dials: PendingDials
    registry: Registry
    counters: Counters
    detour: Detour | None
    """The way to other processes of the relay or the fleet."""
    require_room: Callable[[], None]
    """Raises `JoinRefused` where no join can be passed on for which this process has a pump."""

    def __post_init__(self) -> None:
        self._guesses: KeyedTokenBucket[str] = KeyedTokenBucket(GUESSES, GUESSES_RATE, size=CLUSTERS)

    async def serve(self, join: ServerJoin, request: JoinRequest, ticket: Ticket) -> bool:
        """Give an agent to its client; return whether the socket belongs to that client now."""
        refusal, reason = await self._claim(join, request, ticket)
        if refusal is None:
            return True
        self.counters.agent_joins_refused += 1
        log.warning("agent's join refused", source=ticket.address, code=JoinCode(refusal.code).name, reason=reason)
        ticket.waits()
        await join.refuse(refusal)
        return False

    async def _claim(self, join: ServerJoin, request: JoinRequest, ticket: Ticket) -> tuple[JoinReply | None, str]:
        """Return what the agent is refused with, and the reason for the log; None where the token was claimed."""
        certificate = join.peer_certificate
        if certificate is None:
            return JoinReply(code=JoinCode.UNAUTHENTICATED, message="an agent's join needs its certificate"), "none"
        try:
            cluster = agent_cluster(certificate)
            admit(await self.registry.cluster(cluster), certificate)
        except EnrolmentRefused as error:
            return JoinReply(code=JoinCode.FORBIDDEN, message=error.message), error.message
        except (RegistryUnavailable, StateError) as error:
            reply = JoinReply(code=JoinCode.INTERNAL, message="the relay's registry does not answer", retry_after=5)
            return reply, error.message
        ticket.leave()
        detour = self.detour
        if detour is None or not detour.is_elsewhere(request):
            reason = self.dials.claim(join, request, cluster)
        else:
            try:
                reason = await detour.pass_on(join, request, cluster, self.require_room)
            except JoinRefused as error:
                reply = JoinReply(code=error.code, message=error.message, retry_after=error.retry_after or 0)
                return reply, f"not passed on: {getattr(error.__cause__, 'message', '') or error.message}"
        return (self._void(cluster), reason) if reason else (None, "")

    def _void(self, cluster: str) -> JoinReply:
        """Return the answer to a void token, or the one to wait where the cluster's agents have shown too many.

        A token is judged before the limit is. A user who joins and leaves without end makes agents show void tokens,
        and that must not keep away the agent whose client still waits. Tokens of 128 bits need no bound on guessing;
        what a try costs is bounded by the connection that it takes.
        """
        now = time.monotonic()
        if self._guesses.reserve(cluster, now) is not None:
            return VOID
        wait = math.ceil(self._guesses.wait(cluster, now))
        return JoinReply(code=JoinCode.OVERLOADED, message="too many void dial tokens: wait", retry_after=wait)

    async def serve_hop(self, context: Callable[[], ServerContext], sock: socket.socket, ticket: Ticket) -> None:
        """Serve `arcbridge-hop/1`: an agent's join that came out at another relay. There is no second hop."""
        join = ServerJoin(sock, context(), ALPN_HOP)
        claimed = False
        try:
            request = await read_request(join, ticket, self.counters)
            if request is not None:
                refusal, reason = self._claim_for_relay(join, request, ticket)
                claimed = refusal is None
                if refusal is not None:
                    cluster = request.cluster[:MAX_SHOWN]
                    log.warning("hop refused", source=ticket.address, cluster=cluster, reason=reason)
                    await join.refuse(refusal)
        finally:
            if not claimed:
                join.abort()

    def _claim_for_relay(self, join: ServerJoin, request: JoinRequest, ticket: Ticket) -> tuple[JoinReply | None, str]:
        certificate = join.peer_certificate
        if certificate is None or not is_relay(certificate):
            # An agent's certificate is of the same CA.
            reply = JoinReply(code=JoinCode.FORBIDDEN, message="this is between relays")
            return reply, "the certificate is not a relay's"
        ticket.leave()
        if request.role != "agent" or request.hops != 1:
            reply = JoinReply(code=JoinCode.BAD_REQUEST, message="a hop is an agent's, and the only one")
            return reply, "it is no first hop of an agent"
        if reason := self.dials.claim(join, request, request.cluster):
            self.counters.agent_joins_refused += 1
            return VOID, reason
        return None, ""


async def read_request(join: ServerJoin, ticket: Ticket, counters: Counters) -> JoinRequest | None:
    """Do the handshake and return what the peer then asks for; None when it is over, and the peer was sent a reason
    where that is possible."""
    try:
        await join.handshake()
        return await join.read_request()
    except (RemoteProtocolError, ConnectionLost) as error:
        counters.rejected["handshake"] += 1
        log.info("join connection refused", source=ticket.address, reason=error.message)
        if isinstance(error, RemoteProtocolError):
            await join.refuse(JoinReply(code=JoinCode.BAD_REQUEST, message="this is no JOIN message"))
        return None


@dataclass(eq=False, repr=False)
class Rendezvous:
    """`serve` is the listener's handler for joins; both ends of every session come through it."""

    context: Callable[[], ServerContext]
    clients: ClientJoins
    agents: AgentJoins
    counters: Counters

    async def serve(self, sock: socket.socket, ticket: Ticket) -> None:
        """Serve one join connection, from its handshake to the pump or to its end."""
        join = ServerJoin(sock, self.context())
        handed_over = False
        try:
            request = await read_request(join, ticket, self.counters)
            if request is None:
                return
            ticket.works()
            if request.role == "agent":
                handed_over = await self.agents.serve(join, request, ticket)
            elif request.role == "client":
                handed_over = await self.clients.serve(join, request, ticket)
            else:
                await join.refuse(JoinReply(code=JoinCode.BAD_REQUEST, message="a join is for a client or an agent"))
        finally:
            if not handed_over:
                # After a refusal the socket is closed already, and this does nothing.
                join.abort()
