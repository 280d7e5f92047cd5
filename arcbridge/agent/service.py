"""Runs the agent as a process: makes all parts in order, and ends them in the opposite order.

The end is a drain in named steps: *leaving* (GOAWAY to relays and clients: no more dials, no more streams), *waiting*
(open streams have `session.drain`), *gone*. A second signal leaves one second. It does nothing of what the parts do.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from arcbridge.agent.accounts import Accounts
from arcbridge.agent.audit import AuditLog
from arcbridge.agent.authenticator import Authenticator
from arcbridge.agent.control import ControlConnections
from arcbridge.agent.denylist import Denylist
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.kube.apiserver import SERVICE_ACCOUNT, ApiServer, endpoint_of
from arcbridge.agent.kube.connect_limit import ConnectLimit
from arcbridge.agent.kube.proxy import KubeProxy
from arcbridge.agent.metrics import register
from arcbridge.agent.parts import AgentParts
from arcbridge.agent.relay_choice import RelayChoice
from arcbridge.agent.reload import Reload
from arcbridge.agent.reports import AgentReports
from arcbridge.agent.secret_store import SecretStore
from arcbridge.agent.self_checks import checks_of
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.settings import Checked, required
from arcbridge.agent.targets import TcpTargets
from arcbridge.agent.workload import PodOfWorkload, pod_name
from arcbridge.audit.sinks.sender import Sinks
from arcbridge.checks.groups_claim import missing_groups_logger
from arcbridge.checks.self_checks import SelfChecks
from arcbridge.errors import ConfigError
from arcbridge.identity.groups import GroupSources
from arcbridge.identity.proof import ProofChecker
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.mux import memory
from arcbridge.net.fetch import HttpFetcher
from arcbridge.net.round_trips import RoundTrips
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.reloads import Outcome, Reloads
from arcbridge.observe.server import ObserveServer
from arcbridge.pki.credentials import CredentialStore, DirectoryStore
from arcbridge.pki.pins import check_pin
from arcbridge.settings.config import AgentConfig
from arcbridge.tasks import cancel_and_wait, report_failure
from arcbridge.wire.limits import Limits

HURRY = 0.5
"""Seconds for the last bytes after the second signal, or after the drain."""

log = structlog.get_logger("arcbridge.agent")


async def serve(
    config: AgentConfig,
    ready: Callable[[], None],
    stopping: asyncio.Event,
    hurry: asyncio.Event,
    *,
    reread: Callable[[], AgentConfig] | None = None,
) -> None:
    """Serve until `stopping` is set, then drain; end within a second once `hurry` is set, too.

    `ready` is called once, when the first control connection is up. `reread`: reads the settings again, for a reload at
    SIGHUP; raises ConfigError. Raises ConfigError, StateError, EnrolmentRefused or
    PinMismatch when it cannot start.
    """
    checked = required(config)
    for problem in checked.problems.warnings:
        log.warning("settings", setting=problem.setting, reason=str(problem))
    instance = f"agent-{secrets.token_hex(8)}"
    async with AsyncExitStack() as stack:
        parts = _compose(config, checked, instance, stack)
        keeper, control = parts.keeper, parts.control
        pod = _own_pod(config, parts.api)
        reload = await _observe(checked, parts, reread, stack)
        if not await _run_unless(stopping, keeper.start()):
            return
        relays = len(checked.relays)
        log.info("agent started", instance=instance, cluster=keeper.current.cluster, relays=relays)
        _keep_running(keeper.run(), "renewal", stack)
        control.start()
        if await _run_unless(stopping, control.connected.wait()):
            ready()
        await stopping.wait()
        await _drain(control, parts.sessions, hurry, reload.config.session.drain, pod)
    log.info("agent stopped", step="gone")


def _compose(config: AgentConfig, checked: Checked, instance: str, stack: AsyncExitStack) -> AgentParts:
    """Make all parts, of which none is connected to a relay yet; `stack` closes them. Raises as `serve` does."""
    audit = open_audit(config, instance)
    stack.push_async_callback(asyncio.to_thread, audit.sinks.close)
    stack.push_async_callback(asyncio.to_thread, audit.close)
    audit.sinks.start(audit.put_or_fail)
    api = ApiServer(endpoint_of(config.kubernetes))
    api.upstream.limit = ConnectLimit(config.limits.agent_connects_per_second)
    stack.push_async_callback(api.close)
    verifier = make_verifier(checked, stack)
    targets = TcpTargets(checked.targets, audit)
    stack.push_async_callback(targets.close)
    proxy = KubeProxy(api, audit)
    if config.tracing.endpoint:
        from arcbridge.agent.tracing.exporter import SpanExporter  # and not in agents that make no spans

        proxy.context.tracer = SpanExporter(config.tracing, instance)
        _keep_running(proxy.context.tracer.run(), "spans", stack)
    if config.recording.rules:
        from arcbridge.agent.recording.recorder import Recorder  # and not in agents that record nothing

        proxy.context.recorder = Recorder(config.recording, audit)
        stack.push_async_callback(proxy.context.recorder.close)
    proxy.warm.change(config.limits.agent_warm_connections)
    stack.push_async_callback(proxy.close, HURRY)
    keeper = _keeper(checked, api)
    proofs = ProofChecker(checked.proof, "the agent")
    authenticator = Authenticator(api, verifier, proofs, token_mode=config.token_mode)
    memory.backlog.most = config.limits.agent_waiting_bytes
    sessions = Sessions(
        authenticator,
        proxy,
        targets,
        instance=instance,
        limits=session_limits(config),
        accounts=Accounts(config.limits),
        settings=config.session,
    )
    stack.push_async_callback(sessions.close)
    if config.elevation.groups:
        from arcbridge.agent.elevation.elevation import Elevation  # and not in agents that lend nothing

        sessions.elevation = Elevation(config.elevation, api)
        _keep_running(sessions.elevation.run(), "elevation", stack)
    denylist = None
    if config.denylist_file is not None:
        denylist = Denylist(config.denylist_file, sessions.revocations.deny)
        _keep_running(denylist.run(), "denylist", stack)
    directory = config.state.directory
    choice = RelayChoice(
        checked.relays,
        config.control_connections,
        round_trips=RoundTrips(None if directory is None else directory / "round-trips.json"),
        region=checked.region,
    )
    control = ControlConnections(checked.relays, keeper, sessions, instance=instance, choice=choice)
    stack.push_async_callback(control.close)
    return AgentParts(api, verifier, keeper, denylist, sessions, control)


def make_verifier(checked: Checked, stack: AsyncExitStack) -> TokenVerifier | None:
    """Make what verifies access tokens, with a fetcher of its own; None where the API server alone judges tokens."""
    if checked.issuers is None:
        return None
    config, fetcher = checked.config, HttpFetcher()
    stack.push_async_callback(fetcher.close)
    groups = GroupSources(fetcher.ask, directories=config.graph, claim_sources=config.claim_sources)
    verifier = TokenVerifier(checked.issuers, fetcher, accept=checked.acceptance, groups=groups)
    stack.push_async_callback(verifier.close)
    return verifier


async def _observe(
    checked: Checked, parts: AgentParts, reread: Callable[[], AgentConfig] | None, stack: AsyncExitStack
) -> Reload:
    """Show what the agent counts and finds, look at what it depends on, and reload at SIGHUP where it can `reread`.

    Returns what knows the settings in force.
    """
    metrics, checks = Metrics("agent"), Checks()
    register(metrics, parts)
    checks.add("control", parts.control.unready)
    checks.add("audit", parts.sessions.audit.unready)
    reload = Reload(checked, parts)
    self_checks = SelfChecks(checks_of(parts), log)
    self_checks.register(metrics, checks)

    if reread is not None:
        _reload_at_signal(reload, reread, self_checks, metrics, stack)
    _watch_requests(parts.api, self_checks)
    if parts.verifier is not None:
        parts.verifier.on_directory_failure(lambda: self_checks.look_soon("groups"))
        parts.verifier.on_missing_groups = missing_groups_logger(log)
    keeper = parts.keeper
    reports = AgentReports(
        parts.control.instance,
        self_checks,
        checks,
        lambda: len(parts.sessions),
        lambda: (keeper.known_relay_ca, keeper.certificate_ca, keeper.known_cluster_ca),
    )
    parts.control.report = reports.status
    _keep_running(reports.run(parts.control.send_reports), "reports", stack)
    observe = ObserveServer(checked.config.observe.listen, metrics, checks)
    await observe.start()
    stack.push_async_callback(observe.stop)
    _keep_running(self_checks.run(), "self-checks", stack)
    return reload


def _reload_at_signal(
    reload: Reload, reread: Callable[[], AgentConfig], self_checks: SelfChecks, metrics: Metrics, stack: AsyncExitStack
) -> None:
    async def read_again() -> Outcome:
        try:
            return await reload.run(reread)
        finally:
            # Also after a failure: the files of the API server were read again.
            self_checks.look_soon()

    reloads = Reloads("agent", read_again)
    reloads.register(metrics)
    reloads.start()
    stack.push_async_callback(reloads.stop)


def _keep_running(work: Coroutine[Any, Any, None], name: str, stack: AsyncExitStack) -> None:
    """Run `work` as a task until `stack` is closed."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(report_failure)
    stack.push_async_callback(cancel_and_wait, task)


async def enroll(config: AgentConfig) -> None:
    """Enrol unless the agent has enrolled before, and end. Raises as `serve` does."""
    checked = required(config, serves=False)
    async with AsyncExitStack() as stack:
        api = ApiServer(endpoint_of(config.kubernetes)) if config.state.secret else None
        if api is not None:
            stack.push_async_callback(api.close)
        await _keeper(checked, api).start()


def open_audit(config: AgentConfig, instance: str) -> AuditLog:
    """Open the audit log. Raises ConfigError."""
    settings = config.audit
    return AuditLog(
        settings.file,
        on_failure=settings.on_failure,
        commands=settings.commands,
        fsync=settings.fsync,
        instance=instance,
        sinks=Sinks(settings, Path(settings.file), "agent"),
    )


def _keeper(checked: Checked, api: ApiServer | None) -> CredentialKeeper:
    config = checked.config
    return CredentialKeeper(
        credential_store(config, api),
        checked.relays,
        relay_ca_pin=check_pin(config.relay_ca_pin) if config.relay_ca_pin else "",
        relay_ca_file=config.relay_ca_file,
        join_token_file=config.join_token_file,
    )


def session_limits(config: AgentConfig) -> Limits:
    """Return the limits of users' sessions: whether they outlive their connections, and how long a drain gives them."""
    limits = Limits(drain_timeout=config.session.drain)
    return limits if config.resumption else replace(limits, replay=0)


def credential_store(config: AgentConfig, api: ApiServer | None) -> CredentialStore:
    """Return the store of the credential: a directory, or a Secret (`name` alone means the agent's own namespace)."""
    if config.state.directory is not None:
        return DirectoryStore(config.state.directory)
    if api is None:
        raise ConfigError("state.secret: needs the API server")
    secret = config.state.secret
    if "/" not in secret:
        secret = f"{own_namespace()}/{secret}"
    return SecretStore(api, secret)


def _own_pod(config: AgentConfig, api: ApiServer) -> PodOfWorkload | None:
    """Return this agent's pod, where it leaves its workload when it drains."""
    label = config.kubernetes.drain_label
    if not label:
        return None
    namespace = own_namespace(wanted_by="kubernetes.drain_label: needs the pod's namespace")
    return PodOfWorkload(api, namespace, pod_name(), label)


def own_namespace(
    service_account: Path = SERVICE_ACCOUNT, *, wanted_by: str = "state.secret: write namespace/name"
) -> str:
    """Return the namespace of this pod. Raises ConfigError, which begins with `wanted_by`: a setting and its want."""
    try:
        return (service_account / "namespace").read_text().strip()
    except OSError as error:
        raise ConfigError(f"{wanted_by} (this is not a pod)") from error


async def _run_unless(stopping: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Await `work` unless `stopping` is set first; answers whether it was done. Its errors are raised."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    stop = loop.create_task(stopping.wait())
    try:
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        await cancel_and_wait(task, stop)


async def _drain(
    control: ControlConnections, sessions: Sessions, hurry: asyncio.Event, seconds: float, pod: PodOfWorkload | None
) -> None:
    log.info("agent stopping", step="leaving", sessions=len(sessions), detached=sessions.detached, seconds=seconds)
    control.drain()
    sessions.drain()
    if len(sessions):
        log.info("agent stopping", step="waiting", sessions=len(sessions))
        leaving = [] if pod is None else [asyncio.create_task(pod.leave(), name="leave")]
        try:
            async with asyncio.timeout(seconds):
                await _run_unless(hurry, sessions.wait_empty())
        except TimeoutError:
            log.warning("sessions cut off", sessions=len(sessions), reason="the drain took too long")
        finally:
            await cancel_and_wait(*leaving)


def _watch_requests(api: ApiServer, self_checks: SelfChecks) -> None:
    """Have the self-checks look at once where a user's request has just met what they look for."""

    def refused(kind: str) -> None:
        if kind == "credential":
            api.reread()
        self_checks.look_soon(kind)

    api.upstream.own_refusals.noticed = refused
    api.upstream.on_unreachable = lambda: self_checks.look_soon("api_server", "credential")
