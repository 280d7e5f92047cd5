"""The parts of one agent, as `agent.service` connects them, for those that concern many: metrics, self-checks, reloads.

It makes and closes none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from arcbridge.agent.control import ControlConnections
from arcbridge.agent.denylist import Denylist
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.sessions import Sessions
from arcbridge.identity.verifier import TokenVerifier


@dataclass(frozen=True, slots=True)
class AgentParts:
    """The parts that no other one has; `sessions` has those that serve them: authenticator, proxy, targets, audit."""

    api: ApiServer
    verifier: TokenVerifier | None
    """None where the API server alone judges tokens."""
    keeper: CredentialKeeper
    denylist: Denylist | None
    sessions: Sessions
    control: ControlConnections
