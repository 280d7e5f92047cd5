"""The rendezvous: a client and an agent of its cluster meet here and become one pump.

Step by step (docs/protocol.md, "Join"): the client's JOIN is authenticated and asked of the policy; an agent is asked
to come (DIAL, with a token that exists for this purpose alone); the agent's JOIN with that token and with a
certificate of *that* cluster claims it; the outer TLS of the agent ends in order, then the client's; both sockets are
raw and belong to the pump, which first forwards what came behind the close_notify.

Rules:

1. A dial token pairs at most one client with one agent of the cluster it was made for. It is 128 random bits, voided
   by the first agent that claims it, by the client's leaving, and by its deadline. It is looked up by its SHA-256 and
   compared in constant time, so how long an answer takes says nothing about it.
2. The client hears OK only after the agent's side is raw: until then the client is told of every failure.
3. An agent of another cluster that shows a valid token has no effect on the join it belongs to.
4. "Unknown" and "not allowed" are one answer, and both questions are always asked.
5. Every join ends paired or with both sockets closed, and leaves one line in the log; those that
   a limit refuses share one (`session_places`).
6. In a relay of several processes a token begins with the id of the worker that waits. An agent that comes out at
   another one is handed over (`relay.siblings.handover`); all of the above is judged where the client waits.
7. In a fleet a token begins with the id of the relay that waits. An agent that shows it elsewhere is passed on to that
   relay, once (`relay.hop`); all of the above is then judged there, but for the certificate.
8. The right is asked for at the beginning, whenever it may have changed while the client waits (`recheck`), and once
   more in the loop's turn in which the pump begins: from then on `relay.enforcement` watches it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from arcbridge.errors import (
    ArcbridgeError,
    ConfigError,
    ConnectionLost,
    EnrolmentRefused,
    JoinRefused,
    RemoteProtocolError,
    Unauthenticated,
)
from arcbridge.identity.claims import Identity
from arcbridge.identity.proof import Peer, ProofChecker, ProofPolicy, ProofRefused
from arcbridge.identity.refusal import ISSUER_KEYS, GroupsUnavailable, tell
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.net.join import JOIN_ID, JoinCode, ServerJoin
from arcbridge.net.sockets import reset
from arcbridge.net.tls import ALPN_HOP, ServerContext
from arcbridge.pki.authority import agent_cluster, is_relay
from arcbridge.pki.names import check_cluster_name
from arcbridge.relay.access import FORBIDDEN, Access, Loss
from arcbridge.relay.admission import Ticket
from arcbridge.relay.counters import Counters
from arcbridge.relay.fleet.base import Fleet
from arcbridge.relay.hop import Hops, token_of
from arcbridge.relay.pump import Pump, Pumps
from arcbridge.relay.registry.base import Registry, RegistryUnavailable, admit
from arcbridge.relay.session_places import JoinLimited, SessionPlace, SessionPlaces
from arcbridge.relay.siblings.channel import ChannelClosed
from arcbridge.relay.siblings.handover import AgentJoin, Handovers
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.tasks import cancel_and_wait
from arcbridge.wire.records import Dial, JoinReply, JoinRequest

DIAL_DEADLINE: Final = 10.0
"""From DIAL to the agent's JOIN."""
GUESSES: Final = 50
"""Void dial tokens that the agents of one cluster may show at once; those whose client has left show some, too."""
GUESSES_RATE: Final = 1.0
"""Void dial tokens per second that grow back."""
MAX_SHOWN: Final = 253
"""Characters of a cluster's name as a client gives it that go into the log; names are no longer."""
CLUSTERS: Final = 4096
"""Clusters whose void tokens are counted."""
_VOID: Final = "this dial token is void: the client has left, another agent was faster, or it came too late"
_RETRY_AFTER: Final = 5

log = structlog.get_logger("arcbridge.relay")


class Verifier(Protocol):
    """`identity.verifier.TokenVerifier`."""

    async def verify(self, token: str) -> Identity: ...


@dataclass(slots=True, eq=False)
class _Waiting:
    """A client whose agent has been asked to come."""

    join_id: str
    identity: Identity
    cluster: str
    token: str
    met: asyncio.Future[_Agent]


@dataclass(slots=True)
class _Agent:
    """An agent that has claimed a token; its connection belongs to the client's coroutine now."""

    join: AgentJoin
    instance: str
    address: str


class Rendezvous:
    """`serve` is the listener's handler for `arcbridge-join/1`; both ends of every session come through it."""

    def __init__(
        self,
        *,
        context: Callable[[], ServerContext],
        fleet: Fleet,
        registry: Registry,
        verifier: Verifier,
        access: Access,
        pumps: Pumps,
        counters: Counters,
        address: str,
        limits: RelayLimitsConfig,
        proofs: ProofChecker | None = None,
        hops: Hops | None = None,
        handovers: Handovers | None = None,
        dial_deadline: float = DIAL_DEADLINE,
    ) -> None:
        """`address` is this relay's `host:port` as agents reach it. `hops`: in a fleet, how to reach its others.
        `handovers`: in a relay of several processes, how to reach the others on this port."""
        self._context = context
        self._fleet = fleet
        self._registry = registry
        self._verifier = verifier
        self._access = access
        self._pumps = pumps
        self._counters = counters
        self._address = address
        self._limits = limits
        self._proofs = proofs or ProofChecker(ProofPolicy.IF_BOUND, "the relay")
        self._hops = hops
        self._handovers = handovers
        if handovers is not None:
            handovers.pair = self._pair
        self._longest_dial = dial_deadline
        self._dial_deadline = min(dial_deadline, limits.join_deadline)
        # SHA-256 of the token -> who waits for it.
        self._waiting: dict[bytes, _Waiting] = {}
        self.places = SessionPlaces(limits)
        self._guesses: KeyedTokenBucket[str] = KeyedTokenBucket(GUESSES, GUESSES_RATE, size=CLUSTERS)
        self.draining = False
        """Refuse new clients; agents that were asked to come are still let in."""
        self.joining = 0
        """Clients between their JOIN and their pump, or their refusal."""

    @property
    def pending(self) -> int:
        """Clients that wait for their agent."""
        return len(self._waiting)

    def change_limits(self, limits: RelayLimitsConfig) -> None:
        """Judge joins by these limits from now on; none that is under way, and no session, is touched."""
        self._limits = limits
        self._dial_deadline = min(self._longest_dial, limits.join_deadline)
        self.places.change(limits)

    def refuse_waiting(self) -> None:
        """Refuse the clients that still wait for their agent, as new ones are refused while draining."""
        for waiting in self._waiting.values():
            if not waiting.met.done():
                waiting.met.set_exception(_going_away())

    def recheck(self) -> None:
        """Refuse the clients that wait for their agent and have lost their right meanwhile."""
        for waiting in self._waiting.values():
            loss = self._access.loss(waiting.identity, waiting.cluster)
            if loss is not None and not waiting.met.done():
                waiting.met.set_exception(_refused(loss))

    async def serve(self, sock: socket.socket, ticket: Ticket) -> None:
        """Serve one join connection, from its handshake to the pump or to its end."""
        join = ServerJoin(sock, self._context())
        handed_over = False
        try:
            request = await self._request(join, ticket)
            if request is None:
                return
            ticket.works()
            if request.role == "agent":
                handed_over = await self._agent(join, request, ticket)
            elif request.role == "client":
                self.joining += 1
                try:
                    handed_over = await self._client(join, request, ticket)
                finally:
                    self.joining -= 1
            else:
                await join.refuse(JoinReply(code=JoinCode.BAD_REQUEST, message="a join is for a client or an agent"))
        finally:
            if not handed_over:
                # After a refusal the socket is closed already, and this does nothing.
                join.abort()

    async def _request(self, join: ServerJoin, ticket: Ticket) -> JoinRequest | None:
        """Do the handshake and return what the peer then says; None when it is over, and was told so where that is
        possible."""
        try:
            await join.handshake()
            return await join.read_request()
        except (RemoteProtocolError, ConnectionLost) as error:
            self._counters.rejected["handshake"] += 1
            log.info("join connection refused", source=ticket.address, reason=error.message)
            if isinstance(error, RemoteProtocolError):
                await join.refuse(JoinReply(code=JoinCode.BAD_REQUEST, message="this is no JOIN message"))
            return None

    # -- the client ------------------------------------------------------------------------------------------------

    async def _client(self, join: ServerJoin, request: JoinRequest, ticket: Ticket) -> bool:
        """Join a client to its agent; say whether the socket belongs to the pump now."""
        join_id = secrets.token_hex(8)
        fields: dict[str, object] = {"session": join_id, "source": ticket.address}
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with asyncio.timeout(self._limits.join_deadline):
                pump = await self._bring_together(join, request, ticket, join_id, fields)
        except JoinRefused as error:
            failure = error
        except TimeoutError:
            failure = JoinRefused(
                JoinCode.AGENT_TIMEOUT,
                f"the join was not complete within {self._limits.join_deadline:.0f} s; try again",
                retry_after=_RETRY_AFTER,
            )
        except ArcbridgeError as error:
            failure = JoinRefused(JoinCode.INTERNAL, "the relay cannot join you now; its log has the cause")
            failure.__cause__ = error
        else:
            seconds = loop.time() - begun
            self._counters.joins[JoinCode.OK.name.lower()] += 1
            self._counters.join_seconds.observe(seconds)
            log.info("joined", **fields, ms=round(seconds * 1000, 1), pump_open=not pump.closed)
            return True
        code = JoinCode(failure.code)
        self._counters.joins[code.name.lower()] += 1
        cause = failure.__cause__
        reason = getattr(cause, "message", "") or (type(cause).__name__ if cause is not None else failure.message)
        for name in ("rule", "detail"):
            if said := getattr(cause, name, ""):
                fields[name] = said
        if not isinstance(failure, JoinLimited):
            log.warning("join failed", **fields, code=code.name, reason=reason)
        elif (count := self.places.told(failure)) is not None:
            log.warning("joins refused", **fields, code=code.name, reason=failure.limit, joins=count)
        if code is not JoinCode.GONE:
            ticket.waits()
            await join.refuse(
                JoinReply(code=code, message=failure.message, retry_after=failure.retry_after or 0, join_id=join_id)
            )
        return False

    async def _bring_together(
        self, join: ServerJoin, request: JoinRequest, ticket: Ticket, join_id: str, fields: dict[str, object]
    ) -> Pump:
        fields["cluster"] = request.cluster[:MAX_SHOWN]
        identity = await self._identify(request)
        fields["user"], fields["bound"] = identity.username, identity.binding.kind.value
        if request.instance and JOIN_ID.fullmatch(request.first_session):
            fields["first_session"] = request.first_session
        self._require_proof(join, request, identity)
        ticket.leave()
        # The address paid until here, the user does from here on.
        payer = self._pumps.payer_of(identity)
        wait = self.places.wait_for(payer)
        self.places.spend(identity, resumes=bool(request.instance))
        if wait:
            await asyncio.sleep(wait)
        return await payer.steps(self._admit(join, request, join_id, fields, identity), inner=True)

    async def _admit(
        self, join: ServerJoin, request: JoinRequest, join_id: str, fields: dict[str, object], identity: Identity
    ) -> Pump:
        resumes = bool(request.instance)
        cluster_ca = await self._authorise(identity, request)
        if self.draining:
            raise _going_away()
        place = self.places.enter(identity, resumes=resumes, pending=len(self._waiting), sessions=len(self._pumps))
        try:
            return await self._pump(join, request, join_id, fields, identity, cluster_ca, place)
        except BaseException:
            place.leave()
            raise

    async def _pump(
        self,
        join: ServerJoin,
        request: JoinRequest,
        join_id: str,
        fields: dict[str, object],
        identity: Identity,
        cluster_ca: str,
        place: SessionPlace,
    ) -> Pump:
        cluster = request.cluster
        token = secrets.token_urlsafe(16)
        if self._hops is not None:
            token = token_of(self._hops.relay_id, token)
        elif self._handovers is not None:
            token = token_of(self._handovers.worker_id, token)
        waiting = _Waiting(join_id, identity, cluster, token, asyncio.get_running_loop().create_future())
        key = _key(waiting.token)
        self._waiting[key] = waiting
        agent: _Agent | None = None
        try:
            try:
                agent = await self._meet(join, waiting, request)
            finally:
                # From here on the token is void, and an agent that claimed it just now is let go below.
                self._waiting.pop(key, None)
                met = waiting.met
                if agent is None and met.done() and not met.cancelled() and met.exception() is None:
                    agent = met.result()
                met.cancel()
            fields["agent"] = agent.instance
            to_client = await self._end_agents_tls(agent, join_id)
            self._require_right(identity, cluster)
            reply = JoinReply(join_id=join_id, cluster_ca=cluster_ca, subject=identity.username)
            try:
                await join.reply(reply)
                to_agent = await join.finish()
            except (RemoteProtocolError, ConnectionLost) as error:
                raise JoinRefused(JoinCode.GONE, "the client did not finish the join") from error
            # Too late to say why, and in time to let no byte pass.
            self._require_right(identity, cluster)
        except BaseException:
            if agent is not None:
                await self._let_go(agent)
            raise
        place.joined()
        pump = self._pumps.join(
            join.sock,
            agent.join.sock,
            to_agent=to_agent,
            to_client=to_client,
            join_id=join_id,
            cluster=cluster,
            identity=identity,
            on_ended=place.leave,
        )
        pump.agent, pump.source = agent.instance, str(fields["source"])
        pump.first_session = str(fields.get("first_session", ""))
        return pump

    async def _identify(self, request: JoinRequest) -> Identity:
        try:
            return await self._verifier.verify(request.token)
        except Unauthenticated as error:
            said = tell(error, "; log in again")
            raise JoinRefused(
                JoinCode.UNAUTHENTICATED, f"the relay does not accept the access token: {said}"
            ) from error
        except GroupsUnavailable as error:
            # `detail` may name files and applications of the operator's: it is for the log alone.
            raise JoinRefused(
                JoinCode.INTERNAL, error.message, retry_after=error.retry_after or _RETRY_AFTER
            ) from error
        except ArcbridgeError as error:
            raise JoinRefused(
                JoinCode.INTERNAL,
                f"the relay cannot verify tokens now because the issuer does not answer; try again ({ISSUER_KEYS})",
                retry_after=error.retry_after or _RETRY_AFTER,
            ) from error

    def _require_proof(self, join: ServerJoin, request: JoinRequest, identity: Identity) -> None:
        """Raise `JoinRefused` unless the client has shown that the token is its own."""
        try:
            self._proofs.check(identity.binding, request.token, request.proof, Peer(join.own_key))
        except ProofRefused as error:
            raise JoinRefused(
                JoinCode.UNAUTHENTICATED, f"the relay does not accept the access token: {error.message}"
            ) from error

    async def _authorise(self, identity: Identity, request: JoinRequest) -> str:
        """Return the PEM of the cluster's CA. A user whose login was revoked hears that, whatever the cluster. For the
        rest there is one refusal for every reason, and every question is asked each time (docs/threats.md#J22)."""
        try:
            if (refused := self._access.refusal(identity)) is not None:
                raise _refused(refused)
            name = check_cluster_name(request.cluster)
            record = await self._registry.cluster(name)
        except RegistryUnavailable as error:
            raise JoinRefused(
                JoinCode.INTERNAL,
                "the relay's registry does not answer; try again",
                retry_after=error.retry_after or _RETRY_AFTER,
            ) from error
        except ConfigError as error:
            raise JoinRefused(JoinCode.FORBIDDEN, FORBIDDEN) from error
        loss = self._access.loss(identity, name)
        if record is None:
            raise _refused(Loss("cluster", FORBIDDEN, "the cluster is unknown"))
        if loss is not None:
            raise _refused(loss)
        if record.revoked:
            raise _refused(Loss("cluster", FORBIDDEN, "the cluster is revoked"))
        return record.ca_pem

    def _require_right(self, identity: Identity, cluster: str) -> None:
        """Raise `JoinRefused` where the right was lost since it was asked for."""
        if (loss := self._access.loss(identity, cluster)) is not None:
            raise _refused(loss)

    def _require_room(self) -> None:
        """Raise `JoinRefused` where no agent can be passed on: its session has a place at the relay that waits."""
        if self.draining:
            raise _going_away()
        if len(self._pumps) + len(self._waiting) >= self._limits.sessions:
            raise JoinRefused(
                JoinCode.OVERLOADED, "this relay holds all the sessions it may; try again", retry_after=10
            )

    async def _meet(self, join: ServerJoin, waiting: _Waiting, request: JoinRequest) -> _Agent:
        """Ask for an agent and wait until one has claimed the token, watching the client meanwhile."""
        loop = asyncio.get_running_loop()
        dial = Dial(
            token=waiting.token,
            address=self._address,
            cluster=waiting.cluster,
            join_id=waiting.join_id,
            instance=request.instance if len(request.instance) <= 128 else "",
            deadline=int(self._dial_deadline),
        )
        gone = loop.create_task(join.gone())
        dialled = self._fleet.dial(waiting.cluster, dial, self._dial_deadline)
        dialling = loop.create_task(self._pumps.payer_of(waiting.identity).steps(dialled, inner=True))
        watched: set[asyncio.Future[object]] = {gone, dialling, waiting.met}  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(self._dial_deadline):
                while True:
                    await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                    if gone.done():
                        self._raise_gone(gone)
                    if waiting.met.done():
                        return waiting.met.result()
                    if dialling.done():
                        dialling.result()
                        watched.discard(dialling)
        except TimeoutError as error:
            raise JoinRefused(
                JoinCode.AGENT_TIMEOUT,
                f"an agent of cluster {waiting.cluster} agreed to come but did not connect within "
                f"{self._dial_deadline:.0f} s: check that it can reach {self._address}",
                retry_after=_RETRY_AFTER,
            ) from error
        finally:
            await cancel_and_wait(gone, dialling)

    @staticmethod
    def _raise_gone(gone: asyncio.Task[None]) -> None:
        error = gone.exception()
        if isinstance(error, RemoteProtocolError):
            raise JoinRefused(JoinCode.BAD_REQUEST, f"the client broke the protocol: {error.message}") from error
        raise JoinRefused(JoinCode.GONE, "the client left before it was joined") from error

    async def _end_agents_tls(self, agent: _Agent, join_id: str) -> bytes:
        try:
            await agent.join.reply(JoinReply(join_id=join_id))
            return await agent.join.finish()
        except (RemoteProtocolError, ConnectionLost) as error:
            raise JoinRefused(
                JoinCode.AGENT_REFUSED, "the agent came but did not finish the join; try again", retry_after=1
            ) from error

    async def _let_go(self, agent: _Agent) -> None:
        """Let go of an agent whose join failed: it is told if its TLS still stands, and reset otherwise."""
        await agent.join.refuse(JoinReply(code=JoinCode.GONE, message=_VOID))

    # -- the agent -------------------------------------------------------------------------------------------------

    async def _agent(self, join: ServerJoin, request: JoinRequest, ticket: Ticket) -> bool:
        """Give an agent to its client; say whether the socket belongs to that client now."""
        refusal, reason = await self._claim(join, request, ticket)
        if refusal is None:
            return True
        self._counters.agent_joins_refused += 1
        log.warning("agent's join refused", source=ticket.address, code=JoinCode(refusal.code).name, reason=reason)
        ticket.waits()
        await join.refuse(refusal)
        return False

    async def _claim(self, join: ServerJoin, request: JoinRequest, ticket: Ticket) -> tuple[JoinReply | None, str]:
        certificate = join.peer_certificate
        if certificate is None:
            return JoinReply(code=JoinCode.UNAUTHENTICATED, message="an agent's join needs its certificate"), "none"
        try:
            cluster = agent_cluster(certificate)
            admit(await self._registry.cluster(cluster), certificate)
        except EnrolmentRefused as error:
            return JoinReply(code=JoinCode.FORBIDDEN, message=error.message), error.message
        except RegistryUnavailable as error:
            reply = JoinReply(code=JoinCode.INTERNAL, message="the relay's registry does not answer", retry_after=5)
            return reply, error.message
        ticket.leave()
        if self._hops is not None and self._hops.elsewhere(request):
            return await self._pass_on(self._hops, join, request, cluster)
        if self._handovers is not None and self._handovers.elsewhere(request):
            return await self._hand_over(self._handovers, join, request, cluster, ticket)
        reason = self._pair(join, request, cluster, ticket.address)
        if reason:
            return self._void(cluster, JoinReply(code=JoinCode.GONE, message=_VOID)), reason
        return None, ""

    def _void(self, cluster: str, reply: JoinReply) -> JoinReply:
        """Return the answer to a void token: `reply`, or to wait where the cluster's agents have shown too many.

        A token is judged before the limit is. A user who joins and leaves without end makes agents show void tokens,
        and that must not keep away the agent whose client still waits. Tokens of 128 bits need no bound on guessing;
        what a try costs is bounded by the connection that it takes.
        """
        now = time.monotonic()
        if self._guesses.reserve(cluster, now) is not None:
            return reply
        wait = math.ceil(self._guesses.wait(cluster, now))
        return JoinReply(code=JoinCode.OVERLOADED, message="too many void dial tokens: wait", retry_after=wait)

    async def _pass_on(
        self, hops: Hops, join: ServerJoin, request: JoinRequest, cluster: str
    ) -> tuple[JoinReply | None, str]:
        """Pass on an agent whose client waits at another relay of the fleet."""
        try:
            self._require_room()
            await hops.forward(join, request, cluster)
        except JoinRefused as error:
            reply = JoinReply(code=error.code, message=error.message, retry_after=error.retry_after or 0)
            if error.code == JoinCode.GONE:
                self._counters.tokens_refused += 1
                reply = self._void(cluster, reply)
            else:
                await hops.give_up(request)
            return reply, f"hop: {error.message}"
        return None, ""

    async def _hand_over(
        self, handovers: Handovers, join: ServerJoin, request: JoinRequest, cluster: str, ticket: Ticket
    ) -> tuple[JoinReply | None, str]:
        """Hand over an agent whose client waits at another worker of this relay."""
        try:
            reason = await handovers.hand_over(join, request, cluster, ticket.address)
        except JoinRefused as error:
            reply = JoinReply(code=error.code, message=error.message, retry_after=error.retry_after or 0)
            return reply, f"hand-over: {error.message}"
        except (RemoteProtocolError, ConnectionLost, ChannelClosed) as error:
            reply = JoinReply(code=JoinCode.INTERNAL, message="the join could not be handed over", retry_after=1)
            return reply, f"hand-over: {error.message}"
        if reason:
            return self._void(cluster, JoinReply(code=JoinCode.GONE, message=_VOID)), reason
        return None, ""

    def _pair(self, join: AgentJoin, request: JoinRequest, cluster: str, source: str) -> str:
        """Give the connection of an agent of `cluster` to the client that waits for it, or return why there is none."""
        key = _key(request.token)
        waiting = self._waiting.get(key)
        reason = ""
        if waiting is None or not hmac.compare_digest(waiting.token.encode(), request.token.encode()):
            reason = "void token"
        elif waiting.cluster != cluster:
            # Not a race: an agent of one cluster holds a token of another. The join it belongs to goes on
            # (docs/threats.md#J1).
            reason = f"an agent of cluster {cluster} showed a token of cluster {waiting.cluster}"
        elif waiting.met.done():
            reason = "another agent was faster"
        if reason or waiting is None:
            self._counters.tokens_refused += 1
            return reason
        del self._waiting[key]
        waiting.met.set_result(_Agent(join, _instance(request.instance), source))
        return ""

    # -- another relay of the fleet --------------------------------------------------------------------------------

    async def serve_hop(self, sock: socket.socket, ticket: Ticket) -> None:
        """Serve `arcbridge-hop/1`: an agent's join that came out at another relay. There is no second hop."""
        if self._hops is None:
            reset(sock)
            return
        join = ServerJoin(sock, self._hops.server_context(), ALPN_HOP)
        handed_over = False
        try:
            request = await self._request(join, ticket)
            if request is None:
                return
            certificate = join.peer_certificate
            if certificate is None or not is_relay(certificate):
                # An agent's certificate is of the same CA.
                log.warning("hop refused", source=ticket.address, reason="the certificate is not a relay's")
                await join.refuse(JoinReply(code=JoinCode.FORBIDDEN, message="this is between relays"))
                return
            ticket.leave()
            if request.role != "agent" or request.hops != 1:
                await join.refuse(JoinReply(code=JoinCode.BAD_REQUEST, message="a hop is an agent's, and the only one"))
                return
            reason = self._pair(join, request, request.cluster, ticket.address)
            if reason:
                self._counters.agent_joins_refused += 1
                log.warning("hop refused", source=ticket.address, cluster=request.cluster, reason=reason)
                await join.refuse(JoinReply(code=JoinCode.GONE, message=_VOID))
                return
            handed_over = True
        finally:
            if not handed_over:
                join.abort()

    def hop_failed(self, key: bytes) -> None:
        """Tell the client with this token (its SHA-256) now, and not at the deadline, that its agent came to a relay
        from which it cannot be passed on."""
        waiting = self._waiting.get(key)
        if waiting is not None and not waiting.met.done():
            waiting.met.set_exception(
                JoinRefused(
                    JoinCode.AGENT_REFUSED,
                    "the agent came to a relay that cannot reach this one; try again",
                    retry_after=1,
                )
            )


def _refused(loss: Loss) -> JoinRefused:
    refusal = JoinRefused(JoinCode.FORBIDDEN, loss.message)
    refusal.__cause__ = ConfigError(loss.cause)
    return refusal


def _going_away() -> JoinRefused:
    return JoinRefused(JoinCode.DRAINING, "this relay is going away; try again", retry_after=1)


def _key(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _instance(text: str) -> str:
    return "".join(character for character in text[:128] if character.isascii() and character.isprintable())
