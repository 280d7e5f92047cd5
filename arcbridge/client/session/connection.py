"""Connects to a cluster: a join through a relay, then TLS, HELLO and AUTH with the agent.

What a step may send is fixed by its order: the relay's TLS is verified before the access token is sent; the agent's
TLS is verified against the cluster's CA, which the caller has checked, before the cluster's token is.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import NamedTuple

from arcbridge import __version__
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays, RelaysFailed
from arcbridge.client.session.refusal import RETRY_SOON, Shown, raise_user_error, relay_unreachable
from arcbridge.client.session.trust import stated_cas
from arcbridge.errors import (
    ArcbridgeError,
    ConfigError,
    ConnectionLost,
    JoinRefused,
    PermissionRefused,
    PinMismatch,
    RemoteProtocolError,
    Unreachable,
)
from arcbridge.mux.alteration import alteration
from arcbridge.mux.connection import MuxConnection
from arcbridge.net.dialer import connect
from arcbridge.net.join import JoinCode, client_join
from arcbridge.net.session_tls import SessionStart
from arcbridge.net.tls import ALPN_JOIN, add_trust, inner_client_context
from arcbridge.pki.names import cluster_server_name
from arcbridge.pki.succession import Succession
from arcbridge.wire.records import UNRESTRICTED, JoinReply, JoinRequest, Restrictions

CONNECT_DEADLINE = 10.0
"""Seconds to reach a relay by TCP, all its addresses and the proxy included."""
HANDSHAKE_DEADLINE = 10.0
"""Seconds for the end-to-end TLS, HELLO and AUTH together; the agent allows as many."""


class ClusterAccess(NamedTuple):
    """A cluster, the relays that lead to it, and the tokens that they and it are shown."""

    relays: Relays
    cluster: str
    tokens: Tokens
    restrictions: Restrictions = UNRESTRICTED
    """What each session gives up of its user's rights."""


class Joined(NamedTuple):
    """A raw path to an agent of the cluster; its holder owns the socket, and closes it by `close`."""

    relay: RelayAccess
    sock: socket.socket
    start: SessionStart
    """Of the TLS with the agent, which trusts no CA so far."""
    reply: JoinReply
    cas: Succession
    """The CAs by one of which the agent is to be certified: those that the relay states, until they were checked."""

    def close(self) -> None:
        """Give the path up."""
        self.start.abandon()
        self.sock.close()


async def join(
    access: ClusterAccess, *, instance: str = "", first_session: str = "", leaving: RelayAccess | None = None
) -> Joined:
    """Join an agent of the cluster (the one called `instance`, where that is given) through whichever relay works.

    `first_session`: the join id under which a session began that is to be resumed; the relay's log has it.

    Raises Unauthenticated, PermissionRefused, Unreachable, PinMismatch, ConfigError or StateError, in the user's
    words. Cancelled or failed, it leaves no socket.
    """
    relays, cluster, tokens, restrictions = access
    token = await tokens.access()
    tokens.prepare()
    request = JoinRequest(
        "client",
        cluster,
        token,
        instance,
        __version__,
        first_session=first_session,
        restricted=" ".join(restrictions.kinds()),
    )

    def prove(certificate: bytes) -> str:
        return tokens.prove(token, certificate)

    async def attempt(relay: RelayAccess) -> Joined:
        try:
            return await _join_through(relay, relays, request, prove)
        except ArcbridgeError as error:
            if isinstance(error, JoinRefused) and error.code == JoinCode.NO_AGENT:
                relays.lengths.learn_absence(relay)
            if isinstance(error, Unreachable) and error.detail:
                raise relay_unreachable(relay.address.url, error) from error
            raise_user_error(error, cluster, shown=Shown(token, tokens.access_source))

    try:
        return (await relays.first_of(attempt, Joined.close, leaving=leaving))[1]
    except RelaysFailed as failed:
        error = failed.summed_up(_usefulness)
        raise error from error.__cause__


async def _join_through(
    relay: RelayAccess, relays: Relays, request: JoinRequest, prove: Callable[[bytes], str]
) -> Joined:
    context, inner = await relay.context(ALPN_JOIN), inner_client_context()
    name = cluster_server_name(request.cluster)
    sock = await connect(relay.address, deadline=CONNECT_DEADLINE)
    start = SessionStart(sock, inner, name)
    try:
        own: list[float] = []
        if relay.followed_ca:
            request = replace(request, relay_ca=relay.followed_ca)
        reply = await client_join(
            sock, context, relay.address.host, request, prove=prove, measured=own.append, flight=start
        )
        relays.lengths.learn(relay, own[0], reply.agent_round_trip / 1e6)
    except Unreachable as error:
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            relay.forget()
        raise
    try:
        cas = stated_cas(reply)
        relay.follow(reply.relay_cas)
    except ConfigError as error:
        start.abandon()
        sock.close()
        stated = "states as the cluster's CA what is not one certificate" if reply.cluster_ca else "did not say its CA"
        raise RemoteProtocolError(f"the relay {stated}; tell its operator") from error
    return Joined(relay, sock, start, reply, cas)


def _usefulness(error: ArcbridgeError) -> int:
    """Rank the failure of one of several relays by how much it tells what to do: the further a join came, the more."""
    if isinstance(error, PinMismatch):
        return 5  # there may be an attacker in between, which must not go unnoticed
    if isinstance(error, PermissionRefused):
        return 2  # a relay that does not know the cluster yet says so too
    if isinstance(error.__cause__, JoinRefused):
        refused_by_relay = error.__cause__.code in (
            JoinCode.OVERLOADED,
            JoinCode.LIMIT,
            JoinCode.DRAINING,
            JoinCode.INTERNAL,
        )
        return 3 if refused_by_relay else 4
    return 1


async def shake_hands(
    joined: Joined, cluster: str, protocol: Callable[[], MuxConnection], done: Callable[[], Awaitable[None]]
) -> None:
    """TLS with the agent over a joined socket, then whatever `done` waits for; owns the socket.

    Raises Unreachable when that takes too long, PinMismatch when it is not the cluster's agent, ConnectionLost, and
    what `done` raises. Failed or cancelled, the connection has been closed.
    """
    transport: asyncio.Transport | None = None
    try:
        add_trust(joined.start.context, joined.cas.trusted)
        async with asyncio.timeout(HANDSHAKE_DEADLINE):
            transport = await joined.start.finish(protocol(), HANDSHAKE_DEADLINE)
            await done()
    except BaseException as error:
        if transport is not None:
            transport.abort()
        joined.close()
        if isinstance(error, TimeoutError):
            raise Unreachable(
                f'the agent of cluster "{cluster}" did not answer in time; try again', retry_after=RETRY_SOON
            ) from error
        if isinstance(error, ssl.SSLCertVerificationError):
            raise PinMismatch(
                f'the peer that answered for cluster "{cluster}" is not certified by its CA; '
                "another party may be in between: tell the relay's operator"
            ) from error
        if isinstance(error, OSError):
            raise alteration(error) or ConnectionLost("it ended during the handshake with the agent") from error
        raise
