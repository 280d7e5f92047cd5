"""Puts the relay together: registry and fleet, the port and its connection handlers, periodic work.

It decides nothing about a single connection, and how the relay goes away is `relay.drain`'s. Everything that can fail
because of the settings has failed before the port is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Final

import structlog

from arcbridge.checks.self_checks import SelfChecks
from arcbridge.errors import StateError
from arcbridge.identity.groups import GroupSources
from arcbridge.identity.policy import PolicyFile
from arcbridge.identity.proof import ProofChecker
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.loop_shares import LoopTimes
from arcbridge.net import client_hello
from arcbridge.net.descriptors import raise_limit
from arcbridge.net.fetch import HttpFetcher
from arcbridge.net.tls import ALPN_CONTROL, ALPN_HTTP, ALPN_JOIN
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.reloads import Outcome, Reloads
from arcbridge.observe.server import ObserveServer
from arcbridge.pki.authority import Authority
from arcbridge.relay.access import Access
from arcbridge.relay.admin_socket import AdminSocket
from arcbridge.relay.admission import Admission
from arcbridge.relay.backend import open_backend
from arcbridge.relay.capacity import capacity, warn
from arcbridge.relay.certificate import ServerCertificate
from arcbridge.relay.control import ControlServer
from arcbridge.relay.counters import Counters
from arcbridge.relay.data_dir import only_one, open_authority
from arcbridge.relay.drain import Drain
from arcbridge.relay.enforcement import Enforcement
from arcbridge.relay.fleet.base import Fleet, Lost
from arcbridge.relay.hop import Hops
from arcbridge.relay.http.api import Limited, build_app, caller_bucket
from arcbridge.relay.http.client_files import ClientFiles
from arcbridge.relay.http.handler import HttpHandler
from arcbridge.relay.http.login_settings import login_document
from arcbridge.relay.http.server import HttpApiServer
from arcbridge.relay.listener import ConnectionHandler, Listener
from arcbridge.relay.metrics import register, register_handovers, register_hops
from arcbridge.relay.operations import Operations, Question, Row
from arcbridge.relay.proxy_protocol import parse_networks
from arcbridge.relay.pump import PAYERS, Pump, Pumps
from arcbridge.relay.registry.base import Registry, RegistryUnavailable
from arcbridge.relay.reload import Reload
from arcbridge.relay.rendezvous import Rendezvous
from arcbridge.relay.self_checks import checks_of
from arcbridge.relay.settings import Checked, required
from arcbridge.relay.siblings.worker_membership import WorkerMembership
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig
from arcbridge.settings.problems import Problems
from arcbridge.tasks import cancel_and_wait

MAINTENANCE_INTERVAL: Final = 5.0
"""Seconds between two looks at revocations: a user or a cluster that was revoked is cut within 10 s."""
POLICY_INTERVAL: Final = 1.0
"""Seconds between two looks at the policy: it is a file, and asking for its date costs microseconds."""
_SEEN: Final = 60.0
_API_CLOSE: Final = 0.5

log = structlog.get_logger("arcbridge.relay")


@dataclass(frozen=True, slots=True)
class RelayInfo:
    """What is known once the relay serves."""

    address: str
    """`host:port` that is bound."""
    public_address: str
    ca_pin: str
    observe: str
    """`host:port` of metrics and health, empty if there is none."""


async def serve(
    config: RelayConfig,
    ready: Callable[[RelayInfo], None],
    stopping: asyncio.Event,
    hurry: asyncio.Event,
    membership: WorkerMembership | None = None,
    *,
    reread: Callable[[], RelayConfig] | None = None,
) -> None:
    """Serve until `stopping` is set, then drain (at most 30 s); ends within a second once `hurry` is set, too.

    `membership`: that of a worker among the processes of one relay (`relay.siblings`). `reread`: reads the settings
    again, for a reload at SIGHUP; raises `ConfigError`. A worker is told its new settings by the supervisor instead.
    Raises `ConfigError` or `StateError` when it cannot start.
    """
    async with AsyncExitStack() as stack:
        info, drain = await _start(config, stack, membership, reread)
        ready(info)
        await stopping.wait()
        await drain.run(hurry)
    log.info("relay stopped", step="gone")


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of one relay, connected with each other; `_compose` makes them."""

    checked: Checked
    limits: RelayLimitsConfig
    """Those that count: as many sessions and agents as there are descriptors for."""
    descriptors: int
    policy: PolicyFile
    access: Access
    proofs: ProofChecker
    authority: Authority
    fleet: Fleet
    certificate: ServerCertificate
    verifier: TokenVerifier
    counters: Counters
    callers: KeyedTokenBucket[str]
    api: HttpApiServer
    api_refusals: Limited
    pumps: Pumps
    control: ControlServer
    rendezvous: Rendezvous
    hops: Hops | None
    admission: Admission
    listener: Listener
    drain: Drain
    enforcement: Enforcement
    maintenance: _Maintenance

    def tell_lost(self, lost: Lost) -> None:
        """End the sessions of those who lost their access, at this relay and at the others."""
        self.control.end_sessions(lost)
        self.fleet.tell_lost(lost)


async def _start(
    config: RelayConfig,
    stack: AsyncExitStack,
    membership: WorkerMembership | None,
    reread: Callable[[], RelayConfig] | None,
) -> tuple[RelayInfo, Drain]:
    """Start everything in the order in which it can fail; `stack` takes it apart in reverse."""
    checked = required(config)
    if membership is None:
        tell_warnings(checked.problems)
    parts = await _compose(checked, membership, stack)
    observing, self_checks = await _observe(parts, membership, reread, stack)

    # Before the port is open, so that a cluster revoked while the relay was down is refused from the first moment.
    await parts.maintenance.look()
    stack.push_async_callback(parts.listener.close)
    if membership is not None:
        await membership.acquainted()
    listen = checked.listen if membership is None else membership.listen
    bound = parts.listener.start(listen, shared=membership is not None)
    stack.callback(parts.listener.stop)
    await stack.enter_async_context(_running(parts.maintenance.run()))
    await stack.enter_async_context(_running(self_checks.run()))
    info = RelayInfo(str(bound), str(checked.public), parts.authority.pin, observing)
    log.info(
        "relay serving" if membership is None else "worker serving",
        address=info.address,
        public_address=info.public_address,
        ca_pin=info.ca_pin,
        observe=observing,
        sessions=parts.limits.sessions,
        agents=parts.limits.agents,
        descriptors=parts.descriptors,
    )
    return info, parts.drain


async def _compose(checked: Checked, membership: WorkerMembership | None, stack: AsyncExitStack) -> _Parts:
    """Make all parts, of which none accepts a connection yet. Raises as `serve` does."""
    config = checked.config
    assert config.policy is not None, "the check requires it"
    policy = PolicyFile(config.policy)
    access = Access(policy)
    proofs = ProofChecker(checked.proof, "the relay")
    login = login_document(config.login)
    client_files = ClientFiles(config.client.directory)
    balancers = parse_networks(config.proxy_protocol_from)
    shared = config.limits if membership is None else membership.share(config.limits)
    fits = capacity(shared, raise_limit())
    warn(fits, shared)
    limits = replace(shared, sessions=fits.sessions, agents=fits.agents)

    if membership is None:
        stack.enter_context(only_one(config.data_dir))
    authority = open_authority(config.data_dir)
    registry, fleet = await open_backend(config, membership, stack)
    certificate = ServerCertificate(config.tls, authority, checked.public.host)
    verifier = make_verifier(checked, stack)

    counters, api_refusals, callers = Counters(), Limited(), caller_bucket(limits.requests_per_minute_per_user)
    await fleet.start()
    stack.push_async_callback(fleet.close)
    api = HttpApiServer(
        build_app(
            authority=authority,
            registry=registry,
            count_agents=fleet.count,
            verifier=verifier,
            access=access,
            certificate_life=config.agent_certificate_life,
            callers=callers,
            limited=api_refusals,
            proofs=proofs,
            renewed_twice=counters.count_renewed_twice,
            login=login,
            payer_of=lambda identity: pumps.payer_of(identity),
            install=client_files.install,
        )
    )
    await api.start()
    stack.push_async_callback(api.close, _API_CLOSE)

    def pump_ended(pump: Pump) -> None:
        _log_end(pump)
        parts.enforcement.ended(pump)

    admission = Admission(
        limits.unauthenticated,
        limits.unauthenticated_per_address,
        per_second=limits.connections_per_second_per_address,
        loop_share=limits.loop_share_per_address / 100,
    )
    shares = admission.loop_times.shares
    pumps = Pumps(pump_ended, payers=LoopTimes(limits.loop_share_per_user / 100, size=PAYERS, shares=shares))
    stack.callback(pumps.close)
    control = ControlServer(
        lambda: certificate.contexts[ALPN_CONTROL],
        fleet,
        registry,
        counters,
        agents=limits.agents,
        agents_per_second=limits.agents_per_second,
    )
    hops = None if fleet.peers is None else Hops(fleet.peers, authority=authority, pumps=pumps)
    rendezvous = Rendezvous(
        context=lambda: certificate.contexts[ALPN_JOIN],
        fleet=fleet,
        registry=registry,
        verifier=verifier,
        access=access,
        pumps=pumps,
        counters=counters,
        address=str(checked.public),
        limits=limits,
        proofs=proofs,
        hops=hops,
        handovers=None if membership is None else membership.handovers,
    )
    handlers: dict[bytes, ConnectionHandler] = {
        client_hello.CONTROL: control.serve,
        client_hello.JOIN: rendezvous.serve,
        client_hello.HTTP: HttpHandler(lambda: certificate.contexts[ALPN_HTTP], api, counters).serve,
    }
    if fleet.peers is not None:
        handlers[client_hello.HOP] = rendezvous.serve_hop
        fleet.peers.on_failed = rendezvous.hop_failed
    listener = Listener(handlers, admission, counters, balancers=balancers)
    fleet.on_lost = control.end_sessions
    enforcement = Enforcement(access, pumps, rendezvous, counters, lambda lost: parts.tell_lost(lost))
    parts = _Parts(
        checked=checked,
        limits=limits,
        descriptors=fits.available,
        policy=policy,
        access=access,
        proofs=proofs,
        authority=authority,
        fleet=fleet,
        certificate=certificate,
        verifier=verifier,
        counters=counters,
        callers=callers,
        api=api,
        api_refusals=api_refusals,
        pumps=pumps,
        control=control,
        rendezvous=rendezvous,
        hops=hops,
        admission=admission,
        listener=listener,
        drain=Drain(
            listener, control, rendezvous, pumps, counters, together=None if membership is None else membership.together
        ),
        enforcement=enforcement,
        maintenance=_Maintenance(registry, fleet, control, policy, access, enforcement, certificate),
    )
    return parts


def make_verifier(checked: Checked, stack: AsyncExitStack) -> TokenVerifier:
    """Make what verifies access tokens, with a fetcher of its own; `stack` closes both."""
    config = checked.config
    fetcher = HttpFetcher()
    stack.push_async_callback(fetcher.close)
    groups = GroupSources(checked.issuers, fetcher.ask, directories=config.graph, claim_sources=config.claim_sources)
    verifier = TokenVerifier(checked.issuers, fetcher, accept=checked.acceptance, groups=groups)
    stack.push_async_callback(verifier.close)
    return verifier


async def _observe(
    parts: _Parts,
    membership: WorkerMembership | None,
    reread: Callable[[], RelayConfig] | None,
    stack: AsyncExitStack,
) -> tuple[str, SelfChecks]:
    """Show what the relay counts and finds, answer operators, and reload at SIGHUP where it can `reread`.

    Returns the address of metrics and health, empty where there is none, and the self-checks, which do not run yet.
    """
    metrics, checks = Metrics("relay"), Checks()
    register(
        metrics,
        counters=parts.counters,
        admission=parts.admission,
        control=parts.control,
        rendezvous=parts.rendezvous,
        pumps=parts.pumps,
        verifier=parts.verifier,
        proofs=parts.proofs,
        api=parts.api,
        api_refusals=parts.api_refusals,
        certificate=parts.certificate,
        access=parts.access,
    )
    parts.fleet.add_metrics(metrics)
    if parts.hops is not None:
        register_hops(metrics, parts.hops)
    if membership is not None:
        register_handovers(metrics, membership.handovers)
    checks.add("registry", lambda: parts.maintenance.registry_error)
    checks.add("draining", parts.drain.unready)
    self_checks = SelfChecks(
        checks_of(
            registry_error=lambda: parts.maintenance.registry_error,
            verifier=parts.verifier,
            fleet=parts.fleet,
            certificate=parts.certificate,
            policy=parts.policy,
            public=parts.checked.public,
        ),
        log,
    )
    self_checks.register(metrics, checks)
    parts.verifier.on_directory_failure(lambda: self_checks.look_soon("groups"))

    reload = Reload(
        parts.checked,
        verifier=parts.verifier,
        proofs=parts.proofs,
        policy=parts.policy,
        certificate=parts.certificate,
        admission=parts.admission,
        control=parts.control,
        rendezvous=parts.rendezvous,
        payers=parts.pumps.payers,
        callers=parts.callers,
        share=(lambda limits: limits) if membership is None else membership.share,
        now=time.monotonic,
    )

    def apply(found: Checked) -> Outcome:
        outcome = reload.apply(found)
        self_checks.look_soon()
        return outcome

    if membership is not None:
        membership.reload = lambda config: apply(required(config))
    elif reread is not None:
        stack.push_async_callback(_hear_reloads(apply, reread, metrics).stop)
    await _answer_operators(parts, self_checks, membership, stack)
    if membership is not None:
        membership.watch(metrics, checks)
    # Of several processes the supervisor answers for all.
    server = ObserveServer(parts.checked.config.observe.listen if membership is None else "", metrics, checks)
    observing = await server.start()
    stack.push_async_callback(server.stop)
    return observing, self_checks


async def _answer_operators(
    parts: _Parts, self_checks: SelfChecks, membership: WorkerMembership | None, stack: AsyncExitStack
) -> None:
    """Answer the questions of operators: at the admin socket, or as a worker for the supervisor that has it."""
    operations = Operations(
        parts.pumps,
        parts.fleet,
        self_checks,
        parts.tell_lost,
        relay=str(parts.checked.public),
        worker=None if membership is None else membership.index,
    )
    stack.push_async_callback(operations.close)
    parts.fleet.on_question = operations.answer
    if membership is not None:
        membership.answer = operations.answer
        return
    admin = AdminSocket(parts.checked.config.data_dir, _with_others(operations, parts.fleet))
    await admin.start()
    stack.push_async_callback(admin.close)


def _with_others(operations: Operations, fleet: Fleet) -> Callable[[Question], Awaitable[list[Row]]]:
    """Return what answers an operator's question for this relay and for the others of its fleet."""

    async def answer(question: Question) -> list[Row]:
        own = operations.answer(question)
        # Each relay tells of its own checks alone: an operator asks about this machine.
        return own if question.get("ask") == "checks" else own + await fleet.ask_others(question)

    return answer


class _Maintenance:
    """The relay's periodic work: take back what is revoked, note connected agents, renew. Each error is logged once."""

    def __init__(
        self,
        registry: Registry,
        fleet: Fleet,
        control: ControlServer,
        policy: PolicyFile,
        access: Access,
        enforcement: Enforcement,
        certificate: ServerCertificate,
    ) -> None:
        self._registry = registry
        self._fleet = fleet
        self._control = control
        self._policy = policy
        self._access = access
        self._enforcement = enforcement
        self._certificate = certificate
        self._policy_error = ""
        self._noted = time.monotonic()
        self.registry_error: str | None = None
        """Why the registry did not answer the last time; None: it did."""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + MAINTENANCE_INTERVAL
        while True:
            await asyncio.sleep(min(POLICY_INTERVAL, max(due - loop.time(), 0.0)))
            try:
                if loop.time() < due:
                    self._look_at_policy()
                    await self._enforcement.enforce()
                else:
                    # Before the look: one that takes long, or cuts sessions, must not put the next one off.
                    due = loop.time() + MAINTENANCE_INTERVAL
                    await self.look()
            except Exception as error:
                # Without the next looks no revocation would be taken over any more.
                log.error("maintenance failed, trying again", reason=type(error).__name__, exc_info=True)

    async def look(self) -> None:
        self._look_at_policy()
        self._control.expire(time.time())
        try:
            self._access.clusters = await self._registry.revocations()
            if self._access.learn_users(await self._registry.user_revocations()):
                log.info("revoked users taken over", users=len(self._access.users or ()))
            self._control.revoke(self._access.clusters)
            if time.monotonic() - self._noted >= _SEEN:
                self._noted = time.monotonic()
                self._certificate.refresh()
                await self._note()
        except (RegistryUnavailable, StateError) as error:
            # Also a damaged file: the policy below must go on to count.
            if self.registry_error is None:
                log.error("registry unavailable", reason=error.message)
            self.registry_error = error.message
        else:
            self.registry_error = None
        # Also when the registry did not answer: the policy counts, and what is known to be revoked.
        self._control.tell_users(self._access.users)
        await self._enforcement.enforce()

    def _look_at_policy(self) -> None:
        self._policy.current()
        if self._policy.error != self._policy_error:
            self._policy_error = self._policy.error
            if self._policy_error:
                log.error("policy not taken over", reason=self._policy_error, effect="the last good one stays")
            else:
                log.info("policy taken over")

    async def _note(self) -> None:
        """Note which clusters are connected. A relay that cannot write these dates is as ready as before."""
        try:
            for cluster in {link.cluster for link in self._fleet.links()}:
                await self._registry.seen(cluster, time.time())
        except RegistryUnavailable as error:
            log.warning("clusters not noted as seen", reason=error.message)


def _log_end(pump: Pump) -> None:
    loop = asyncio.get_running_loop()
    log.info(
        "session ended",
        session=pump.join_id,
        cluster=pump.cluster,
        user="" if pump.identity is None else pump.identity.username,
        seconds=round(loop.time() - pump.started_at, 1),
        bytes_to_agent=pump.bytes_to_agent,
        bytes_to_client=pump.bytes_to_client,
        reason="both ends are done" if pump.error is None else pump.error.strerror or str(pump.error),
        **({"first_session": pump.first_session} if pump.first_session else {}),
    )


@contextlib.asynccontextmanager
async def _running(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    task = asyncio.get_running_loop().create_task(work)
    try:
        yield
    finally:
        await cancel_and_wait(task)


def _hear_reloads(apply: Callable[[Checked], Outcome], reread: Callable[[], RelayConfig], metrics: Metrics) -> Reloads:
    async def again() -> Outcome:
        # One check, so that what is told, what is put in force and what the result says are of the same files.
        checked = required(reread())
        tell_warnings(checked.problems)
        return apply(checked)

    reloads = Reloads("relay", again)
    reloads.register(metrics)
    reloads.start()
    return reloads


def tell_warnings(problems: Problems) -> None:
    """Log what a check warns of, at the start and at a reload."""
    for problem in problems.warnings:
        log.warning("settings", setting=problem.setting, reason=str(problem))
