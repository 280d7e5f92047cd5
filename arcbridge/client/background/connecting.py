"""Connects a cluster for the command at the terminal: the questions that the background process cannot ask.

The process serves; a login, and whether to trust a cluster that is not known here, are the user's, and the command asks
them with this. Invariant: without a terminal nothing is asked and nothing is done, and the process's refusal says what
to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from arcbridge.client.background.caller import ask
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.service import ClientContext, check_name, refuse_for_several
from arcbridge.client.session.trust import ClusterTrust
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config import ClientConfig

JUST_NOW = 10.0
"""Seconds before a command's start in which another one's login may not have reached the process's answer to it."""
FAILURE_HELD = 1.1
"""Seconds after which the process makes another attempt: it gives the error of the last one for a moment
(`FAILURE_HOLD`)."""


def check_connect(config: ClientConfig, names: Sequence[str]) -> None:
    """Raise ConfigError for names, or settings, with which nothing can be connected."""
    if not names:
        raise ConfigError("cluster: required but not set; name the clusters to connect (`clusters` lists them)")
    for name in names:
        check_name(name, "")
    refuse_for_several(config, len(names), "kube_context", "cluster_ca_pin", "port")
    if config.file == "-":
        raise ConfigError("flag --file: connect keeps the kubeconfig right, and needs a file for that")


def is_to_be_trusted(context: ClientContext, name: str) -> bool:
    """Return whether the user, or a setting, is to say whether a cluster is trusted; the process never does."""
    return not context.trust().known(name) and bool(context.terminal.ask_trust or context.config.trust_first_use)


async def trust(context: ClientContext, name: str, rule: ClusterTrust | None = None) -> None:
    """Have a session, in which the question is asked; raises ArcbridgeError. `rule`: another one than the settings'."""
    session = context.session(name, rule)
    try:
        await session.connect_once()
    finally:
        session.close()
        await session.wait_closed()


async def ask_again_after_login(context: ClientContext, line: bytes, began: float) -> dict[str, Any]:
    """Log in, and ask the process once more; raises ArcbridgeError.

    `began`: when this command did (unix seconds). A login since then, or shortly before, is another command's for the
    same reason: of hundreds of kubectl at once one opens a browser.
    """
    await context.login().log_in(since=began - JUST_NOW)
    await asyncio.sleep(FAILURE_HELD)
    return await asyncio.to_thread(ask, BackgroundPaths.find(context.environment), line, context.environment)


def login_may_help(context: ClientContext, error: ArcbridgeError) -> bool:
    """Return whether a login at this terminal may mend an error."""
    login = context.config.login
    can = context.terminal.may_log_in and bool(login.issuer) and login.grant_type != PROGRAM
    return can and error.exit_code == ExitCode.LOGIN
