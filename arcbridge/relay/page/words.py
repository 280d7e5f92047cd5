"""Says in words how a cluster is, what is wrong there, and what to do, from the names and codes that agents report.

An agent reports no sentence, because its details may name hosts of the cluster; the relay has a sentence for each code
of its own version, and the code itself for one of another version. The command that shows all of it is the agent's own
`doctor`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

SERVING: Final = "serving"
DEGRADED: Final = "degraded"
DOWN: Final = "down since"
NEVER: Final = "never seen"
STATES: Final = (DOWN, DEGRADED, NEVER, SERVING)
"""The states, worst first."""
REVOKED: Final = "Revoked"
"""The state in `cluster list` of a cluster that an operator has shut out, known to the registry or not."""
MOST_FAULTS: Final = 3
"""Faults of one cluster that are shown."""


class Fault(NamedTuple):
    """One thing that is wrong."""

    what: str
    """A sentence without its full stop."""
    remedy: str


class Judgement(NamedTuple):
    """How a cluster is."""

    state: str
    """One of `STATES`."""
    since: float
    """Unix seconds from which it is down; 0 in every other state."""
    faults: tuple[Fault, ...]


_DOCTOR: Final = "run `arcbridge --role agent doctor` there for the details"
_PODS: Final = (
    "look whether its agents run (`kubectl get pods -n arcbridge`) and, by their log, why they reach no relay"
)
_TABLE: Final = """
api_ca: the agent does not trust its API server's certificate
    put that API server's CA into kubernetes.ca_file of the agent's settings, or correct kubernetes.server there
api_unreachable: the agent does not reach its API server
    check that the API server runs, network policies, and kubernetes.server of the agent's settings
agent_credential: the API server does not accept the agent's own credential
    check that its ServiceAccount exists (a new one needs new pods); outside of a pod, the file of its token
impersonation: the agent may not act as users, so that every request is refused
    run `helm upgrade` with the agent's chart of this version, or apply config/kubernetes: both have the rules
impersonation_attributes: the agent may not send an attribute that the authentication file maps
    give its account the right (userExtras of the chart), or take the mapping out
impersonation_verbs: the agent's rules say for whom it acts and not what for
    run `helm upgrade` with the agent's chart of this version, or apply config/kubernetes: both have the rules
reload: the agent cannot read a file that has changed, and goes on with the former one
    correct the file that its log names
issuer_ca: the agent does not trust the issuer's certificate
    put its CA into issuer.certificateAuthority of the agent's authentication file
issuer_document: the issuer calls itself by another URL than the agent's authentication file does
    correct issuer.url there
issuer_unreachable: the agent does not reach the issuer, and has no keys to verify logins with
    check that the issuer runs, that the cluster may connect to it, and issuer.url of the agent's authentication file
graph_credential: Entra ID refuses the agent's application
    renew its credential in the file that [graph] names
graph_permission: the agent's application may not read groups at Microsoft Graph
    give it the permissions of docs/how-to/entra-id.md, with admin consent
graph_unreachable: the agent does not reach Microsoft Graph
    check [graph], and that the cluster may connect to it
audit: the agent cannot write its audit log
    make room on its volume, or correct audit.file
audit_rotation: the agent cannot rename its audit log, which grows
    let its user write the directory of the log
audit_sink: audit records do not reach their collector
    check [audit.sinks] of the agent, and the collector itself
enrolment: the agent cannot enrol at another relay
    check `relays` and relay_ca_pin of the agent
relay: the agent does not reach its relays
    check `relays` of the agent, and the relays
public_address: a relay sends the agent to an address that is not among its `relays`
    correct public_address at that relay, or add the address to `relays` of the agent
join: the agent's last join at a relay failed
    see `join failed` in the agent's log
certificate: the agent's certificate lapses and was not renewed
    see `certificate not renewed` in the agent's log
"""
"""What each code of an agent's self-checks says, and what to do. Those of warnings are not reported."""
FAULTS: Final[Mapping[str, Fault]] = {
    code: Fault(what, remedy) for code, what, remedy in re.findall(r"(\w+): (.+)\n    (.+)", _TABLE)
}


def fault_of(word: str) -> Fault:
    """Return what a word of a report, `check:code` or the name of a readiness check, says."""
    name, _, code = word.partition(":")
    if code in FAULTS:
        return FAULTS[code]
    if name == "control":
        return Fault("an agent has too few connections to relays", "check `relays` of the agent")
    if code.endswith("_slow"):
        return Fault(f"the agent's check `{name}` has no answer within its deadline", _DOCTOR)
    return Fault(f"the agent's check `{name}` fails{f' ({code})' if code else ''}", _DOCTOR)


def judge(row: Mapping[str, Any]) -> Judgement:
    """Return how a cluster is, by its row of `cluster list`."""
    name = row["name"]
    if row["state"] == REVOKED:
        words = Fault("an operator has revoked it", f"`arcbridge --role relay cluster restore {name}` lets it in again")
        return Judgement(DOWN, row["revoked_at"], (words,))
    agents, ready = row["agents"] or 0, row["ready"] or 0
    if agents:
        found = [fault_of(word) for word in str(row["failing"]).split()]
        if not found and ready < agents:
            found = [Fault(f"{agents - ready} of its agents are not ready", _DOCTOR)]
        return Judgement(DEGRADED if found else SERVING, 0.0, tuple(dict.fromkeys(found))[:MOST_FAULTS])
    if row["state"] == "Expired":
        words = Fault(
            "its certificate has lapsed, so that no agent of it is let in",
            f"make a new join token: `arcbridge --role relay token create --cluster {name}`",
        )
    elif row["last_seen"]:
        words = Fault("no agent of it is connected", _PODS)
    else:
        words = Fault("it has enrolled and no agent of it has ever connected", _PODS)
    return Judgement(DOWN if row["last_seen"] else NEVER, row["last_seen"], (words,))
