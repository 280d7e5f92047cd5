"""Does what a process of a relay does for the whole of it: lock, port, limits, and what the operator sees.

`Membership` is that of a relay with one process, which does all of it. Of several processes the supervisor holds the
lock and answers the operator, and each worker has a `processes.worker.WorkerMembership`. Invariant: the
service asks its membership and never how many processes there are.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from arcbridge import __version__
from arcbridge.audit.metrics import register as register_audit
from arcbridge.audit.sinks.sender import Sinks
from arcbridge.errors import ArcbridgeError
from arcbridge.net.address import Address
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.reloads import Outcome, Reloads
from arcbridge.observe.server import ObserveServer
from arcbridge.relay.admin_socket import AdminSocket
from arcbridge.relay.audit.log import RelayAudit, audit_file, open_audit
from arcbridge.relay.data_dir import instance_lock
from arcbridge.relay.fleet.base import Fleet
from arcbridge.relay.operations import Operations, Question, Row
from arcbridge.relay.pending_dials import Detour
from arcbridge.relay.settings import CheckedRelay, required
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig
from arcbridge.settings.problems import Problems

log = structlog.get_logger("arcbridge.relay")


@dataclass(frozen=True, slots=True)
class Service:
    """What a process that serves shows and takes."""

    config: RelayConfig
    metrics: Metrics
    checks: Checks
    operations: Operations
    fleet: Fleet
    apply: Callable[[CheckedRelay], Outcome]
    """Puts other settings in force in this process. Raises `ArcbridgeError`."""


class Membership:
    """Of a relay that is one process."""

    serves = "relay serving"
    """The event that is logged once the port is open."""
    index: int | None = None
    """Which of several processes this one is."""
    detour: Detour | None = None
    """The way to the other processes of this relay."""
    shares_port = False
    """Whether other processes of this relay listen on the same port."""

    def __init__(self, reread: Callable[[], RelayConfig] | None = None) -> None:
        """`reread`: reads the settings again, for a reload at SIGHUP; raises `ConfigError`."""
        self.fleet = Fleet()
        """Of a relay without NATS."""
        self.audit = RelayAudit("")
        """Where this process records; opened by `enter`."""
        self._reread = reread

    def enter(self, checked: CheckedRelay, stack: AsyncExitStack) -> None:
        """Log what the settings warn of, take the data directory's lock, and open the audit log. Raises `ConfigError`,
        `StateError`."""
        log_warnings(checked.problems)
        stack.enter_context(instance_lock(checked.config.data_dir))
        self.audit = enter_audit(checked, stack)

    def share(self, limits: RelayLimitsConfig) -> RelayLimitsConfig:
        """Return this process' part of what the whole relay may hold."""
        return limits

    def address(self, configured: Address) -> Address:
        """Return the address to listen on."""
        return configured

    async def siblings_ready(self) -> None:
        """Wait, within bounds, until the other processes have sent what they have."""

    async def wait_to_close(self, hurry: asyncio.Event) -> None:
        """Wait until this process may close its port, or a moment longer than until `hurry`."""

    async def ask(self, service: Service, question: Question) -> list[Row]:
        """Answer a question for this relay with all its processes, and for its fleet. Raises `StateError`."""
        own = service.operations.answer(question)
        # Each relay sends its own checks alone: an operator asks about this machine.
        return own if question.get("ask") == "checks" else own + await service.fleet.ask_others(question)

    async def publish(self, service: Service, stack: AsyncExitStack) -> str:
        """Show the operator what this process counts and finds, and take the operator's questions and settings.

        Returns the address of metrics and health, empty where there is none.
        """

        async def reload(reread: Callable[[], RelayConfig]) -> Outcome:
            # One check, so that what is logged, what is put in force and what the result names are of the same files.
            checked = required(reread())
            log_warnings(checked.problems)
            return service.apply(checked)

        observe = ObserveServer(service.config.observe.listen, service.metrics, service.checks)
        answer = partial(self.ask, service)
        return await open_to_operator(
            service.config, observe, service.metrics, self.audit, answer, reload, self._reread, stack
        )

    def serving(self, checked: CheckedRelay, address: str) -> None:
        """Record that the relay serves at `address`."""
        record_start(self.audit, checked, address, 1)


async def open_to_operator(
    config: RelayConfig,
    observe: ObserveServer,
    metrics: Metrics,
    audit: RelayAudit,
    answer: Callable[[Question], Awaitable[list[Row]]],
    reload: Callable[[Callable[[], RelayConfig]], Awaitable[Outcome]],
    reread: Callable[[], RelayConfig] | None,
    stack: AsyncExitStack,
) -> str:
    """Open metrics and health, the admin socket, and the reload at SIGHUP where settings can be read again.

    Returns the address of metrics and health, empty where there is none. Raises `ConfigError`.
    """
    register_audit(metrics, audit)

    async def recorded(reread: Callable[[], RelayConfig]) -> Outcome:
        audit.reopen()
        try:
            outcome = await reload(reread)
        except ArcbridgeError as error:
            audit.note("settings reload", outcome="refused", reason=error.message)
            raise
        result = {"taken": outcome.taken, "needs_restart": outcome.needs_restart}
        audit.note("settings reload", result=result)
        return outcome

    if reread is not None:
        reloads = Reloads("relay", lambda: recorded(reread))
        reloads.register(metrics)
        reloads.start()
        stack.push_async_callback(reloads.stop)
    admin = AdminSocket(config.data_dir, answer, audit)
    await admin.start()
    stack.push_async_callback(admin.close)
    address = await observe.start()
    stack.push_async_callback(observe.stop)
    return address


def enter_audit(checked: CheckedRelay, stack: AsyncExitStack) -> RelayAudit:
    """Open the audit log of the process that holds the lock; the last that `stack` does but for that lock is to record
    the stop and close it. Raises `ConfigError`."""
    sinks = Sinks(checked.config.audit, Path(audit_file(checked.config)), "relay")
    audit = open_audit(checked.config, f"relay-{secrets.token_hex(8)}", sinks=sinks)
    stack.push_async_callback(asyncio.to_thread, sinks.close)
    stack.push_async_callback(asyncio.to_thread, audit.close)
    sinks.start(audit.put_or_fail)
    stack.callback(audit.stop)
    return audit


def record_start(audit: RelayAudit, checked: CheckedRelay, address: str, workers: int) -> None:
    """Record that a relay serves, with what version and by which settings and policy."""
    settings = hashlib.sha256(repr(checked.config).encode()).hexdigest()[:16]
    policy = {"policy": checked.policy.hash, "rules": len(checked.policy.rules)}
    audit.start({"version": __version__, "address": address, "workers": workers, "settings": settings, **policy})


def log_warnings(problems: Problems) -> None:
    """Log what a check warns of, at the start and at a reload."""
    for problem in problems.warnings:
        log.warning("settings", setting=problem.setting, reason=str(problem))
