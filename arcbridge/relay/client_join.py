"""A client's join, from its JOIN to the pump: who it is, what it may, its agent, and the end of both outer TLS.

Step by step (docs/protocol.md, "Join"): the client's JOIN is authenticated and judged by the policy; an agent is asked
to come (DIAL, with a token that exists for this purpose alone); the agent that claims the token ends its outer TLS in
order, then the client does; both sockets are raw and belong to the pump, which first forwards what came behind the
close_notify.

Rules:

1. The client is sent OK only after the agent's side is raw: until then it is sent the reason of every failure.
2. "Unknown" and "not allowed" are one answer, and both questions are always asked.
3. Every join ends paired or with both sockets closed, and leaves one line in the log; those that a limit refuses share
   one (`session_slots`).
4. The right is asked for at the beginning, whenever it may have changed while the client waits (`recheck`), and once
   more in the loop's turn in which the pump begins: from then on `relay.enforcement` watches it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

import structlog

from arcbridge import legacy_refusals
from arcbridge.errors import (
    ArcbridgeError,
    ConfigError,
    ConnectionLost,
    JoinRefused,
    RemoteProtocolError,
    Unauthenticated,
)
from arcbridge.identity.claims import Identity
from arcbridge.identity.proof import Peer, ProofRefused
from arcbridge.identity.refusal import GroupsUnavailable
from arcbridge.net.join import JOIN_ID, JoinCode, ServerJoin
from arcbridge.pki.names import check_cluster_name
from arcbridge.refusals import NO_REFUSAL, Refusal, RefusalRule, sendable_groups
from arcbridge.relay.access import FORBIDDEN, CallerChecks, Loss, RevocationsAwaited
from arcbridge.relay.admission import Ticket
from arcbridge.relay.counters import Counters
from arcbridge.relay.fleet.base import Fleet
from arcbridge.relay.pending_dials import VOID, ClaimedAgent, PendingDial, PendingDials
from arcbridge.relay.pump import Pump, Pumps
from arcbridge.relay.registry.base import ClusterRecord, Registry, RegistryUnavailable
from arcbridge.relay.session_slots import JoinLimited, SessionSlot, SessionSlots
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.tasks import cancel_and_wait
from arcbridge.wire.records import RESTRICTION_KINDS, Dial, JoinReply, JoinRequest

DIAL_DEADLINE: Final = 10.0
"""Seconds from DIAL to the agent's JOIN."""
MOST_GROUPS: Final = 20
"""Groups of a refused user that go into the log."""
MAX_SHOWN: Final = 253
"""Characters of a cluster's name as a client gives it that go into the log; names are no longer."""
_RETRY_AFTER: Final = 5

log = structlog.get_logger("arcbridge.relay")


@dataclass(slots=True, eq=False)
class _JoinAttempt:
    """One join of a client."""

    join: ServerJoin
    request: JoinRequest
    ticket: Ticket
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the line in the log; more of them the further the join has come."""
    identity: Identity | None = None
    """Who it is, once that is known."""
    cluster: str = ""
    """The cluster, once it is known that the user may reach it."""

    @property
    def resumes(self) -> bool:
        return bool(self.request.instance)


@dataclass(eq=False, repr=False)
class ClientJoins:
    """The joins of clients at one process."""

    dials: PendingDials
    fleet: Fleet
    registry: Registry
    checks: CallerChecks
    pumps: Pumps
    counters: Counters
    _: KW_ONLY
    address: str
    """This relay's `host:port` as agents reach it."""
    limits: RelayLimitsConfig
    dial_deadline: float = DIAL_DEADLINE
    """Seconds for which an agent is waited for at most."""
    relay_cas: Callable[[], tuple[str, str]] = lambda: ("", "")
    """The relay's CAs, for clients to follow, and the pin of the newest; empty where there was no rotation."""

    def __post_init__(self) -> None:
        self.slots = SessionSlots(self.limits)
        self.change_limits(self.limits)
        self.draining = False
        """Refuse new clients; agents that were asked to come are still let in."""
        self.joining = 0
        """Clients between their JOIN and their pump, or their refusal."""

    @property
    def pending(self) -> int:
        """Clients that wait for their agent."""
        return len(self.dials)

    def change_limits(self, limits: RelayLimitsConfig) -> None:
        """Judge joins by these limits from now on; none that is under way, and no session, is touched."""
        self.limits = limits
        self._dial_deadline = min(self.dial_deadline, limits.join_deadline)
        self.slots.change(limits)

    def refuse_pending(self) -> None:
        """Refuse the clients that still wait for their agent, as new ones are refused while draining."""
        self.dials.refuse(lambda dial: _going_away())

    def recheck(self) -> None:
        """Refuse the clients that wait for their agent and have lost their right meanwhile."""

        def lost(dial: PendingDial) -> JoinRefused | None:
            loss = self.checks.access.loss(dial.identity, dial.cluster)
            return None if loss is None else self._refused(loss, dial.identity)

        self.dials.refuse(lost)

    def require_room(self) -> None:
        """Raise `JoinRefused` where no agent can be passed on: its session has a slot at the relay that waits."""
        if self.draining:
            raise _going_away()
        if len(self.pumps) + len(self.dials) >= self.limits.sessions:
            raise JoinRefused(
                JoinCode.OVERLOADED, "this relay holds all the sessions it may; try again", retry_after=10
            )

    async def serve(self, join: ServerJoin, request: JoinRequest, ticket: Ticket) -> bool:
        """Join a client to its agent; return whether the socket belongs to the pump now."""
        self.joining += 1
        try:
            return await self._serve(_JoinAttempt(join, request, ticket))
        finally:
            self.joining -= 1

    async def _serve(self, attempt: _JoinAttempt) -> bool:
        attempt.fields = {"session": attempt.id, "source": attempt.ticket.address}
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with asyncio.timeout(self.limits.join_deadline):
                pump = await self._judge(attempt)
        except JoinRefused as error:
            failure = error
        except TimeoutError:
            failure = JoinRefused(
                JoinCode.AGENT_TIMEOUT,
                f"the join was not complete within {self.limits.join_deadline:.0f} s; try again",
                retry_after=_RETRY_AFTER,
            )
        except ArcbridgeError as error:
            failure = JoinRefused(JoinCode.INTERNAL, "the relay cannot join you now; its log has the cause")
            failure.__cause__ = error
        else:
            seconds = loop.time() - begun
            self.counters.joined(attempt.cluster, JoinCode.OK)
            self.counters.join_seconds.observe(seconds)
            log.info("joined", **attempt.fields, ms=round(seconds * 1000, 1), pump_open=not pump.closed)
            return True
        code = JoinCode(failure.code)
        self.counters.joined(attempt.cluster, code)
        self._log_failure(attempt, failure)
        if code is not JoinCode.GONE:
            attempt.ticket.waits()
            reply = JoinReply(
                code=code,
                message=legacy_refusals.with_rule(failure.message, failure.refusal),
                retry_after=failure.retry_after or 0,
                join_id=attempt.id,
                rule=failure.refusal.rule,
                wanted=failure.refusal.wanted,
                groups="\n".join(failure.refusal.groups),
                more_groups=failure.refusal.more_groups,
            )
            await attempt.join.refuse(reply)
        return False

    def _log_failure(self, attempt: _JoinAttempt, failure: JoinRefused) -> None:
        cause, code = failure.__cause__ or failure, JoinCode(failure.code).name
        reason = getattr(cause, "message", "") or type(cause).__name__
        if attempt.identity is not None and failure.code != JoinCode.GONE:
            user, rule = attempt.identity.username, failure.refusal.rule
            # What is about this machine is for the log: administrators of one cluster read this.
            known = failure.message if failure.code == JoinCode.INTERNAL else reason
            self.checks.refusals.note(user, attempt.request.cluster[:MAX_SHOWN], code, str(rule), known, attempt.id)
        if isinstance(failure, JoinLimited):
            if (count := self.slots.refused_since_logged(failure)) is not None:
                log.warning("joins refused", **attempt.fields, code=code, reason=failure.limit, joins=count)
            return
        attempt.fields |= failure.log_fields()  # the relay's own rule, where the cause has none
        if isinstance(cause, ArcbridgeError):
            attempt.fields |= cause.log_fields()
        if failure.refusal.rule is RefusalRule.POLICY_RULE and attempt.identity is not None:
            groups = self.checks.access.known_groups(attempt.identity)
            left_out = max(len(groups.names) - MOST_GROUPS, 0)
            attempt.fields |= {"groups": groups.names[:MOST_GROUPS], "more_groups": groups.more + left_out}
            if claim := attempt.identity.missing_groups_claim:
                attempt.fields["detail"] = f"the token has no claim {claim!r}, from which its groups are taken"
        log.warning("join failed", **attempt.fields, code=code, reason=reason)

    # -- who it is, and what it may --------------------------------------------------------------------------------

    async def _judge(self, attempt: _JoinAttempt) -> Pump:
        request, fields = attempt.request, attempt.fields
        fields["cluster"] = request.cluster[:MAX_SHOWN]
        identity = await self._identify(request)
        attempt.identity = identity
        fields["user"], fields["bound"] = identity.username, identity.binding.kind.value
        if identity.actor:
            fields["actor"] = identity.actor
        if attempt.resumes and JOIN_ID.fullmatch(request.first_session):
            fields["first_session"] = request.first_session
        self._require_proof(attempt.join, request, identity)
        self.checks.recent.note(identity, self.checks.access.known_groups(identity), request.relay_ca)
        _, newest = self.relay_cas()
        if newest:
            self.counters.joins_newest_ca["yes" if request.relay_ca == newest else "no"] += 1
        attempt.ticket.leave()
        # The address paid until here, the user does from here on.
        payer = self.pumps.payer_of(identity)
        wait = self.slots.wait_for(payer)
        self.slots.spend(identity, resumes=attempt.resumes)
        if wait:
            await asyncio.sleep(wait)
        return await payer.steps(self._admit(attempt, identity), inner=True)

    async def _admit(self, attempt: _JoinAttempt, identity: Identity) -> Pump:
        record = await self._authorise(identity, attempt.request)
        attempt.cluster = attempt.request.cluster
        if self.draining:
            raise _going_away()
        slot = self.slots.enter(identity, resumes=attempt.resumes, pending=len(self.dials), sessions=len(self.pumps))
        try:
            return await self._pair(attempt, identity, record, slot)
        except BaseException:
            slot.leave()
            raise

    async def _identify(self, request: JoinRequest) -> Identity:
        try:
            return await self.checks.verifier.verify(request.token)
        except Unauthenticated as error:
            raise _not_accepted(error, "; log in again") from error
        except GroupsUnavailable as error:
            # `detail` may name files and applications of the operator's: it is for the log alone.
            wait = error.retry_after or _RETRY_AFTER
            raise JoinRefused(JoinCode.INTERNAL, error.message, retry_after=wait, refusal=error.refusal) from error
        except ArcbridgeError as error:
            raise JoinRefused(
                JoinCode.INTERNAL,
                "the relay cannot verify tokens now because the issuer does not answer; try again",
                retry_after=error.retry_after or _RETRY_AFTER,
                refusal=Refusal(RefusalRule.ISSUER_KEYS),
            ) from error

    def _require_proof(self, join: ServerJoin, request: JoinRequest, identity: Identity) -> None:
        """Raise `JoinRefused` unless the client has shown that the token is its own."""
        try:
            self.checks.proofs.check(identity.binding, request.token, request.proof, Peer(join.own_key))
        except ProofRefused as error:
            raise _not_accepted(error) from error

    async def _authorise(self, identity: Identity, request: JoinRequest) -> ClusterRecord:
        """Return the cluster's record. A user whose login was revoked is told so, whatever the cluster. For the
        rest there is one refusal for every reason, and every question is asked each time (docs/threats.md#J22)."""
        try:
            if (refused := self.checks.access.refusal(identity)) is not None:
                raise self._refused(refused, identity)
            name = check_cluster_name(request.cluster)
            record = await self.registry.cluster(name)
        except RegistryUnavailable as error:
            words = error.message if isinstance(error, RevocationsAwaited) else "the relay's registry does not answer"
            raise JoinRefused(
                JoinCode.INTERNAL, f"{words}; try again", retry_after=error.retry_after or _RETRY_AFTER
            ) from error
        except ConfigError as error:
            raise self._refused(Loss("cluster", FORBIDDEN, error.message), identity) from error
        loss = self.checks.access.loss(identity, name)
        if record is None:
            raise self._refused(Loss("cluster", FORBIDDEN, "the cluster is unknown"), identity)
        if loss is not None:
            raise self._refused(loss, identity)
        if record.revoked:
            raise self._refused(Loss("cluster", FORBIDDEN, "the cluster is revoked"), identity)
        return record

    def _require_right(self, identity: Identity, cluster: str) -> None:
        """Raise `JoinRefused` where the right was lost since it was asked for."""
        if (loss := self.checks.access.loss(identity, cluster)) is not None:
            raise self._refused(loss, identity)

    def _refused(self, loss: Loss, identity: Identity) -> JoinRefused:
        """Return the refusal of a user who may not use the cluster, with the groups that came. Of an unknown cluster
        and one that is not allowed all fields are the same."""
        groups = self.checks.access.known_groups(identity)
        sent = sendable_groups(groups.names)
        more = groups.more + len(groups.names) - len(sent)
        refusal = JoinRefused(
            JoinCode.FORBIDDEN,
            loss.message,
            refusal=Refusal(RefusalRule.POLICY_RULE, identity.missing_groups_claim, sent, more)
            if loss.kind != "user"
            else NO_REFUSAL,
        )
        refusal.__cause__ = ConfigError(loss.cause)
        return refusal

    # -- its agent -------------------------------------------------------------------------------------------------

    async def _pair(self, attempt: _JoinAttempt, identity: Identity, record: ClusterRecord, slot: SessionSlot) -> Pump:
        """Bring client and agent together, and both their sockets into a pump."""
        join, request = attempt.join, attempt.request
        dial = self.dials.open(attempt.id, identity, request.cluster)
        agent: ClaimedAgent | None = None
        try:
            try:
                agent = await self._dial(join, dial, request)
            except BaseException:
                # An agent that claimed the token just now is let go below.
                agent = self.dials.close(dial)
                raise
            self.dials.close(dial)
            attempt.fields["agent"] = agent.instance
            to_client = await self._end_agents_tls(agent, attempt.id)
            self._require_right(identity, request.cluster)
            reply = JoinReply(
                join_id=attempt.id,
                cluster_ca=record.ca_pem,
                subject=identity.username,
                relay_cas=self.relay_cas()[0],
                cluster_cas=record.cas,
                agent_round_trip=agent.round_trip,
            )
            try:
                await join.reply(reply)
                to_agent = await join.finish()
            except (RemoteProtocolError, ConnectionLost) as error:
                raise JoinRefused(JoinCode.GONE, "the client did not finish the join") from error
            # Too late to say why, and in time to let no byte pass.
            self._require_right(identity, request.cluster)
        except BaseException:
            if agent is not None:
                # It reads the reason where its TLS still stands, and is reset otherwise.
                await agent.join.refuse(VOID)
            raise
        slot.joined()
        pump = self.pumps.join(
            join.sock,
            agent.join.sock,
            to_agent=to_agent,
            to_client=to_client,
            join_id=attempt.id,
            cluster=request.cluster,
            identity=identity,
            on_ended=slot.leave,
        )
        pump.agent, pump.source = agent.instance, attempt.ticket.address
        pump.first_session = attempt.fields.get("first_session", "")
        known = [word for word in request.restricted.split() if word in RESTRICTION_KINDS]
        pump.restricted = " ".join(dict.fromkeys(known))
        return pump

    async def _dial(self, join: ServerJoin, dial: PendingDial, request: JoinRequest) -> ClaimedAgent:
        """Ask for an agent and wait until one has claimed the token, watching the client meanwhile."""
        loop = asyncio.get_running_loop()
        message = Dial(
            token=dial.token,
            address=self.address,
            cluster=dial.cluster,
            join_id=dial.join_id,
            instance=request.instance if len(request.instance) <= 128 else "",
            deadline=int(self._dial_deadline),
        )
        dialled = self.fleet.dial(dial.cluster, message, self._dial_deadline)
        dialling = loop.create_task(self.pumps.payer_of(dial.identity).steps(dialled, inner=True))
        dialling.add_done_callback(dial.dialled)
        try:
            join.watch(dial.left)
            async with asyncio.timeout(self._dial_deadline):
                return await dial.claimed
        except TimeoutError as error:
            raise JoinRefused(
                JoinCode.AGENT_TIMEOUT,
                f"an agent of cluster {dial.cluster} agreed to come but did not connect within "
                f"{self._dial_deadline:.0f} s: check that it can reach {self.address}",
                retry_after=_RETRY_AFTER,
            ) from error
        finally:
            join.unwatch()
            if not dialling.done():
                await cancel_and_wait(dialling)

    async def _end_agents_tls(self, agent: ClaimedAgent, join_id: str) -> bytes:
        try:
            await agent.join.reply(JoinReply(join_id=join_id))
            return await agent.join.finish()
        except (RemoteProtocolError, ConnectionLost) as error:
            raise JoinRefused(
                JoinCode.AGENT_REFUSED, "the agent came but did not finish the join; try again", retry_after=1
            ) from error


def _not_accepted(error: Unauthenticated, more: str = "") -> JoinRefused:
    message = f"the relay does not accept the access token: {error.message}{more}"
    return JoinRefused(JoinCode.UNAUTHENTICATED, message, refusal=error.refusal)


def _going_away() -> JoinRefused:
    return JoinRefused(JoinCode.DRAINING, "this relay is going away; try again", retry_after=1)
