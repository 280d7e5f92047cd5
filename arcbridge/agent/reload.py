"""Takes over, in a running agent, what its settings say when they are read again, and names what needs a restart.

Everything is checked and read before anything is put in force, and what fails then is taken back, so that a mistake
changes nothing. A session keeps the identity that its token was given, until the token is renewed. Connections to TCP
targets end where the new settings do not allow them, and sessions of users on a new denylist end, as at each change of
that file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import structlog

from arcbridge.agent.parts import AgentParts
from arcbridge.agent.settings import Checked, required
from arcbridge.mux import memory
from arcbridge.observe import logging as logs
from arcbridge.observe.reloads import Outcome, changed, digest, merged, split
from arcbridge.settings.config import AgentConfig

log = structlog.get_logger("arcbridge.agent")

RELOADABLE = frozenset(
    {
        "forbidden_audiences",
        "max_token_lifetime",
        "actor_clients",
        "proof",
        "token_mode",
        "targets",
        "limits",
        "session.max_age",
        "session.end_upgraded_streams",
        "observe.log_level",
    }
)
"""Settings, and tables of them, that hold from a reload on. `authentication` and `denylist_file` do too, unless there
was none before or is none now; every other setting holds from the next start on."""
JUDGED = frozenset({"forbidden_audiences", "max_token_lifetime", "actor_clients"})
"""Settings by which tokens of the issuers are judged; where `authentication` waits for a restart, they do too."""


class Reload:
    """Puts other settings in force at the parts of one agent, and has its files read again."""

    def __init__(self, checked: Checked, parts: AgentParts) -> None:
        """`checked`: what is in force."""
        self._in_force = checked
        self._parts = parts
        self._contents = contents(checked.config)

    @property
    def config(self) -> AgentConfig:
        """The settings in force."""
        return self._in_force.config

    async def run(self, reread: Callable[[], AgentConfig]) -> Outcome:
        """Open the audit file anew, which needs no settings; then read these with `reread` and put them in force.

        Whatever it raises, no setting is another then.
        """
        self._parts.sessions.audit.reopen()
        self._parts.api.reread()
        self._parts.keeper.look_soon()
        return self.apply(reread())

    def apply(self, config: AgentConfig) -> Outcome:
        """Put `config` in force. Whatever it raises, the settings that were in force are so again."""
        checked = required(config)
        for problem in checked.problems.warnings:
            log.warning("settings", setting=problem.setting, reason=str(problem))
        reloadable = self._reloadable(checked)
        found = {name: text for name, text in contents(config).items() if name in reloadable}
        with ExitStack() as undo:
            undo.callback(self._put, self._in_force)
            self._put(checked)
            if "denylist_file" in reloadable:
                # Last, because a list that is put back may be older than what the file held a moment ago.
                undo.callback(self._put_denylist, self._in_force)
                self._put_denylist(checked)
            undo.pop_all()
        self._parts.sessions.targets.end_disallowed()
        outcome = split(changed(self.config, config), reloadable)
        taken = [*outcome.taken, *(name for name in found if found[name] != self._contents.get(name))]
        judged = checked if "authentication" in reloadable else self._in_force
        listed = checked if "denylist_file" in reloadable else self._in_force
        self._in_force = replace(
            checked,
            config=merged(self.config, config, reloadable),
            issuers=judged.issuers,
            acceptance=judged.acceptance,
            denylist=listed.denylist,
        )
        self._contents |= found
        return Outcome(tuple(dict.fromkeys(taken)), outcome.needs_restart)

    def _reloadable(self, checked: Checked) -> frozenset[str]:
        """Return the settings that this agent takes over: issuers and a denylist only where it has a part that knows
        them, and goes on to."""
        reloadable = set(RELOADABLE)
        if self._parts.verifier is not None and checked.issuers is not None:
            reloadable.add("authentication")
        elif self._parts.verifier is not None or checked.issuers is not None:
            # The verifier judges on by what it has, or there is none yet.
            reloadable -= JUDGED
        if self._parts.denylist is not None and checked.config.denylist_file is not None:
            reloadable.add("denylist_file")
        return frozenset(reloadable)

    def _put(self, checked: Checked) -> None:
        config = checked.config
        logs.reconfigure_level(config.observe.log_level)
        verifier, sessions = self._parts.verifier, self._parts.sessions
        if verifier is not None and checked.issuers is not None:
            verifier.replace(checked.issuers, checked.acceptance)
        sessions.authenticator.token_mode = config.token_mode
        sessions.authenticator.proofs.policy = checked.proof
        sessions.targets.replace(checked.targets)
        sessions.accounts.change(config.limits)
        sessions.settings = config.session
        memory.backlog.most = config.limits.agent_waiting_bytes
        sessions.proxy.warm.change(0 if sessions.draining else config.limits.agent_warm_connections)
        self._parts.api.upstream.limit.change(time.monotonic(), config.limits.agent_connects_per_second)

    def _put_denylist(self, checked: Checked) -> None:
        assert self._parts.denylist is not None
        assert checked.config.denylist_file is not None
        self._parts.denylist.take(checked.config.denylist_file, checked.denylist)


def contents(config: AgentConfig) -> dict[str, str]:
    """Return the hashes of the files whose changes a reload tells of, by setting; "" for one that cannot be read."""
    return {"authentication": digest(config.authentication), "denylist_file": digest(config.denylist_file)}
