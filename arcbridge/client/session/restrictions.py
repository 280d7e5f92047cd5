"""Makes the record of what sessions give up of their user's rights, from the client's settings; the agent enforces it.

It knows no request. Invariant: what the agent would not understand is refused here, before anything is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from arcbridge.errors import ConfigError, PermissionRefused
from arcbridge.refusals import Refusal, RefusalRule
from arcbridge.settings.config import RestrictConfig
from arcbridge.settings.suggest import unknown
from arcbridge.wire.records import MOST_NAMESPACES, NAMESPACE_NAME, RESTRICTION_VERBS, UNRESTRICTED, Restrictions


def restrictions_of(config: RestrictConfig, until: int = 0) -> Restrictions:
    """Return the restrictions of the settings; `until`: unix seconds at which the session ends, 0: as any other. Raises
    ConfigError."""
    for verb in config.verbs:
        if verb not in RESTRICTION_VERBS:
            raise ConfigError(unknown("restrict.verbs", verb, RESTRICTION_VERBS))
    for name in config.namespaces:
        if not NAMESPACE_NAME.fullmatch(name):
            raise ConfigError(f"restrict.namespaces: {name[:63]!r}: no name of a namespace")
    if len(config.namespaces) > MOST_NAMESPACES:
        raise ConfigError(f"restrict.namespaces: a session has at most {MOST_NAMESPACES}")
    return Restrictions(
        config.read_only, not config.secrets, " ".join(sorted(set(config.namespaces))), _sorted(config.verbs), until
    )


def endpoint_name(cluster: str, restrictions: Restrictions) -> str:
    """Return the name under which port and certificates of a cluster's endpoint are kept: that of the cluster, with
    what its sessions give up."""
    return " ".join((cluster, *replace(restrictions, until=0).words()))


def restricts_requests(restrictions: Restrictions) -> bool:
    """Return whether more is given up than the time: such a session opens no TCP target."""
    return replace(restrictions, until=0) != UNRESTRICTED


def older_agent(cluster: str) -> PermissionRefused:
    """Return the error for an agent of a version that knows no restrictions, and has refused them."""
    error = PermissionRefused(
        f'the agent of cluster "{cluster}" is older and cannot restrict a session, so it refused this one; update the '
        "agent, or connect without restrictions"
    )
    error.refusal = Refusal(RefusalRule.RESTRICTED_UNKNOWN)
    return error


def time_is_over(cluster: str) -> PermissionRefused:
    """Return the error for a session whose time, as its user gave it, is over."""
    error = PermissionRefused(
        f'the time that --for gave the session with cluster "{cluster}" is over; start the command again for more'
    )
    error.refusal = Refusal(RefusalRule.RESTRICTED_UNTIL)
    return error


def _sorted(verbs: Sequence[str]) -> str:
    return " ".join(verb for verb in RESTRICTION_VERBS if verb in verbs)
