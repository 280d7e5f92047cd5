"""The agent's sub-commands: `run` and `enroll`."""

from __future__ import annotations

import os
import signal

from arcbridge.cli.configuration import require
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings
from arcbridge.config import AgentConfig
from arcbridge.errors import ExitCode


def run_agent(invocation: Invocation) -> int:
    """Run an agent command; returns the exit code."""
    config: AgentConfig = load_settings(invocation, os.environ)
    require(config)
    from arcbridge.cli.loop import Interrupted
    from arcbridge.observe import logging

    logging.configure("agent", config.observe.log_level, config.observe.log_format)
    try:
        _COMMANDS[invocation.command[0]](config)
    except Interrupted as error:
        return ExitCode.DONE if error.signal == signal.SIGTERM else ExitCode.INTERRUPTED
    return ExitCode.DONE


def _serve(config: AgentConfig) -> None:
    from arcbridge.agent.service import serve
    from arcbridge.cli.loop import notify, run_until_drained

    run_until_drained(lambda stopping, hurry: serve(config, lambda: notify("READY=1"), stopping, hurry))


def _enroll(config: AgentConfig) -> None:
    from arcbridge.agent.service import enroll
    from arcbridge.cli.loop import run_until_signal

    run_until_signal(enroll(config))
    print("The agent is enrolled.")


_COMMANDS = {"run": _serve, "enroll": _enroll}
