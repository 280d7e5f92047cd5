"""Says in words that a registry may lack revocations, and what to do; for the log, `doctor` and operators' commands."""

from __future__ import annotations

from typing import Final

from arcbridge.checks.diagnosis import Finding, failed, ok, warning
from arcbridge.relay.registry.base import Recovery
from arcbridge.units import rfc3339

REVOCATIONS: Final = "revocations"


def recovery_words(recovery: Recovery) -> str:
    """Return what is the matter, for people."""
    since = ""
    if recovery.backup:
        since = f" made after {rfc3339(recovery.backup)}"
    what = {"restored": "was restored from a backup", "lost": "is new and its CA is not, so it may have been lost"}
    words = f"the registry {what.get(recovery.cause, 'is older than what agents were told')}"
    left = f"{len(recovery.awaited)} clusters were not heard yet" if recovery.awaited else "not all clusters are known"
    return f"{words}: revocations{since} may be missing; {left}; {recovery.returned} came back"


def recovery_finding(recovery: Recovery | None, left_out: int = 0) -> Finding:
    """Return what `doctor` shows. `left_out`: changes of access that no agent keeps."""
    if recovery is None and left_out:
        return warning(
            REVOCATIONS,
            f"none is known to be missing, and {left_out} are more than agents keep: lost with the registry, they do "
            "not come back",
            "back up the registry after each change, or restore users who have no valid token left",
            "ledger_full",
        )
    if recovery is None:
        return ok(REVOCATIONS, "none is known to be missing")
    names = ", ".join(recovery.awaited[:5]) + (", …" if len(recovery.awaited) > 5 else "")
    remedy = f"connect the agents of {names}, or delete clusters that are no more; " if names else ""
    remedy += "revoke again what you know of, then `arcbridge --role relay recovery end`"
    return failed(REVOCATIONS, recovery_words(recovery), remedy, "revocations_missing")
