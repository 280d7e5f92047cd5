"""Holds what a relay counts: plain integers, read by the metrics at scrape time. No label comes from outside."""

from __future__ import annotations

from collections import Counter
from typing import Final

from arcbridge.net.client_hello import Reason
from arcbridge.net.join import JoinCode
from arcbridge.observe.metrics import Buckets
from arcbridge.relay.proxy_protocol import ProxyRefusal

REJECTIONS = (
    "cap_total",
    "cap_control",
    "cap_join",
    "cap_http",
    "cap_address",
    "rate_address",
    "descriptors",
    "peek_timeout",
    "peek_closed",
    "no_protocol",
    "handshake",
    "failed",
    *(reason.value for reason in Reason),
    *(reason.value for reason in ProxyRefusal),
)
"""Why a connection was closed before it said who it is."""
FAULTS: Final = frozenset(
    {JoinCode.NO_AGENT, JoinCode.AGENT_TIMEOUT, JoinCode.AGENT_REFUSED, JoinCode.OVERLOADED, JoinCode.INTERNAL}
)
"""Ends of a join that are no fault of the user's."""
LOSSES = ("policy", "user", "cluster")
"""Why a right was lost: the policy gives it no more, the user's login was revoked, or the cluster was."""
COMMANDS_ENDS = ("done", "refused", "failed")
"""How a command of an administrator ends."""


class Counters:
    """One relay process."""

    def __init__(self) -> None:
        self.accepted = 0
        self.accept_pauses = 0
        """How often accepting waited for descriptors."""
        self.rejected = dict.fromkeys(REJECTIONS, 0)
        self.agents_total = 0
        """Control connections that were registered."""
        self.agents_refused = 0
        self.agents_replaced = 0
        """Control connections that a newer one of the same instance replaced (docs/threats.md#E10)."""
        self.agents_flapping = 0
        """Control connections refused because two agents with one id replace each other (docs/threats.md#E10)."""
        self.agents_paced = 0
        """Control connections turned away because too many came at once."""
        self.certificates_renewed_twice = 0
        """Renewals that showed a copy of an agent's credential (docs/threats.md#E11)."""
        self.revocations_returned = 0
        """Revocations that the registry had lost, and that agents gave back."""
        self.ledgers_forged = 0
        """Times that an agent gave back what no relay over this CA has sealed."""
        self.clusters_adopted = 0
        """Clusters that enrolled at another relay of the same CA and are known here since."""
        self.joins = {code.name.lower(): 0 for code in JoinCode}
        """Joins of clients, by how they ended."""
        self.joins_newest_ca = dict.fromkeys(("yes", "no"), 0)
        """Joins since the relay's CA was rotated, by whether the client keeps the newest CA."""
        self.cluster_joins: Counter[str] = Counter()
        """Joins of users who may reach the cluster, by its name: those that succeeded, or failed for no fault of the
        user's."""
        self.cluster_joins_failed: Counter[str] = Counter()
        """Those of them that failed."""
        self.pumps_cut = 0
        """Sessions that had not left by themselves when the relay went away."""
        self.sessions_cut = dict.fromkeys(LOSSES, 0)
        """Sessions that ran when their right was lost, by why."""
        self.administration = dict.fromkeys(COMMANDS_ENDS, 0)
        """Commands of administrators over HTTPS, by how they ended."""
        self.agent_joins_refused = 0
        self.tokens_refused = 0
        """Dial tokens that were void, foreign or guessed."""
        self.join_seconds = Buckets()
        """From the client's handshake to the pump."""

    def joined(self, cluster: str, code: JoinCode) -> None:
        """Count a join by how it ended; `cluster` is empty where the user may not reach it."""
        self.joins[code.name.lower()] += 1
        if cluster and (code is JoinCode.OK or code in FAULTS):
            self.cluster_joins[cluster] += 1
            self.cluster_joins_failed[cluster] += code is not JoinCode.OK
