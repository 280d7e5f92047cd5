"""Decides who may use this relay now, by its policy, the revoked clusters, and the users whose logins are revoked.

Pure: what is true now is given to it (`clusters`, `users`) and asked of it (`loss`). It is asked at each join, again
when the join is complete, and for every session that runs whenever `version` has changed (`relay.enforcement`); so
what was granted once is not granted for ever. What it was told last stays in force until it is told otherwise: a
registry that does not answer gives no right back. Before the registry has said which users are revoked, no user may
use anything (`RegistryUnavailable`), and what runs runs on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import KnownGroups, PolicyFile
from arcbridge.identity.proof import ProofChecker
from arcbridge.identity.verifier import LEEWAY, TokenVerifier
from arcbridge.relay.recent_refusals import RecentRefusals
from arcbridge.relay.recent_users import RecentUsers
from arcbridge.relay.registry.base import RegistryUnavailable, UserRevocation
from arcbridge.units import rfc3339

FORBIDDEN: Final = "there is no such cluster, or you may not reach it: check its name, and ask the relay's operator"
"""The one answer for an unknown cluster, a revoked one and one that the policy does not allow (docs/threats.md#J22)."""
RETRY_AFTER: Final = 5
"""Seconds after which a user may try again while revocations are awaited."""


class RevocationsAwaited(RegistryUnavailable):
    """Revocations may be missing, and the relay waits for those that agents know."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a user may not use a cluster (any more)."""

    kind: str
    """One of `relay.counters.LOSSES`."""
    message: str
    """A sentence for the user."""
    cause: str
    """The same for the relay's log."""
    revocation: UserRevocation | None = None
    """What refuses the user's token, where that is the reason."""


class Access:
    """See the module's docstring."""

    def __init__(self, policy: PolicyFile) -> None:
        self._policy = policy
        self.clusters: frozenset[str] = frozenset()
        """Clusters that are revoked, as the registry said last."""
        self.held = ""
        """Why no user may begin anything now (`relay.recovery`); empty: users may."""
        self.users: Mapping[str, UserRevocation] | None = None
        """Users who are revoked, by user, as the registry said last; None before it has said anything. Replaced as a
        whole and never changed."""

    @property
    def version(self) -> tuple[object, ...]:
        """What decides, all of it: while this is equal to what it was, every answer is what it was."""
        return self._policy.current(), self.clusters, self.users

    def learn_users(self, users: Mapping[str, UserRevocation]) -> bool:
        """Take over what the registry says; return whether it is news. What is equal to what is known changes nothing,
        not even `version`."""
        if users == self.users:
            return False
        self.users = users
        return True

    def revocation(self, identity: Identity) -> UserRevocation | None:
        """Return the revocation that refuses the token of `identity`, by its user name or its subject; None: there is
        none. As at the agents, tokens count as older by as much as the clocks of issuer and operator may differ."""
        if not self.users:
            return None
        for name in identity.names:
            found = self.users.get(name)
            if found is not None and identity.issued_at < found.before + LEEWAY:
                return found
        return None

    def refusal(self, identity: Identity) -> Loss | None:
        """Return why `identity` may use nothing here; None: it may use what the policy gives it.

        Asked of a user who joins or calls the API; raises `RegistryUnavailable` before it is known who is revoked.
        """
        if self.held:
            raise RevocationsAwaited(self.held, retry_after=RETRY_AFTER)
        if self.users is None:
            raise RegistryUnavailable("the relay does not know yet whose logins are revoked")
        return self._refusal(identity)

    def _refusal(self, identity: Identity) -> Loss | None:
        found = self.revocation(identity)
        if found is None:
            return None
        reason = f" ({found.reason})" if found.reason else ""
        message = (
            f"your logins from before {rfc3339(found.before)} were revoked{reason}: log in again, or ask the relay's "
            "operator"
        )
        return Loss("user", message, "the user's login was revoked", found)

    def loss(self, identity: Identity | None, cluster: str) -> Loss | None:
        """Return why `identity` may not use `cluster`; None: it may. Without an identity only the cluster is judged."""
        if identity is not None:
            if (refused := self._refusal(identity)) is not None:
                return refused
            if not self._policy.allows(identity, cluster):
                through = f" through the actor {identity.actor}" if identity.actor else ""
                return Loss("policy", FORBIDDEN, f"the policy does not allow it{through}")
        if cluster in self.clusters:
            return Loss("cluster", FORBIDDEN, "the cluster is revoked")
        return None

    def known_groups(self, identity: Identity) -> KnownGroups:
        """Return which of the user's groups the policy names, and how many others there are."""
        return self._policy.current().known_groups(identity)

    def allows(self, identity: Identity, cluster: str) -> bool:
        """Return whether the policy lets `identity` reach `cluster`, revoked or not, and its login still counts."""
        return self._refusal(identity) is None and self._policy.allows(identity, cluster)

    def administered(self, identity: Identity, *what: str) -> tuple[str, ...]:
        """Return the names and patterns of the clusters of which `identity` administers any of `what`
        (`identity.policy`); none once its login counts no more."""
        return () if self._refusal(identity) is not None else self._policy.current().administered(identity, *what)


@dataclass(slots=True)
class CallerChecks:
    """What judges a caller, for joins and for the HTTP API: the token, the proof of its key, and what its user may use.
    A reload changes it in place."""

    verifier: TokenVerifier
    proofs: ProofChecker
    access: Access
    recent: RecentUsers = field(default_factory=RecentUsers)
    refusals: RecentRefusals = field(default_factory=RecentRefusals)
