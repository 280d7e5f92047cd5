"""Runs the agent as a process: makes all parts in order, and ends them in the opposite order.

The end is a drain in named steps: *leaving* (GOAWAY to relays and clients: no more dials, no more streams), *waiting*
(open streams have 30 s), *gone*. A second signal leaves one second. It does nothing of what the parts do.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import structlog

from arcbridge import __version__
from arcbridge.agent.accounts import Accounts, check_limits
from arcbridge.agent.audit import AuditLog
from arcbridge.agent.audit.log import check_policy
from arcbridge.agent.authenticator import Authenticator
from arcbridge.agent.control import ControlConnections
from arcbridge.agent.denylist import Denylist
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.kube.apiserver import SERVICE_ACCOUNT, ApiServer, endpoint_of
from arcbridge.agent.kube.connect_limit import ConnectLimit
from arcbridge.agent.kube.proxy import KubeProxy
from arcbridge.agent.metrics import register
from arcbridge.agent.revocations import Revocations
from arcbridge.agent.secret_store import SecretStore
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.targets import TcpTargets, read_targets
from arcbridge.config import AgentConfig
from arcbridge.errors import ConfigError
from arcbridge.identity import authentication
from arcbridge.identity.groups import GroupSources
from arcbridge.identity.groups import check as check_groups
from arcbridge.identity.proof import ProofChecker, policy_of
from arcbridge.identity.verifier import Acceptance, TokenVerifier
from arcbridge.mux import memory
from arcbridge.net.address import Address, parse_address
from arcbridge.net.fetch import HttpFetcher
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.server import ObserveServer
from arcbridge.pki.credentials import CredentialStore, DirectoryStore
from arcbridge.pki.pins import check_pin
from arcbridge.wire.limits import Limits

DRAIN = 30.0
"""Seconds that open streams may take after the first signal."""
MIN_AGE = 10.0
"""Seconds: the shortest `session.max_age`."""
HURRY = 0.5
"""Seconds for the last bytes after the second signal, or after the drain."""

_log = structlog.get_logger("arcbridge.agent")


async def serve(config: AgentConfig, ready: Callable[[], None], stopping: asyncio.Event, hurry: asyncio.Event) -> None:
    """Serve until `stopping` is set, then drain; end within a second once `hurry` is set, too.

    `ready` is called once, when the first control connection is up. Raises ConfigError, StateError, EnrolmentRefused or
    PinMismatch when it cannot start.
    """
    relays = check(config)
    instance = f"agent-{secrets.token_hex(8)}"
    async with AsyncExitStack() as stack:
        audit = open_audit(config, instance)
        stack.push_async_callback(asyncio.to_thread, audit.close)
        api = ApiServer(endpoint_of(config.kubernetes))
        api.upstream.limit = ConnectLimit(config.limits.agent_connects_per_second)
        stack.push_async_callback(api.close)
        fetcher = HttpFetcher()
        stack.push_async_callback(fetcher.close)
        verifier = None
        if config.authentication is not None:
            accept = Acceptance(frozenset(config.forbidden_audiences), config.max_token_lifetime)
            issuers = authentication.load(config.authentication)
            groups = GroupSources(issuers, fetcher.ask, directories=config.graph, claim_sources=config.claim_sources)
            verifier = TokenVerifier(issuers, fetcher, accept=accept, groups=groups)
            stack.push_async_callback(verifier.close)
        targets = TcpTargets(read_targets(config.targets), audit)
        stack.push_async_callback(targets.close)
        proxy = KubeProxy(api, audit)
        stack.push_async_callback(proxy.close, HURRY)
        keeper = _keeper(config, api, relays)
        proofs = ProofChecker(policy_of(config.proof), "the agent")
        authenticator = Authenticator(api, verifier, token_mode=config.token_mode, proofs=proofs)
        revocations = Revocations()
        memory.backlog.most = config.limits.agent_waiting_bytes
        sessions = Sessions(
            authenticator,
            proxy,
            targets,
            instance=instance,
            software=__version__,
            limits=Limits() if config.resumption else Limits(replay=0),
            audit=audit,
            accounts=Accounts(config.limits),
            revocations=revocations,
            max_age=config.session.max_age,
        )
        stack.push_async_callback(sessions.close)
        denylist = None
        if config.denylist_file is not None:
            denylist = Denylist(config.denylist_file, revocations.deny)
            reading = asyncio.get_running_loop().create_task(denylist.run(), name="denylist")
            stack.push_async_callback(_cancel, reading)
        control = ControlConnections(
            relays, keeper, sessions, instance=instance, software=__version__, wanted=config.control_connections
        )
        stack.push_async_callback(control.close)

        metrics, checks = Metrics("agent"), Checks()
        register(
            metrics,
            control=control,
            sessions=sessions,
            proxy=proxy,
            targets=targets,
            keeper=keeper,
            audit=audit,
            verifier=verifier,
            proofs=proofs,
            denylist=denylist,
        )
        checks.add("control", control.unready)
        checks.add("audit", audit.unready)
        observe = ObserveServer(config.observe.listen, metrics, checks)
        await observe.start()
        stack.push_async_callback(observe.stop)

        if not await _run_unless(stopping, keeper.start()):
            return
        _log.info("agent started", instance=instance, cluster=keeper.current.cluster, relays=len(relays))
        renewing = asyncio.get_running_loop().create_task(keeper.run(), name="renewal")
        stack.push_async_callback(_cancel, renewing)
        control.start()
        if await _run_unless(stopping, control.connected.wait()):
            ready()
        await stopping.wait()
        await _drain(control, sessions, hurry)
    _log.info("agent stopped", step="gone")


async def enroll(config: AgentConfig) -> None:
    """Enrol unless the agent has enrolled before, and end. Raises as `serve` does."""
    relays = check(config)
    api = ApiServer(endpoint_of(config.kubernetes)) if config.state.secret else None
    try:
        await _keeper(config, api, relays).start()
    finally:
        if api is not None:
            await api.close()


def open_audit(config: AgentConfig, instance: str) -> AuditLog:
    """Open the audit log. Raises ConfigError."""
    settings = config.audit
    return AuditLog(
        settings.file,
        on_failure=settings.on_failure,
        commands=settings.commands,
        fsync=settings.fsync,
        instance=instance,
    )


def _keeper(config: AgentConfig, api: ApiServer | None, relays: list[Address]) -> CredentialKeeper:
    return CredentialKeeper(
        credential_store(config, api),
        relays,
        relay_ca_pin=check_pin(config.relay_ca_pin) if config.relay_ca_pin else "",
        relay_ca_file=config.relay_ca_file,
        join_token_file=config.join_token_file,
    )


def check(config: AgentConfig) -> list[Address]:
    """Check the settings that need no file and no network; answer the relays. Raises ConfigError that names the key."""
    if not config.relays:
        raise ConfigError("relays: at least one is needed, as https://host:port")
    relays: list[Address] = []
    for n, text in enumerate(config.relays):
        try:
            address = parse_address(text)
        except ConfigError as error:
            raise ConfigError(f"relays[{n}]: {error.message}") from error
        if address in relays:
            raise ConfigError(f"relays[{n}]: {address} is given twice")
        relays.append(address)
    if config.control_connections < 1:
        raise ConfigError("control_connections: must be at least 1; 2 keeps the cluster within reach when a relay dies")
    if config.relay_ca_pin:
        try:
            check_pin(config.relay_ca_pin)
        except ConfigError as error:
            raise ConfigError(f"relay_ca_pin: {error.message}") from error
    if bool(config.state.secret) == (config.state.directory is not None):
        raise ConfigError("state: exactly one of state.directory and state.secret is needed")
    if config.session.max_age < MIN_AGE:
        raise ConfigError(f"session.max_age: must be at least {MIN_AGE:.0f} s; clients would do little but come back")
    if config.authentication is None and not config.token_mode:
        raise ConfigError("authentication: missing, and token_mode is off: no caller could log in")
    if config.authentication is None and (config.graph or config.claim_sources):
        raise ConfigError("authentication: missing: [graph] and claim_sources are about the tokens of its issuers")
    check_groups(config.graph, config.claim_sources)
    policy_of(config.proof)
    check_policy(config.audit.on_failure)
    read_targets(config.targets)
    check_limits(config.limits)
    return relays


def credential_store(config: AgentConfig, api: ApiServer | None) -> CredentialStore:
    """The store of the credential: a directory, or a Secret (`name` alone means the agent's own namespace)."""
    if config.state.directory is not None:
        return DirectoryStore(config.state.directory)
    if api is None:
        raise ConfigError("state.secret: needs the API server")
    secret = config.state.secret
    if "/" not in secret:
        secret = f"{own_namespace()}/{secret}"
    return SecretStore(api, secret)


def own_namespace(service_account: Path = SERVICE_ACCOUNT) -> str:
    """The namespace of this pod."""
    try:
        return (service_account / "namespace").read_text().strip()
    except OSError as error:
        raise ConfigError("state.secret: write namespace/name (this is not a pod)") from error


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
        for one in (task, stop):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)


async def _drain(control: ControlConnections, sessions: Sessions, hurry: asyncio.Event) -> None:
    _log.info("agent stops", step="leaving", sessions=len(sessions), detached=sessions.detached)
    control.drain()
    sessions.drain()
    if len(sessions):
        _log.info("agent stops", step="waiting", sessions=len(sessions))
        try:
            async with asyncio.timeout(DRAIN):
                await _run_unless(hurry, sessions.wait_empty())
        except TimeoutError:
            _log.warning("sessions cut off", sessions=len(sessions), reason="the drain took too long")


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
