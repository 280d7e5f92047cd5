"""The rendezvous: the listener's handler for joins, at which a client and an agent of its cluster become one pump.

Both ends say JOIN inside an outer TLS of their own. `client_join` serves clients, `agent_join` agents, and they meet in
`pending_dials`. Invariant: every join connection ends handed over (to the pump, or to another process), or closed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from arcbridge.net.join import JoinCode, ServerJoin
from arcbridge.net.tls import ServerContext
from arcbridge.relay.admission import Ticket
from arcbridge.relay.agent_join import AgentJoins, read_request
from arcbridge.relay.client_join import ClientJoins
from arcbridge.relay.counters import Counters
from arcbridge.wire.records import JoinReply


class Rendezvous:
    """`serve` is the listener's handler for `arcbridge-join/1`; both ends of every session come through it."""

    def __init__(
        self, context: Callable[[], ServerContext], clients: ClientJoins, agents: AgentJoins, counters: Counters
    ) -> None:
        self._context = context
        self._clients = clients
        self._agents = agents
        self._counters = counters

    async def serve(self, sock: socket.socket, ticket: Ticket) -> None:
        """Serve one join connection, from its handshake to the pump or to its end."""
        join = ServerJoin(sock, self._context())
        handed_over = False
        try:
            request = await read_request(join, ticket, self._counters)
            if request is None:
                return
            ticket.works()
            if request.role == "agent":
                handed_over = await self._agents.serve(join, request, ticket)
            elif request.role == "client":
                handed_over = await self._clients.serve(join, request, ticket)
            else:
                await join.refuse(JoinReply(code=JoinCode.BAD_REQUEST, message="a join is for a client or an agent"))
        finally:
            if not handed_over:
                # After a refusal the socket is closed already, and this does nothing.
                join.abort()
