"""The commands that relay and agent have alike, `run` and `doctor`, and the agent's `enroll`."""

from __future__ import annotations

import os
from importlib import import_module

from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings, place_of, start
from arcbridge.errors import ExitCode
from arcbridge.settings.flags import RELAY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any


def run(invocation: Invocation) -> int:
    """Serve until a signal ends it."""
    config = start(invocation)
    from arcbridge.cli.loop import notify, run_until_drained

    serve = _serve_of(invocation.role, config)

    def reread() -> Any:
        return load_settings(invocation, os.environ)

    return run_until_drained(
        lambda stopping, hurry: serve(config, lambda *_: notify("READY=1"), stopping, hurry, reread=reread)
    )


def _serve_of(role: str, config: Any) -> Callable[..., Coroutine[Any, Any, None]]:
    if role == RELAY and config.workers != 1:
        from arcbridge.relay.processes.supervisor import supervise
        from arcbridge.relay.settings import worker_count

        if worker_count(config) > 1:
            return supervise
    serve: Callable[..., Coroutine[Any, Any, None]] = import_module(f"arcbridge.{role}.service").serve
    return serve


def enroll(invocation: Invocation) -> int:
    """Trade the join token for a certificate."""
    config = start(invocation)
    from arcbridge.agent.service import enroll
    from arcbridge.cli.loop import run_until_signal

    run_until_signal(enroll(config))
    print("The agent is enrolled.")
    return ExitCode.DONE


def doctor(invocation: Invocation) -> int:
    """Print what the role's own checks find; exit code 1 where one of them fails."""
    config = start(invocation, "critical")
    import asyncio

    from arcbridge.checks.diagnosis import first_failure
    from arcbridge.cli.output import FindingPrinter

    diagnose = import_module(f"arcbridge.{invocation.role}.doctor").diagnose
    findings = asyncio.run(diagnose(config, place_of(invocation, os.environ)))
    printer = FindingPrinter(invocation.text("output"), [finding.hop for finding in findings])
    for finding in findings:
        printer.add(finding)
    printer.end()
    return ExitCode.DONE if first_failure(findings) is None else ExitCode.FAILURE
