"""Logs tokens without the claim from which the settings take groups: one line a minute for each issuer.

An issuer may leave the claim out for a user without a group, so such a token counts, for its user alone. Where none of
its tokens has had the claim since the settings were read, the settings probably name a wrong one, and that is a
warning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from arcbridge.limiters import Bursts

INTERVAL: Final = 60.0
"""Seconds between two lines about one issuer."""
_USUAL: Final = "other tokens of this issuer have the claim that gives the groups"
_WRONG: Final = (
    "no token of this issuer has had the claim that gives the groups, so its users are in none: correct "
    "claimMappings.groups, or what the issuer puts into tokens"
)


def missing_groups_logger(
    log: Any, clock: Callable[[], float] = time.monotonic
) -> Callable[[str, str, str, bool], None]:
    """Return what `TokenVerifier.on_missing_groups` calls; `log` is the role's logger."""
    bursts = Bursts[tuple[str, bool]](INTERVAL)

    def report(user: str, claim: str, issuer: str, usual: bool) -> None:
        if (tokens := bursts.seen((issuer, usual), clock())) is not None:
            reason = _USUAL if usual else _WRONG
            tell = log.info if usual else log.warning
            tell("token without groups", user=user, claim=claim, issuer=issuer, tokens=tokens, reason=reason)

    return report
