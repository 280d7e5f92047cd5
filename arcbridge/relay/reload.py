"""What a running relay takes over when its settings are read again, and what needs a restart.

Everything is checked and read before anything is put in force, so that a mistake changes nothing. No connection is
touched: what a session was given it keeps, unless the new policy takes it away, as at each change of the policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arcbridge.config import RelayConfig, RelayLimitsConfig
from arcbridge.identity.policy import PolicyFile
from arcbridge.identity.proof import ProofChecker
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.net.descriptors import raise_limit
from arcbridge.observe import logging as logs
from arcbridge.observe.reloads import Outcome, changed, split
from arcbridge.relay.capacity import capacity
from arcbridge.relay.certificate import ServerCertificate
from arcbridge.relay.settings import required

if TYPE_CHECKING:
    from arcbridge.relay.admission import Admission
    from arcbridge.relay.control import ControlServer
    from arcbridge.relay.rendezvous import Rendezvous

RELOADABLE = frozenset(
    {"authentication", "policy", "proof", "max_token_lifetime", "tls", "limits", "observe.log_level"}
)
"""Settings, and tables of them, that hold from a reload on; every other one holds from the next start on."""


class Reload:
    """Puts other settings in force at the parts of one process."""

    def __init__(
        self,
        config: RelayConfig,
        *,
        verifier: TokenVerifier,
        proofs: ProofChecker,
        policy: PolicyFile,
        certificate: ServerCertificate,
        admission: Admission,
        control: ControlServer,
        rendezvous: Rendezvous,
        callers: KeyedTokenBucket[str],
        share: Callable[[RelayLimitsConfig], RelayLimitsConfig],
        now: Callable[[], float],
    ) -> None:
        """`share`: this process' part of the relay's limits; `now`: monotonic seconds."""
        self._config = config
        self._verifier = verifier
        self._proofs = proofs
        self._policy = policy
        self._certificate = certificate
        self._admission = admission
        self._control = control
        self._rendezvous = rendezvous
        self._callers = callers
        self._share = share
        self._now = now
        self._contents = contents(config)

    def apply(self, config: RelayConfig) -> Outcome:
        """Put `config` in force. Raises `ConfigError`, and changes nothing then."""
        checked = required(config)
        assert config.policy is not None, "the check requires it"
        found = contents(config)
        renewed = self._certificate.take(config.tls)
        self._verifier.replace(checked.issuers, checked.acceptance)
        self._proofs.policy = checked.proof
        self._policy.take(config.policy, checked.policy)
        self._change_limits(config.limits)
        logs.reconfigure_level(config.observe.log_level)
        outcome = split(changed(self._config, config), RELOADABLE)
        taken = [*outcome.taken, *(name for name in found if found[name] != self._contents.get(name))]
        if renewed:
            taken.append("tls")
        self._config, self._contents = merged(self._config, config), found
        return Outcome(tuple(dict.fromkeys(taken)), outcome.needs_restart)

    def _change_limits(self, limits: RelayLimitsConfig) -> None:
        shared = self._share(limits)
        fits = capacity(shared, raise_limit())
        limits = replace(shared, sessions=fits.sessions, agents=fits.agents)
        self._admission.change(
            limits.unauthenticated,
            limits.unauthenticated_per_address,
            per_second=limits.connections_per_second_per_address,
        )
        self._control.change_limits(limits.agents, limits.agents_per_second)
        self._rendezvous.change_limits(limits)
        minute = limits.requests_per_minute_per_user
        self._callers.change(self._now(), minute, minute / 60)


def contents(config: RelayConfig) -> dict[str, str]:
    """What the files hold whose changes a reload tells of, as hashes; "" for one that cannot be read."""
    return {"authentication": _digest(config.authentication), "policy": _digest(config.policy)}


def _digest(path: Path | None) -> str:
    try:
        return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def merged(running: RelayConfig, config: RelayConfig) -> RelayConfig:
    """What runs after a reload: the new settings where it takes them over, and the old ones elsewhere."""
    return replace(
        running,
        authentication=config.authentication,
        policy=config.policy,
        proof=config.proof,
        max_token_lifetime=config.max_token_lifetime,
        tls=config.tls,
        limits=config.limits,
        observe=replace(running.observe, log_level=config.observe.log_level),
    )
