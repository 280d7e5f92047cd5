"""From verified claims to an identity, by the rules of kube-apiserver and two that are always on.

Source: Kubernetes, "Authenticating" / claimMappings and claimValidationRules. Always on, whatever the file says:

1. no user and no group whose name is, or looks like, `system:…` (the API server gives those names meaning);
2. no name that another parser could read differently: control and invisible characters, blanks at the ends (HTTP
   strips them: ` system:masters` would arrive as `system:masters`), over-long names, over-many groups.

Refusals are `TokenRefused` with a rule for our log; the caller never sees a claim.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from arcbridge.identity.actor import actor_of
from arcbridge.identity.authentication import IssuerConfig, PrefixedClaim
from arcbridge.identity.names import is_plain
from arcbridge.identity.proof import UNBOUND, Binding, binding
from arcbridge.identity.refusal import TokenRefused
from arcbridge.refusals import RefusalRule

if TYPE_CHECKING:
    from arcbridge.identity.cel.mapping import CostBudget, Expressions

MAX_GROUPS = 1000
"""Groups of one token: at 1 KiB each that is the MiB Go allows for a request head; real tokens stop at 200."""

MAX_EXTRA = 100
"""Values of all extra keys of a token together; each is a header of every request that the agent makes for it."""

CREDENTIAL_ID = "authentication.kubernetes.io/credential-id"
"""kube-apiserver's extra key for the id of a token. Rules on the user see it; it is not sent on."""

_OVERAGE = (
    "the token has too many groups: its issuer put a pointer in their place; let the issuer send only the groups "
    "assigned to this application, or have the operator set up [graph.NAME] (docs/how-to/entra-id.md)"
)


class _NameRules(NamedTuple):
    """The rules that a name of one kind breaks."""

    characters: RefusalRule
    system: RefusalRule


_USERNAME = _NameRules(RefusalRule.CLAIMS_USERNAME_CHARACTERS, RefusalRule.CLAIMS_USERNAME_SYSTEM)
_GROUPS = _NameRules(RefusalRule.CLAIMS_GROUPS_CHARACTERS, RefusalRule.CLAIMS_GROUPS_SYSTEM)
_SYSTEM = "system:"
_SERVICE_ACCOUNT = "system:serviceaccount:"
# Letters of other scripts, and colons of other blocks, that are drawn like those of "system:" and that NFKC keeps.
_LOOK_ALIKE = str.maketrans("ѕꜱуүγʏтτᴛеҽєᴇмᴍıː˸։׃܃∶꞉", "ssyyyyttteeeemmi:::::::")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a verified token speaks for. `subject`: its owner, the same across renewals (`ISSUER#SUB` of an ID token);
    `expires_at`, `issued_at`: unix seconds. `issued_at` is 0 for a token that does not say, which counts as old.
    `binding`: to which key the token is bound. Only a token that came with its proof counts
    (`identity.proof.ProofChecker`), and that is not checked here."""

    username: str
    uid: str
    groups: tuple[str, ...]
    subject: str
    issuer: str
    expires_at: float
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    issued_at: float = 0.0
    binding: Binding = UNBOUND
    missing_groups_claim: str = ""
    """The claim from which the settings take the groups, where the token does not have it: an issuer may leave it out
    for a user without a group, and every token lacks it where the settings name a wrong one."""
    actor: str = ""
    """The program that acts for the user, as a party of its own (`identity.actor`); empty: the user alone."""

    def supersedes(self, other: Identity) -> bool:
        """Return whether this identity, of a renewal, takes the place of `other`, of the same subject.

        The later time of issue wins, whichever token lasts longer: it is the issuer's newer word. Of two tokens that
        were issued in one second, or that do not say, the one with fewer groups wins, so that neither their order nor
        a repetition gives back a right; with the same groups, the one that lasts longer.
        """
        if self.issued_at != other.issued_at:
            return self.issued_at > other.issued_at
        if len(self.groups) != len(other.groups):
            return len(self.groups) < len(other.groups)
        return set(self.groups) == set(other.groups) and self.expires_at >= other.expires_at

    def keeps(self, other: Identity) -> bool:
        """Return whether all names by which `other`, of the same subject, may have had a right are this identity's too.

        Extra values are not compared: RBAC reads none, and an issuer may give each token its own.
        """
        same = (self.username, self.uid) == (other.username, other.uid)
        return same and set(other.groups) <= set(self.groups)

    @property
    def groups_at_api_server(self) -> frozenset[str]:
        """The groups, and those that the API server adds to each user and to service accounts: no token has them, and a
        rule that takes rights away may name them."""
        added = ["system:authenticated"]
        if self.username.startswith(_SERVICE_ACCOUNT):
            space = self.username.removeprefix(_SERVICE_ACCOUNT).partition(":")[0]
            added += ["system:serviceaccounts", f"system:serviceaccounts:{space}"]
        return frozenset((*self.groups, *added))

    @property
    def names(self) -> tuple[str, str]:
        """The names by which a user is revoked."""
        return self.username, self.subject


def is_reserved(name: str) -> bool:
    """Return whether `name` is, or is drawn like, a name that Kubernetes keeps for itself (`system:…`)."""
    folded = unicodedata.normalize("NFKC", name).casefold().translate(_LOOK_ALIKE)
    return folded.lstrip().startswith(_SYSTEM)


def map_claims(
    issuer: IssuerConfig,
    claims: Mapping[str, Any],
    budget: CostBudget | None = None,
    actor_clients: Collection[str] = (),
) -> Identity:
    """Map the verified `claims` of a token of `issuer`. Raises TokenRefused; checks no times and no audience.

    With a `budget`, raises BudgetExceeded where the issuer's expressions cost more than that. `actor_clients`: clients
    whose tokens have them as actor.
    """
    for rule in issuer.rules:
        # Types first: `True == 1` and friends.
        value = claims.get(rule.claim)
        if not isinstance(value, str) or value != rule.required_value:
            how = "is missing" if value is None else "has another value"
            raise TokenRefused(
                RefusalRule.CLAIMS_RULE,
                "the token does not have a claim that this place requires",
                wanted=rule.claim,
                detail=f"claim {rule.claim!r} {how}; {issuer.path} requires {rule.required_value!r}",
            )

    subject = claims.get("sub")
    if not isinstance(subject, str) or not is_plain(subject):
        raise TokenRefused(RefusalRule.CLAIMS_SUB, "the token has no usable subject")

    username, groups, uid, extra = _mapped(issuer, claims, budget)
    of_groups = "" if issuer.groups is None else issuer.groups.claim
    return Identity(
        username=username,
        uid=uid,
        groups=tuple(dict.fromkeys(groups)),
        subject=f"{issuer.url}#{subject}",
        issuer=issuer.url,
        expires_at=float(claims["exp"]),
        extra=extra,
        issued_at=float(claims.get("iat", 0.0)),
        binding=binding(claims),
        missing_groups_claim=of_groups if claims.get(of_groups) is None else "",
        actor=actor_of(claims, issuer.url, actor_clients),
    )


_Names = tuple[str, tuple[str, ...], str, Mapping[str, tuple[str, ...]]]
"""User name, groups, uid and extra."""


def _mapped(issuer: IssuerConfig, claims: Mapping[str, Any], budget: CostBudget | None) -> _Names:
    bare = "" if issuer.groups is None else issuer.groups.prefix
    if issuer.expressions is None:
        groups = _without(bare, _groups(issuer.groups, claims))
        return _username(issuer, claims), groups, _uid(issuer.uid_claim, claims), {}
    from arcbridge.identity.cel.mapping import CostBudget

    _check_pointers(issuer.expressions, claims)
    budget = budget or CostBudget()
    mapped = issuer.expressions.map(claims, budget)
    username = _username(issuer, claims) if mapped.username is None else _name(mapped.username, _USERNAME)
    groups = _groups(issuer.groups, claims) if mapped.groups is None else _group_names("", mapped.groups)
    uid = _uid(issuer.uid_claim, claims) if mapped.uid is None else mapped.uid
    if uid and not is_plain(uid):
        raise TokenRefused(RefusalRule.CLAIMS_UID, "the token has no user id that this place can use")
    if sum(map(len, mapped.extra.values())) > MAX_EXTRA:
        raise TokenRefused(RefusalRule.CLAIMS_EXTRA_MANY, f"the token has more than {MAX_EXTRA} extra values")
    if not all(is_plain(value) for values in mapped.extra.values() for value in values):
        raise TokenRefused(
            RefusalRule.CLAIMS_EXTRA_CHARACTERS, "an extra value has characters or a length that are refused"
        )
    # The rules see the user that kube-apiserver would make, of which less is handed on.
    issuer.expressions.check_user(username, uid, groups, {**_credential_id(claims), **mapped.extra}, budget)
    return username, _without(bare, groups), uid, mapped.extra


def _without(bare: str, groups: Sequence[str]) -> tuple[str, ...]:
    """Return the groups without those of an empty name: it carries no right, and with a prefix would become a group."""
    return tuple(group for group in groups if group != bare)


def _credential_id(claims: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the extra key that kube-apiserver makes of a `jti` that is a string and not empty; null is the empty
    one."""
    token_id = claims.get("jti")
    return {CREDENTIAL_ID: (f"JTI={token_id}",)} if isinstance(token_id, str) and token_id else {}


def _username(issuer: IssuerConfig, claims: Mapping[str, Any]) -> str:
    username = None if issuer.username is None else claims.get(issuer.username.claim)
    if issuer.username is None or not isinstance(username, str) or not username:
        claim = "" if issuer.username is None else issuer.username.claim
        raise TokenRefused(
            RefusalRule.CLAIMS_USERNAME,
            "the token has no user name that this place can use",
            wanted=claim,
            detail=f"claim {claim!r} is missing, or no text; {issuer.path} takes the user name from it",
        )
    if issuer.username.claim == "email" and claims.get("email_verified") is not True:
        raise TokenRefused(
            RefusalRule.CLAIMS_EMAIL_VERIFIED,
            "the e-mail address in the token is not verified by its issuer",
            wanted="email_verified",
            detail=f"claim 'email_verified' is not true; {issuer.path} takes the user name from 'email'",
        )
    return _name(issuer.username.prefix + username, _USERNAME)


def _uid(claim: str | None, claims: Mapping[str, Any]) -> str:
    if claim is None:
        return ""
    value = claims.get(claim)
    if not isinstance(value, str) or not is_plain(value):
        raise TokenRefused(RefusalRule.CLAIMS_UID, "the token has no user id that this place can use")
    return value


def _elsewhere(claims: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the claims that a token does not have and says to be elsewhere, each with the claims that say so."""
    found: dict[str, tuple[str, ...]] = {}
    names = claims.get("_claim_names")
    if isinstance(names, Mapping):
        found = {name: ("_claim_names", "_claim_sources") for name in names if claims.get(name) is None}
    elif names is not None and claims.get("groups") is None:
        found = {"groups": ("_claim_names",)}  # it may point to any claim
    if claims.get("hasgroups") in (True, "true") and claims.get("groups") is None:
        found["groups"] = (*found.get("groups", ()), "hasgroups")
    return found


def _check_pointers(expressions: Expressions, claims: Mapping[str, Any]) -> None:
    """Refuse a token of which an expression would take a claim that is elsewhere for one that is not there.

    An expression that looks at the pointer itself says what is to become of such a token, and is left to say it.
    """
    for claim, pointers in _elsewhere(claims).items():
        if path := expressions.takes_for_absent(claim, pointers):
            detail = (
                f"{path} reads claim {claim!r}, which the token says to be elsewhere ({pointers[0]}); set up "
                "[graph.NAME], or have the expression say what is to become of such a token"
            )
            if claim == "groups":
                raise TokenRefused(RefusalRule.CLAIMS_GROUPS_OVERAGE, _OVERAGE, detail=detail)
            raise TokenRefused(
                RefusalRule.CLAIMS_ELSEWHERE,
                "the token does not have a claim that this place reads, and says that it is elsewhere",
                wanted=claim,
                detail=detail,
            )


def _groups(mapping: PrefixedClaim | None, claims: Mapping[str, Any]) -> tuple[str, ...]:
    if mapping is None:
        return ()
    value = claims.get(mapping.claim)
    # Entra ID: over 200 groups the claim is replaced by a pointer. "No groups" would be a silent loss of rights.
    if mapping.claim in _elsewhere(claims):
        raise TokenRefused(RefusalRule.CLAIMS_GROUPS_OVERAGE, _OVERAGE)
    if value is None:
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TokenRefused(RefusalRule.CLAIMS_GROUPS, "the groups in the token are not a list of names")
    return _group_names(mapping.prefix, names)


def _group_names(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the groups of all `names`; an empty name gives the bare prefix, which rules on the user see and no one
    else."""
    if len(names) > MAX_GROUPS:
        raise TokenRefused(RefusalRule.CLAIMS_GROUPS_MANY, f"the token has more than {MAX_GROUPS} groups")
    return tuple(_name(prefix + name, _GROUPS) if name else _unreserved(prefix, _GROUPS) for name in names)


def _name(name: str, rules: _NameRules) -> str:
    if not is_plain(name):
        raise TokenRefused(rules.characters, "a name in the token has characters or a length that are refused")
    return _unreserved(name, rules)


def _unreserved(name: str, rules: _NameRules) -> str:
    if is_reserved(name):
        raise TokenRefused(rules.system, "the token holds a name that is reserved for the cluster itself")
    return name
