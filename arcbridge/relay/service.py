"""Puts the relay together: registry and fleet, the port and its connection handlers, periodic work.

It decides nothing about a single connection, and how the relay goes away is `relay.drain`'s. Everything that can fail
because of the settings has failed before the port is open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from arcbridge.checks.groups_claim import missing_groups_logger
from arcbridge.checks.self_checks import SelfChecks
from arcbridge.errors import ArcbridgeError, StateError
from arcbridge.identity.groups import GroupSources
from arcbridge.identity.policy import PolicyFile
from arcbridge.identity.proof import ProofChecker
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.loop_shares import LoopTimes
from arcbridge.net import client_hello
from arcbridge.net.descriptors import raise_limit
from arcbridge.net.fetch import HttpFetcher
from arcbridge.net.tls import ALPN_CONTROL, ALPN_HTTP, ALPN_JOIN
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.reloads import Outcome
from arcbridge.pki.authority import Authority
from arcbridge.relay.access import Access, CallerChecks
from arcbridge.relay.admin import Administered
from arcbridge.relay.admission import Admission
from arcbridge.relay.backend import open_backend
from arcbridge.relay.ca_rotation import RotationWatch
from arcbridge.relay.capacity import fitted
from arcbridge.relay.certificate import ServerCertificate
from arcbridge.relay.client_join import ClientJoins
from arcbridge.relay.cluster_reports import ClusterReports
from arcbridge.relay.control import ControlServer
from arcbridge.relay.counters import Counters
from arcbridge.relay.data_dir import open_authority
from arcbridge.relay.drain import Drain
from arcbridge.relay.enforcement import Enforcement
from arcbridge.relay.fleet.base import Lost
from arcbridge.relay.hop import Hops
from arcbridge.relay.http.administration import AdminApi
from arcbridge.relay.http.api import Api, build_app
from arcbridge.relay.http.client_files import ClientFiles
from arcbridge.relay.http.login_settings import login_document
from arcbridge.relay.http.server import HttpApiServer, HttpHandler
from arcbridge.relay.listener import ConnectionHandler, Listener
from arcbridge.relay.membership import Membership, Service
from arcbridge.relay.metrics import register
from arcbridge.relay.operations import Operations, Question, Row
from arcbridge.relay.parts import Basis, Entrances
from arcbridge.relay.pending_dials import PendingDials
from arcbridge.relay.policy_guard import PolicyWatch
from arcbridge.relay.proxy_protocol import parse_networks
from arcbridge.relay.pump import PAYERS, Pump, Pumps
from arcbridge.relay.recovery import RevocationRecovery
from arcbridge.relay.registry.base import RegistryUnavailable
from arcbridge.relay.reload import RelayReload
from arcbridge.relay.rendezvous import AgentJoins, Rendezvous
from arcbridge.relay.self_checks import checks_of
from arcbridge.relay.settings import CheckedRelay, required
from arcbridge.settings.config import RelayConfig
from arcbridge.tasks import cancel_and_wait
from arcbridge.wire.records import CaSuccession

if TYPE_CHECKING:
    from arcbridge.relay.page.site import PageSite

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
    relay_ca_pin: str
    observe: str
    """`host:port` of metrics and health, empty if there is none."""


async def serve(
    config: RelayConfig,
    ready: Callable[[RelayInfo], None],
    stopping: asyncio.Event,
    hurry: asyncio.Event,
    membership: Membership | None = None,
    *,
    reread: Callable[[], RelayConfig] | None = None,
) -> None:
    """Serve until `stopping` is set, then drain (at most 30 s); ends within a second once `hurry` is set, too.

    `membership`: that of a worker among the processes of one relay (`relay.siblings`). `reread`: reads the settings
    again, for a reload at SIGHUP; raises `ConfigError`. A worker gets its new settings from the supervisor instead.
    Raises `ConfigError` or `StateError` when it cannot start.
    """
    async with AsyncExitStack() as stack:
        info, drain = await _start(config, stack, membership or Membership(reread))
        ready(info)
        await stopping.wait()
        await drain.run(hurry)
    log.info("relay stopped", step="gone")


async def _start(config: RelayConfig, stack: AsyncExitStack, membership: Membership) -> tuple[RelayInfo, Drain]:
    """Start everything in the order in which it can fail; `stack` takes it apart in reverse."""
    checked = required(config)
    membership.enter(checked, stack)
    basis = await _lay_basis(checked, membership, stack)
    entrances = await _make_entrances(basis, membership, stack)
    control, fleet = entrances.control, basis.fleet
    drain = Drain(entrances.listener, control, entrances.clients, entrances.pumps, basis.counters, membership)

    def end_sessions(lost: Lost) -> None:
        """End the sessions of those who lost their access, at this relay and at the others."""
        control.end_sessions(lost)
        fleet.tell_lost(lost)

    enforcement = Enforcement(basis.checks.access, entrances.pumps, entrances.clients, basis.counters, end_sessions)
    entrances.pumps.on_done.append(enforcement.ended)
    reports = ClusterReports(
        control.reports, basis.counters, basis.limits.clusters_with_metrics, lambda: basis.authority.succession.pins[-1]
    )
    recovery = RevocationRecovery(basis, control, checked.config.recovery_wait)
    maintenance = _Maintenance(basis, control, enforcement, reports, recovery)
    operations = Operations(
        entrances.pumps,
        fleet,
        end_sessions,
        basis.policy,
        basis.checks.recent,
        relay=str(checked.public),
        worker=membership.index,
        authority=basis.authority,
    )
    operations.refusals = basis.checks.refusals
    operations.certificate_expires = lambda: basis.certificate.loaded.expires
    stack.push_async_callback(operations.close)
    fleet.on_question = lambda question: basis.audit.asked_by_fleet(question, operations.answer)
    observing, self_checks = await _observe(basis, entrances, drain, maintenance, operations, membership, stack)

    # Before the port is open, so that a cluster revoked while the relay was down is refused from the first moment.
    await maintenance.look()
    stack.push_async_callback(entrances.listener.close)
    await membership.siblings_ready()
    bound = entrances.listener.start(membership.address(checked.listen), shared=membership.shares_port)
    stack.callback(entrances.listener.stop)
    for work in (maintenance.run(), self_checks.run()):
        stack.push_async_callback(cancel_and_wait, asyncio.get_running_loop().create_task(work))
    info = RelayInfo(str(bound), str(checked.public), basis.authority.pin, observing)
    membership.serving(checked, info.address)
    log.info(
        membership.serves,
        **asdict(info),
        sessions=basis.limits.sessions,
        agents=basis.limits.agents,
        descriptors=basis.descriptors,
    )
    return info, drain


async def _lay_basis(checked: CheckedRelay, membership: Membership, stack: AsyncExitStack) -> Basis:
    """Make what the relay knows and keeps. Raises as `serve` does."""
    config = checked.config
    assert config.policy is not None, "the check requires it"
    policy = PolicyFile(config.policy)
    policy.hold_back(config.policy_share, config.policy_hold)
    descriptors = raise_limit()
    authority = open_authority(config.data_dir)
    registry, fleet = await open_backend(config, membership.fleet, stack)
    verifier = make_verifier(checked, stack)
    wanted = membership.share(config.limits)
    return Basis(
        checked=checked,
        limits=fitted(wanted, descriptors),
        wanted=wanted,
        descriptors=descriptors,
        counters=Counters(),
        policy=policy,
        verifier=verifier,
        checks=CallerChecks(verifier, ProofChecker(checked.proof, "the relay"), Access(policy)),
        authority=authority,
        registry=registry,
        fleet=fleet,
        certificate=ServerCertificate(config.tls, authority, checked.public.host),
        audit=membership.audit,
    )


async def _make_entrances(basis: Basis, membership: Membership, stack: AsyncExitStack) -> Entrances:
    """Make what peers meet; none of it accepts a connection yet."""
    limits, counters, fleet, checks = basis.limits, basis.counters, basis.fleet, basis.checks
    certificate = basis.certificate
    await fleet.start()
    stack.push_async_callback(fleet.close)
    admission = Admission(limits)
    shares = admission.loop_times.shares
    pumps = Pumps(_log_end, payers=LoopTimes(limits.loop_share_per_user / 100, size=PAYERS, shares=shares))
    stack.callback(pumps.close)
    api, administration, http, page = await _serve_api(basis, pumps, stack)
    authority = basis.authority
    control = ControlServer(
        lambda: certificate.loaded.contexts[ALPN_CONTROL],
        fleet,
        basis.registry,
        counters,
        limits,
        audit=basis.audit,
        cas=lambda: CaSuccession(authority.announced) if authority.announced else None,
    )
    fleet.on_lost = control.end_sessions
    hops = None if fleet.peers is None else Hops(fleet.peers, authority=basis.authority, pumps=pumps)
    detour = hops or membership.detour
    dials = PendingDials(counters, detour)
    clients = ClientJoins(
        dials,
        fleet,
        basis.registry,
        checks,
        pumps,
        counters,
        address=str(basis.checked.public),
        limits=limits,
        # Where another CA vouches for this relay its clients do not know this one.
        relay_cas=lambda: (
            (authority.announced, authority.succession.pins[-1])
            if certificate.ca_pem and authority.announced
            else ("", "")
        ),
    )
    agents = AgentJoins(dials, basis.registry, counters, detour, clients.require_room)
    rendezvous = Rendezvous(lambda: certificate.loaded.contexts[ALPN_JOIN], clients, agents, counters)
    handlers: dict[bytes, ConnectionHandler] = {
        client_hello.CONTROL: control.serve,
        client_hello.JOIN: rendezvous.serve,
        client_hello.JOIN_1: rendezvous.serve,
        client_hello.HTTP: HttpHandler(lambda: certificate.loaded.contexts[ALPN_HTTP], http, counters).serve,
    }
    if hops is not None:
        handlers[client_hello.HOP] = partial(agents.serve_hop, hops.server_context)
    balancers = parse_networks(basis.checked.config.proxy_protocol_from)
    listener = Listener(handlers, admission, counters, balancers=balancers)
    return Entrances(admission, listener, pumps, control, clients, detour, api, administration, http, page)


async def _serve_api(
    basis: Basis, pumps: Pumps, stack: AsyncExitStack
) -> tuple[Api, AdminApi, HttpApiServer, PageSite | None]:
    """Make the HTTP API with the administrators' page, and what serves it to connections."""
    config = basis.checked.config
    api = Api(
        basis.authority,
        basis.registry,
        basis.fleet.count,
        basis.checks,
        basis.counters,
        certificate_life=config.agent_certificate_life,
        limits=basis.limits,
        login_document=login_document(config.login),
        payer_of=pumps.payer_of,
        audit=basis.audit,
    )
    api.round_trip = basis.fleet.round_trip
    administration = AdminApi(api)
    files = ClientFiles(config.client.directory, api.spend_of_stranger)
    install, page, paths = [files.install, administration.install], None, frozenset[str]()
    if config.page.client_id:
        # Only here: a relay without the page loads nothing of it.
        from arcbridge.relay.page.opening import make_page
        from arcbridge.relay.page.site import PATHS

        page, paths = make_page(basis, api, administration, stack), frozenset(PATHS)
        install.append(page.install)
    http = HttpApiServer(build_app(api, *install), paths)
    await http.start()
    stack.push_async_callback(http.close, _API_CLOSE)
    return api, administration, http, page


def make_verifier(checked: CheckedRelay, stack: AsyncExitStack) -> TokenVerifier:
    """Make what verifies access tokens, with a fetcher of its own; `stack` closes both."""
    config = checked.config
    fetcher = HttpFetcher()
    stack.push_async_callback(fetcher.close)
    groups = GroupSources(fetcher.ask, directories=config.graph, claim_sources=config.claim_sources)
    verifier = TokenVerifier(checked.issuers, fetcher, accept=checked.acceptance, groups=groups)
    stack.push_async_callback(verifier.close)
    return verifier


async def _observe(
    basis: Basis,
    entrances: Entrances,
    drain: Drain,
    maintenance: _Maintenance,
    operations: Operations,
    membership: Membership,
    stack: AsyncExitStack,
) -> tuple[str, SelfChecks]:
    """Show what the relay counts and finds, answer operators, and reload.

    Returns the address of metrics and health, empty where there is none, and the self-checks, which do not run yet.
    """
    metrics, checks = Metrics("relay"), Checks()
    register(metrics, basis, entrances)
    maintenance.reports.register(metrics)
    maintenance.recovery.register(metrics)
    basis.fleet.add_metrics(metrics)
    if entrances.detour is not None:
        entrances.detour.add_metrics(metrics)
    checks.add("registry", lambda: maintenance.registry_error)
    checks.add("draining", drain.unready)
    self_checks = SelfChecks(
        checks_of(
            lambda: maintenance.registry_error,
            basis,
            maintenance.recovery.finding,
            lambda: (reload.limits, reload.wanted),
            ca_error=lambda: maintenance.ca_error,
        ),
        log,
    )
    self_checks.register(metrics, checks)
    basis.verifier.on_directory_failure(lambda: self_checks.look_soon("groups"))
    basis.verifier.on_missing_groups = missing_groups_logger(log)
    maintenance.policy_watch.on_news = lambda: self_checks.look_soon("policy")
    maintenance.on_registry = lambda: self_checks.look_soon("registry")
    basis.fleet.on_engine = lambda: self_checks.look_soon("fleet")
    operations.findings = self_checks.findings
    reload = RelayReload(basis, entrances, membership.share)
    maintenance.policy_watch.checked = lambda: reload.checked
    maintenance.policy_watch.record = basis.audit.note

    async def authority() -> Authority:
        return basis.authority

    async def ask(question: Question) -> list[Row]:
        return await membership.ask(service, question)

    def administer(config: RelayConfig) -> None:
        entrances.administration.relay = Administered(
            config, lambda _: nullcontext(basis.registry), authority, ask, lambda act, **_: nullcontext({})
        )

    def apply(checked: CheckedRelay) -> Outcome:
        outcome = reload.apply(checked)
        administer(replace(basis.checked.config, tls=checked.config.tls))
        maintenance.reports.change(checked.config.limits.clusters_with_metrics)
        self_checks.look_soon()
        return outcome

    administer(basis.checked.config)
    service = Service(basis.checked.config, metrics, checks, operations, basis.fleet, apply)
    return await membership.publish(service, stack), self_checks


class _Maintenance:
    """The relay's periodic work: take back what is revoked, note connected agents, renew. Each error is logged once."""

    def __init__(
        self,
        basis: Basis,
        control: ControlServer,
        enforcement: Enforcement,
        reports: ClusterReports,
        recovery: RevocationRecovery,
    ) -> None:
        self._basis = basis
        self._control = control
        self._access = basis.checks.access
        self._enforcement = enforcement
        self.policy_watch = PolicyWatch(basis, enforcement.held_sessions, lambda: reports.known)
        self.reports = reports
        self.recovery = recovery
        recovery.refresh = self.take_over
        self._learn_at = 0.0
        self._rotation = RotationWatch(basis.checked.config.data_dir)
        self.ca_error = ""
        """Why the last step of the CA's rotation was not taken over; empty: it was."""
        self.registry_error: str | None = None
        """Why the registry did not answer the last time; None: it did."""
        self.on_registry: Callable[[], None] = lambda: None
        """Called when that has changed."""

    async def run(self) -> None:
        """Do all of it until cancelled; what waits for the registry holds up nothing else."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(self._watch_policy, POLICY_INTERVAL))
            group.create_task(self._again(self.look, MAINTENANCE_INTERVAL))
            group.create_task(self._again(self._learn_clusters, MAINTENANCE_INTERVAL))
            group.create_task(self._again(self._note, _SEEN))

    async def _again(self, work: Callable[[], Awaitable[None]], seconds: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Before the look: one that takes long, or cuts sessions, must not put the next one off.
            due = loop.time() + seconds
            try:
                await work()
            except Exception as error:
                # Without the next looks no revocation would be taken over any more.
                log.error("maintenance failed, trying again", reason=type(error).__name__, exc_info=True)
            await asyncio.sleep(max(due - loop.time(), 0.0))

    async def _watch_policy(self) -> None:
        await self.policy_watch.look()
        await self._enforcement.enforce()

    async def _learn_clusters(self) -> None:
        """Learn which clusters there are: each minute, and where an agent of another one has come. A relay that cannot
        read them is as ready as before; `look` says when the registry does not answer."""
        now = time.monotonic()
        if now < self._learn_at and not self.reports.misses_cluster():
            return
        try:
            first = not self._learn_at
            self.reports.learn(await self._basis.registry.clusters())
            if first and self._basis.checked.config.fleet.servers:
                # The start's check asks no peer, so it did not know them.
                self.policy_watch.warn()
            self._learn_at = now + _SEEN
        except (RegistryUnavailable, StateError) as error:
            log.debug("clusters not learnt", reason=error.message)

    async def look(self) -> None:
        await self.policy_watch.look()
        self._control.expire(time.time())
        await self._look_at_ca()
        try:
            await self.take_over()
        except (RegistryUnavailable, StateError) as error:
            # Also a damaged file: the policy below must go on to count.
            if self.registry_error is None:
                log.error("registry unavailable", reason=error.message)
            self._note_registry(error.message)
        else:
            self._note_registry(None)
        # Also when the registry did not answer: the policy counts, and what is known to be revoked.
        self._control.tell_users(self._access.users)
        await self._enforcement.enforce()

    def _note_registry(self, error: str | None) -> None:
        changed = (error is None) != (self.registry_error is None)
        self.registry_error = error
        if changed:
            self.on_registry()

    async def take_over(self) -> None:
        """Take over what the registry says is revoked. Raises `RegistryUnavailable` and `StateError`."""
        await self.recovery.look()
        self._access.clusters = await self._basis.registry.revocations()
        if self._access.learn_users(await self._basis.registry.user_revocations()):
            log.info("revoked users taken over", users=len(self._access.users or ()))
        self._control.revoke(self._access.clusters)
        self._control.tell_users(self._access.users)
        await self.recovery.share()

    async def _look_at_ca(self) -> None:
        """Take over a step of the CA's rotation that an operator took, in this process or at another relay."""
        audit, authority = self._basis.audit, self._basis.authority
        try:
            if await self._rotation.look(authority):
                self._basis.certificate.refresh(rotated=True)
                await self.recovery.rotated(authority)
                self._rotation.done()
                audit.note("ca follow", {"present": authority.pin, "newest": authority.succession.pins[-1]})
            self.ca_error = ""
        except ArcbridgeError as error:
            if error.message != self.ca_error:
                log.error("CA rotation not taken over", reason=error.message)
                audit.note("ca follow", outcome="refused", reason=error.message)
            self.ca_error = error.message

    async def _note(self) -> None:
        """Renew the certificate, and note which clusters are connected, one after the other: a fleet's registry takes
        milliseconds for each. A relay that cannot write these dates is as ready as before."""
        self._basis.certificate.refresh()
        try:
            for cluster in {link.cluster for link in self._basis.fleet.links()}:
                await self._basis.registry.seen(cluster, time.time())
        except (RegistryUnavailable, StateError) as error:
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
