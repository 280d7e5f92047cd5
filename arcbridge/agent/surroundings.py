"""Looks at what a start of the agent would meet on this machine besides its settings: the port of metrics, its disks.

`config check` runs it behind the check of the settings. An agent that runs on these very settings is in nobody's way.
A port in use is a warning where this user may not see by whom: only root looks into a running agent (cli.core_dumps).
A full disk under the audit log is a warning, because a start goes on then as `on_failure` of `[audit]` says; so is one
under the credential of an agent that has enrolled, because a start only reads it.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

from arcbridge.agent.settings import Checked
from arcbridge.errors import ConfigError, StateError
from arcbridge.observe.listen import check_observe_port, port_of
from arcbridge.pki.credentials import AgentCredential, DirectoryStore
from arcbridge.settings.problems import Problems
from arcbridge.settings.surroundings import is_full, listeners


def look_around(checked: Checked, runs_these: Callable[[int], bool]) -> Problems:
    """Return what would be in the way of a start. `runs_these`: whether a process was given these settings."""
    config, problems = checked.config, Problems()
    listen, state, audit = config.observe.listen, config.state.directory, config.audit.file
    if listen and port_of(listen):
        _look_at_port(listen, runs_these, problems)
    if state is not None and (why := is_full(state)):
        if _has_enrolled(state):
            problems.warn("state.directory", f"{why}; until then no renewed certificate is stored")
        else:
            problems.error("state.directory", why)
    if audit not in ("", "-") and (why := is_full(Path(audit))):
        problems.warn("audit.file", why)
    return problems


def _has_enrolled(directory: Path) -> bool:
    try:
        kept = DirectoryStore(directory).read()
        credential = None if kept is None else AgentCredential.from_entries(kept)
        return credential is not None and credential.validity()[1] > time.time()
    except StateError:
        return False  # the settings' check has reported it


def _look_at_port(listen: str, runs_these: Callable[[int], bool], problems: Problems) -> None:
    by = listeners(port_of(listen))
    if any(map(runs_these, by)):
        return
    try:
        check_observe_port(listen)
    except ConfigError as error:
        if by or getattr(error.__cause__, "errno", None) != errno.EADDRINUSE:
            problems.error("observe.listen", error.message)
            return
        problems.warn(
            "observe.listen",
            f"observe.listen {listen!r}: the port is in use by a process that this user may not look into; where that "
            "is not this agent, choose another port",
        )
