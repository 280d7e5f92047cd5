"""The self-check of elevation: rules and requests are followed, the policies hold, and what rules name can be lent.

It changes nothing: the API server is asked for reviews of the agent.
"""

from __future__ import annotations

from typing import Final

from arcbridge.agent.elevation.elevation import Elevation
from arcbridge.agent.kube.apiserver import AnswerFailed, ApiServer
from arcbridge.agent.rights import ACCESS, CONSTRAINED, GROUPS, LEGACY, Right
from arcbridge.checks.diagnosis import Finding, failed, ok, skipped, warning

HOP: Final = "elevation"
EXTRA: Final = Right("userextras/arcbridge.io/elevated", always=False)
"""What requests of elevated users need besides (`identity.authentication.ELEVATED`)."""
_CHART: Final = "install the chart of this version with elevation.enabled and these elevation.groups"
_REMEDIES: Final = {
    "elevation_watch": f"see that the API server answers; {_CHART}",
    "elevation_policies": f"{_CHART}: it has the ValidatingAdmissionPolicies without which nothing is lent",
    "elevation_rights": f"{_CHART}, and elevation.account where the agent is no pod of it",
    "elevation_groups": "add the groups to elevation.groups, or take them out of the rules",
}
"""What to do about a fault, by its code."""


async def look_at_elevation(api: ApiServer, elevation: Elevation) -> Finding:
    """Look whether grants may begin, and whether the agent may impersonate the groups that rules may lend."""
    for collection in (elevation.rules, elevation.requests):
        if not collection.current and collection.failure:
            return _bad("elevation_watch", f"no grant is added: {collection.failure}")
    if not elevation.current:
        return skipped(HOP, "rules and requests are being listed")
    if not elevation.policies_hold:
        return _bad("elevation_policies", "no grant is added: the API server takes what is another's to write")
    lacking = [f"group {name}" for name in elevation.groups if not await _may(api, GROUPS, name)]
    if not await _may(api, EXTRA, ""):
        lacking.append(EXTRA.resource)
    if lacking:
        detail = f"the agent may not impersonate {', '.join(lacking)}, so that the API server refuses elevated users"
        return _bad("elevation_rights", detail)
    if elevation.not_begun:
        detail = f"the API server did not let the agent begin {elevation.not_begun} approved requests; its log says why"
        return _bad("elevation_rights", detail)
    if unknown := elevation.book.unknown_groups():
        named = "; ".join(f"{rule}: {', '.join(names)}" for rule, names in sorted(unknown.items()))
        detail = f"rules name groups that are never lent ({named})"
        return warning(HOP, detail, _REMEDIES["elevation_groups"], "elevation_groups")
    skew = elevation.clock.skew
    behind = f"; this machine's clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}" if abs(skew) > 5 else ""
    return ok(HOP, f"{len(elevation.book.rules)} rules are followed{behind}")


def _bad(code: str, detail: str) -> Finding:
    return failed(HOP, detail, _REMEDIES[code], code)


async def _may(api: ApiServer, right: Right, name: str) -> bool:
    """Return whether the agent has a right for one name, by either way of impersonation."""
    for verb in (CONSTRAINED, LEGACY):
        try:
            code, answer = await api.ask("POST", ACCESS, right.question(verb, name))
            if code in (200, 201) and answer["status"].get("allowed") is True:
                return True
        except (AnswerFailed, KeyError, TypeError, AttributeError):
            continue
    return False
