"""The agent's sub-commands: `run`, `enroll`, `doctor` and `audit verify`."""

from __future__ import annotations

import os
import signal

from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings, place_of
from arcbridge.errors import ExitCode
from arcbridge.settings.config import AgentConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def run_agent(invocation: Invocation) -> int:
    """Run an agent command; returns the exit code."""
    return _COMMANDS[invocation.command[0]](invocation)


def _with_settings(work: Callable[[AgentConfig, Callable[[], AgentConfig]], None]) -> Callable[[Invocation], int]:
    """Return a command that needs the agent's settings and its log."""

    def command(invocation: Invocation) -> int:
        config: AgentConfig = load_settings(invocation, os.environ)
        from arcbridge.cli.loop import Interrupted
        from arcbridge.observe import logging
        from arcbridge.settings.problems import SettingsRefused, located

        logging.configure("agent", config.observe.log_level, config.observe.log_format)
        try:
            work(config, lambda: load_settings(invocation, os.environ))
        except SettingsRefused as error:
            raise SettingsRefused(located(error.problems, place_of(invocation, os.environ))) from error
        except Interrupted as error:
            return ExitCode.DONE if error.signal == signal.SIGTERM else ExitCode.INTERRUPTED
        return ExitCode.DONE

    return command


def _serve(config: AgentConfig, reread: Callable[[], AgentConfig]) -> None:
    from arcbridge.agent.service import serve
    from arcbridge.cli.loop import notify, run_until_drained

    run_until_drained(lambda stopping, hurry: serve(config, lambda: notify("READY=1"), stopping, hurry, reread=reread))


def _enroll(config: AgentConfig, reread: Callable[[], AgentConfig]) -> None:
    from arcbridge.agent.service import enroll
    from arcbridge.cli.loop import run_until_signal

    run_until_signal(enroll(config))
    print("The agent is enrolled.")


def _audit(invocation: Invocation) -> int:
    from arcbridge.cli.audit import run_audit

    return run_audit(invocation)  # of files, wherever they are: it needs no agent's settings


def _doctor(invocation: Invocation) -> int:
    import asyncio

    from arcbridge.agent.doctor import diagnose
    from arcbridge.cli.diagnosis import print_findings
    from arcbridge.observe import logging

    config: AgentConfig = load_settings(invocation, os.environ)
    logging.configure("agent", "critical", config.observe.log_format)
    well = print_findings(
        asyncio.run(diagnose(config, place_of(invocation, os.environ))), invocation.text("output", "table")
    )
    return ExitCode.DONE if well else ExitCode.FAILURE


_COMMANDS = {"doctor": _doctor, "run": _with_settings(_serve), "enroll": _with_settings(_enroll), "audit": _audit}
