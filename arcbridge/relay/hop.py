"""Passes an agent's join on, once, from the relay where it comes out to the relay that waits for it.

Where all relays share one address behind a load balancer, the agent dials that address and comes out anywhere. Its
dial token begins with the id of the relay that waits. A relay that is not this one, having checked the agent's
certificate as for a join of its own, connects to the internal address of the one that waits (ALPN `arcbridge-hop/1`,
both ends show a certificate of the relays' CA), and says JOIN there in the agent's place: with the token, the cluster
that it verified, and `hops` 1. What follows is the ordinary join, twice: the outer TLS between the relays ends in
order, then that of the agent, and from then on both relays pump bytes that neither can read.

Never two hops: a relay that gets `hops` 1 pairs it or says GONE. And the address comes from the relay that has the id,
over NATS, never from the agent: its token can at most name a relay that exists.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import Final

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError, ConnectionLost, JoinRefused, RemoteProtocolError, Unreachable
from arcbridge.net.address import parse_address
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.join import JoinCode, ServerJoin, client_join
from arcbridge.net.sockets import reset
from arcbridge.net.tls import ALPN_HOP, RelayTrust, ServerContext, hop_server_context, outer_client_context
from arcbridge.observe.metrics import Metrics
from arcbridge.pki.authority import Authority
from arcbridge.relay.fleet.base import RelayPeers
from arcbridge.relay.pending_dials import PendingDials, process_of
from arcbridge.relay.pump import Pumps
from arcbridge.wire.records import JoinReply, JoinRequest

HOP_NAME: Final = "hop.arcbridge"
"""The server name of every relay towards another: which one it is shows by what it answers to the token."""
CONNECT_DEADLINE: Final = 2.0
"""Seconds. Relays are close to each other; a cut between them should cost a client no more than this."""
JOIN_DEADLINE: Final = 8.0
RENEW: Final = 7 * 86400.0
"""Seconds after which a relay gives itself another certificate; each is good for much longer."""
_GONE: Final = "this dial token is void: the relay that waited is gone, or does not wait any more"
_RETRY_AFTER: Final = 1

OUTCOMES: Final = ("joined", "gone", "unreachable", "failed")

log = structlog.get_logger("arcbridge.relay")


class Hops:
    """Both sides of the hop, as far as they are not the rendezvous' own."""

    def __init__(
        self, peers: RelayPeers, *, authority: Authority, pumps: Pumps, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.process_id = peers.relay_id
        self._peers = peers
        self._authority = authority
        self._pumps = pumps
        self._clock = clock
        self._made, self._ca = 0.0, ""
        self._contexts: tuple[ServerContext, ssl.SSLContext] | None = None
        self._count_void: Callable[[], None] = lambda: None
        self.outcomes = dict.fromkeys(OUTCOMES, 0)

    def server_context(self) -> ServerContext:
        """Return the TLS context for connections from other relays."""
        return self._fresh()[0]

    def attach(self, dials: PendingDials) -> None:
        self._count_void = dials.count_void
        self._peers.on_failed = dials.hop_failed

    def add_metrics(self, metrics: Metrics) -> None:
        metrics.counter(
            "hops_total",
            "Joins of agents that were passed on to the relay they are for, by how that ended.",
            {"result": OUTCOMES},
            lambda: self.outcomes,
        )

    def is_elsewhere(self, request: JoinRequest) -> bool:
        """Return whether this join of an agent is for another relay, and may be passed on."""
        return request.hops == 0 and process_of(request.token) not in ("", self.process_id)

    async def pass_on(
        self, join: ServerJoin, request: JoinRequest, cluster: str, require_room: Callable[[], None]
    ) -> str:
        """Pass the join of an agent of `cluster` on to the relay that it is for: see `Detour`.

        Where that fails, the relay that waits is told, so that its client need not wait.
        """
        relay_id = process_of(request.token)
        try:
            require_room()
            await self._forward(relay_id, join, request, cluster)
        except JoinRefused as error:
            of = {JoinCode.GONE: "gone", JoinCode.INTERNAL: "unreachable"}
            outcome = of.get(JoinCode(error.code), "failed")
            self.outcomes[outcome] += 1
            if outcome == "gone":
                self._count_void()
                return error.message
            await self._peers.tell_failed(relay_id, request.token)
            raise
        self.outcomes["joined"] += 1
        return ""

    async def _forward(self, relay_id: str, join: ServerJoin, request: JoinRequest, cluster: str) -> None:
        try:
            address = await self._peers.address_of(relay_id)
        except ArcbridgeError as error:
            raise _unreachable() from error
        if not address:
            raise JoinRefused(JoinCode.GONE, _GONE)
        forwarded = JoinRequest(
            role="agent",
            cluster=cluster,
            token=request.token,
            instance=request.instance,
            version=request.version,
            hops=1,
            round_trip=request.round_trip,
        )
        try:
            sock = await connect(parse_address(address), deadline=CONNECT_DEADLINE, proxy=DIRECT)
            reply = await client_join(
                sock, self._fresh()[1], HOP_NAME, forwarded, alpn=ALPN_HOP, deadline=JOIN_DEADLINE
            )
        except JoinRefused:
            raise
        except (Unreachable, ConnectionLost, RemoteProtocolError, ConfigError) as error:
            log.warning("relay not reached for a hop", address=address, reason=error.message)
            raise _unreachable() from error
        try:
            await join.reply(JoinReply(join_id=reply.join_id))
            left_over = await join.finish()
        except (RemoteProtocolError, ConnectionLost) as error:
            reset(sock)
            raise JoinRefused(JoinCode.AGENT_REFUSED, "the agent did not finish the join") from error
        except BaseException:
            reset(sock)
            raise
        log.info("joined over a hop", session=reply.join_id, cluster=cluster, relay=relay_id)
        self._pumps.join(sock, join.sock, to_client=left_over, join_id=reply.join_id, cluster=cluster)

    def _fresh(self) -> tuple[ServerContext, ssl.SSLContext]:
        """Return contexts as server and as client, with certificates that are not old."""
        now, ca = self._clock(), self._authority.trusted_pem
        if self._contexts is None or now - self._made > RENEW or ca != self._ca:
            server, client = self._authority.issue_server([HOP_NAME]), self._authority.issue_relay()
            certificate = (client.certificate_pem, client.key_pem)
            self._contexts = (
                hop_server_context(server.certificate_pem, server.key_pem, ca),
                outer_client_context(RelayTrust(ca), ALPN_HOP, client_certificate=certificate),
            )
            self._made, self._ca = now, ca
        return self._contexts


def _unreachable() -> JoinRefused:
    return JoinRefused(
        JoinCode.INTERNAL,
        "the relay that waits for this join cannot be reached from here now",
        retry_after=_RETRY_AFTER,
    )
