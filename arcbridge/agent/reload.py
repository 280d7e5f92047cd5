"""What a running agent takes over when its settings are read again, and what needs a restart.

Everything is checked and read before anything is put in force, so that a mistake changes nothing. No session is
touched: one keeps the identity that its token was given, until it is renewed. Sessions of users on a new denylist end,
as at each change of that file.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from arcbridge.agent.audit import AuditLog
from arcbridge.agent.authenticator import Authenticator
from arcbridge.agent.denylist import Denylist
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.settings import required
from arcbridge.agent.targets import TcpTargets
from arcbridge.config import AgentConfig
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.mux import memory
from arcbridge.observe import logging as logs
from arcbridge.observe.reloads import Outcome, changed, split

_log = structlog.get_logger("arcbridge.agent")

RELOADABLE = frozenset(
    {
        "forbidden_audiences",
        "max_token_lifetime",
        "proof",
        "token_mode",
        "targets",
        "limits",
        "session.max_age",
        "observe.log_level",
    }
)
"""Settings, and tables of them, that hold from a reload on. `authentication` and `denylist_file` do too, unless there
was none before or is none now; every other setting holds from the next start on."""


class Reload:
    """Puts other settings in force at the parts of one agent, and has its files read again."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        api: ApiServer,
        verifier: TokenVerifier | None,
        authenticator: Authenticator,
        sessions: Sessions,
        targets: TcpTargets,
        denylist: Denylist | None,
        audit: AuditLog,
    ) -> None:
        self.config = config
        """The settings in force."""
        self._api = api
        self._verifier = verifier
        self._authenticator = authenticator
        self._sessions = sessions
        self._targets = targets
        self._denylist = denylist
        self._audit = audit
        self._contents = contents(config)

    async def run(self, reread: Callable[[], AgentConfig]) -> Outcome:
        """Open the audit file anew, which needs no settings; then read these with `reread` and put them in force.

        Raises ConfigError, and no setting is another then.
        """
        self._audit.reopen()
        self._api.reread()
        return self.apply(reread())

    def apply(self, config: AgentConfig) -> Outcome:
        """Put `config` in force. Raises ConfigError, and changes nothing then."""
        checked = required(config)
        reloadable = set(RELOADABLE)
        if self._verifier is not None and checked.issuers is not None:
            self._verifier.replace(checked.issuers, checked.acceptance)
            reloadable.add("authentication")
        if self._denylist is not None and config.denylist_file is not None:
            self._denylist.take(config.denylist_file, checked.denylist)
            reloadable.add("denylist_file")
        self._authenticator.token_mode = config.token_mode
        self._authenticator.proofs.policy = checked.proof
        self._targets.replace(checked.targets)
        self._sessions.accounts.change(config.limits)
        self._sessions.max_age = config.session.max_age
        memory.backlog.most = config.limits.agent_waiting_bytes
        self._api.upstream.limit.change(time.monotonic(), config.limits.agent_connects_per_second)
        logs.reconfigure_level(config.observe.log_level)
        for problem in checked.problems.warnings:
            _log.warning("settings", setting=problem.setting, reason=str(problem))
        outcome = split(changed(self.config, config), frozenset(reloadable))
        found = contents(config)
        taken = [
            *outcome.taken,
            *(name for name in found if name in reloadable and found[name] != self._contents.get(name)),
        ]
        self.config, self._contents = self._merged(config, frozenset(reloadable)), found
        return Outcome(tuple(dict.fromkeys(taken)), outcome.needs_restart)

    def _merged(self, config: AgentConfig, reloadable: frozenset[str]) -> AgentConfig:
        """What runs now: the new settings where a reload takes them over. The others stay named until a restart."""
        running = self.config
        return replace(
            running,
            authentication=config.authentication if "authentication" in reloadable else running.authentication,
            denylist_file=config.denylist_file if "denylist_file" in reloadable else running.denylist_file,
            forbidden_audiences=config.forbidden_audiences,
            max_token_lifetime=config.max_token_lifetime,
            proof=config.proof,
            token_mode=config.token_mode,
            targets=config.targets,
            limits=config.limits,
            session=replace(running.session, max_age=config.session.max_age),
            observe=replace(running.observe, log_level=config.observe.log_level),
        )


def contents(config: AgentConfig) -> dict[str, str]:
    """What the files hold whose changes a reload tells of, as hashes; "" for one that cannot be read."""
    return {"authentication": _digest(config.authentication), "denylist_file": _digest(config.denylist_file)}


def _digest(path: Path | None) -> str:
    try:
        return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
