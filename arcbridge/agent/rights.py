"""Compares the rights to impersonate that the agent has with those that the authentication file's mappings need.

A mapping that gives a uid, or a value of an extra key, makes the agent send it, and the API server refuses the whole
request where the agent may not impersonate it. What the rules of RBAC give is read from one review of all rules; a
right that none of them gives is asked for by a review of its own, because another authorizer may grant it. Nothing is
changed, and no user's name is asked for: that a rule names some users only is seen when another one comes.

Source: Kubernetes, SelfSubjectRulesReview and SelfSubjectAccessReview (authorization.k8s.io/v1); "User impersonation"
and "Constrained impersonation" for verbs, resources and their API groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from arcbridge.identity.authentication import AuthenticationConfig

ACCESS: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
LEGACY: Final = "impersonate"
CONSTRAINED: Final = "impersonate:user-info"
VERBS: Final = "impersonate-on:user-info:"
"""What the verbs begin with that constrained impersonation needs besides, one for each verb of the user's request."""
_ATTRIBUTES: Final = "authentication.k8s.io"
_ANY: Final = "*"


@dataclass(frozen=True, slots=True)
class Right:
    """The right to impersonate one kind of attribute."""

    resource: str
    """`users`, `groups`, `uids`, or `userextras/KEY`."""
    sources: tuple[str, ...] = ()
    """The fields of the authentication file that give the attribute (`jwt[0].claimMappings.uid`)."""
    always: bool = True
    """Whether each issuer's mapping gives it."""

    def group(self, verb: str) -> str:
        """Return the API group that the resource has for a verb."""
        return "" if verb == LEGACY and self.resource in ("users", "groups") else _ATTRIBUTES

    def sentence(self, user: str, verb: str) -> str:
        """Return what an API server says where the right is missing (`forbiddenMessage` of k8s.io/apiserver)."""
        return (
            f'User "{user}" cannot {verb} resource "{self.resource}" in API group "{self.group(verb)}" at the cluster '
            "scope"
        )

    def question(self, verb: str, name: str = "") -> dict[str, Any]:
        """Return the review (`ACCESS`) that asks for it; `name`: for one user or group alone."""
        resource, _, key = self.resource.partition("/")
        attributes = {"group": self.group(verb), "resource": resource, "subresource": key, "verb": verb, "name": name}
        spec = {"resourceAttributes": {name: value for name, value in attributes.items() if value}}
        return {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec}


USERS: Final = Right("users")
GROUPS: Final = Right("groups")
RESTRICTED: Final = Right("userextras/arcbridge.io/restricted", always=False)
"""What restricted sessions need besides (`identity.authentication.RESTRICTED`); rules of an older version lack it."""
ACTOR: Final = Right("userextras/arcbridge.io/actor", always=False)
"""What requests need besides in which an actor acts for the user (`identity.authentication.ACTOR`)."""


def attributes_of(issuers: AuthenticationConfig) -> list[Right]:
    """Return the rights that the issuers' mappings need besides those for users and groups."""
    sources: dict[str, list[str]] = {}
    for issuer in issuers.issuers:
        expressions = issuer.expressions
        if issuer.uid_claim or (expressions is not None and "uid" in expressions.mappings):
            sources.setdefault("uids", []).append(f"{issuer.path}.claimMappings.uid")
        for index, (key, _) in enumerate(() if expressions is None else expressions.extra):
            found = sources.setdefault(f"userextras/{key.lower()}", [])
            found.append(f"{issuer.path}.claimMappings.extra[{index}]")
    return [
        Right(resource, tuple(found), always=len(found) == len(issuers.issuers)) for resource, found in sources.items()
    ]


class Rules:
    """The rules that apply to the agent, as a SelfSubjectRulesReview lists them."""

    def __init__(self, listed: Iterable[object]) -> None:
        self._rules = [rule for rule in listed if isinstance(rule, dict)]

    def gives(self, right: Right, verb: str) -> bool:
        """Return whether a rule gives the right with this verb, for whichever names."""
        return any(
            {_ANY, verb} & _words(rule, "verbs")
            and {_ANY, right.group(verb)} & _words(rule, "apiGroups")
            and {_ANY, right.resource} & _words(rule, "resources")
            for rule in self._rules
        )

    @property
    def has_verbs(self) -> bool:
        """Whether a rule names a request that may be made under constrained impersonation."""
        verbs = {verb for rule in self._rules for verb in _words(rule, "verbs")}
        return any(verb == _ANY or verb.startswith(VERBS) for verb in verbs)


def _words(rule: dict[str, Any], name: str) -> set[str]:
    words = rule.get(name)
    return set(map(str, words)) if isinstance(words, list) else set()
