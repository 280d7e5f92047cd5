"""Puts the settings that were read again in force in a running relay, and names those that need a restart.

Everything is checked and read before anything is put in force, and what fails then is taken back, so that a mistake
changes nothing. No connection is touched: what a session was given it keeps, unless the new policy takes it away, as
at each change of the policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from arcbridge.identity.policy import Policy
from arcbridge.net.descriptors import raise_limit
from arcbridge.observe import logging as logs
from arcbridge.observe.reloads import Outcome, changed, digest, merged, split
from arcbridge.relay.capacity import fitted
from arcbridge.relay.certificate import Loaded
from arcbridge.relay.parts import Basis, Entrances
from arcbridge.relay.settings import CheckedRelay
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig

RELOADABLE = frozenset(
    {"authentication", "policy", "policy_share", "policy_hold", "proof", "max_token_lifetime", "actor_clients", "tls",
     "limits", "observe.log_level"}
)  # fmt: skip
"""Settings, and tables of them, that hold from a reload on; every other one holds from the next start on."""


class RelayReload:
    """Puts other settings in force at the parts of one process."""

    def __init__(
        self, basis: Basis, entrances: Entrances, share: Callable[[RelayLimitsConfig], RelayLimitsConfig]
    ) -> None:
        """`share`: this process' part of the relay's limits."""
        self._basis = basis
        self._entrances = entrances
        self._share = share
        self.checked = basis.checked
        """What is in force."""
        self.limits, self.wanted = basis.limits, basis.wanted
        """The limits that count, of those that the settings want: see `Basis`."""
        self._config = basis.checked.config
        self._contents = contents(self._config)

    def apply(self, checked: CheckedRelay) -> Outcome:
        """Put the settings in force that were checked. Whatever it raises, those that were in force are so again."""
        config = checked.config
        found = contents(config)
        certificate = self._basis.certificate.read(config.tls)
        with ExitStack() as undo:
            undo.callback(self._put, self.checked, self._basis.policy.current(), self._basis.certificate.loaded)
            renewed = self._put(checked, checked.policy, certificate)
            undo.pop_all()
        self.checked = checked
        outcome = split(changed(self._config, config), RELOADABLE)
        taken = [*outcome.taken, *(name for name in found if found[name] != self._contents.get(name))]
        if renewed:
            taken.append("tls")
        self._config, self._contents = merged(self._config, config, RELOADABLE), found
        return Outcome(tuple(dict.fromkeys(taken)), outcome.needs_restart)

    def _put(self, checked: CheckedRelay, policy: Policy, certificate: Loaded) -> bool:
        """Put all of it in force; return whether the certificate is another. Policy and certificate are arguments of
        their own: those in force may be newer than the check, because their files are read again when they change."""
        config = checked.config
        assert config.policy is not None, "the check requires it"
        logs.reconfigure_level(config.observe.log_level)
        self.wanted = self._share(config.limits)
        self.limits = limits = fitted(self.wanted, raise_limit())
        parts = self._entrances
        for part in (parts.admission, parts.control, parts.clients, parts.api):
            part.change_limits(limits)
        parts.pumps.payers.change(limits.loop_share_per_user / 100, time.monotonic())
        self._basis.verifier.replace(checked.issuers, checked.acceptance)
        self._basis.checks.proofs.policy = checked.proof
        self._basis.policy.hold_back(config.policy_share, config.policy_hold)
        self._basis.policy.take(config.policy, policy)
        return self._basis.certificate.put(certificate)


def contents(config: RelayConfig) -> dict[str, str]:
    """Return the hashes of the files whose changes a reload tells of, by setting; "" for one that cannot be read."""
    return {"authentication": digest(config.authentication), "policy": digest(config.policy)}
