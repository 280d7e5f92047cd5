"""Names why one end refuses another: a rule, and what the refusing end wanted, as two fields of its answer.

Relay and agent fill the fields where they refuse (`Goaway`, `JoinReply`, the error of the relay's API, the causes of a
`metav1.Status`); client and doctor decide by them alone. The sentence beside them is for people and decides nothing.
Invariant: what `read_refusal` returns is a rule of this list and a text that cannot end a quotation, whatever was sent.
"""

from __future__ import annotations

from enum import StrEnum

TYPE_CHECKING = False
if TYPE_CHECKING:  # each `arcbridge credential` imports this module, and kubectl waits for it
    from collections.abc import Sequence
    from typing import Any, Final


class RefusalRule(StrEnum):
    """The check that failed. The names are released: the wire, the logs and the metrics have them."""

    NONE = ""
    TOKEN_SIZE = "token.size"
    TOKEN_SHAPE = "token.shape"
    TOKEN_ALG = "token.alg"
    TOKEN_CRIT = "token.crit"
    TOKEN_NESTED = "token.nested"
    TOKEN_KID = "token.kid"
    TOKEN_ISS = "token.iss"
    TOKEN_KEY = "token.key"
    TOKEN_SIGNATURE = "token.signature"
    TOKEN_TYP = "token.typ"
    TOKEN_EVENTS = "token.events"
    TOKEN_CLAIMS = "token.claims"
    TOKEN_EXP = "token.exp"
    TOKEN_NBF = "token.nbf"
    TOKEN_IAT = "token.iat"
    TOKEN_LIFE = "token.life"
    TOKEN_AUD = "token.aud"
    TOKEN_AUD_FORBIDDEN = "token.aud.forbidden"
    CLAIMS_RULE = "claims.rule"
    CLAIMS_SUB = "claims.sub"
    CLAIMS_ACT = "claims.act"
    CLAIMS_USERNAME = "claims.username"
    CLAIMS_USERNAME_CHARACTERS = "claims.username.characters"
    CLAIMS_USERNAME_SYSTEM = "claims.username.system"
    CLAIMS_EMAIL_VERIFIED = "claims.email_verified"
    CLAIMS_UID = "claims.uid"
    CLAIMS_GROUPS = "claims.groups"
    CLAIMS_GROUPS_OVERAGE = "claims.groups.overage"
    CLAIMS_GROUPS_MANY = "claims.groups.many"
    CLAIMS_GROUPS_CHARACTERS = "claims.groups.characters"
    CLAIMS_GROUPS_SYSTEM = "claims.groups.system"
    CLAIMS_GROUPS_SOURCE = "claims.groups.source"
    CLAIMS_GROUPS_POINTER = "claims.groups.pointer"
    CLAIMS_GROUPS_SUBJECT = "claims.groups.subject"
    CLAIMS_GROUPS_ISSUER = "claims.groups.issuer"
    CLAIMS_GROUPS_EXP = "claims.groups.exp"
    CLAIMS_GROUPS_TENANT = "claims.groups.tenant"
    CLAIMS_GROUPS_OID = "claims.groups.oid"
    CLAIMS_GROUPS_UNKNOWN = "claims.groups.unknown"
    CLAIMS_EXTRA_MANY = "claims.extra.many"
    CLAIMS_EXTRA_CHARACTERS = "claims.extra.characters"
    CLAIMS_ELSEWHERE = "claims.elsewhere"
    CLAIMS_EXPRESSION = "claims.expression"
    CLAIMS_COST = "claims.cost"
    USER_RULE = "user.rule"
    POLICY_RULE = "policy.rule"
    """No rule of the relay's policy lets the user reach the cluster, or there is no such cluster: one answer."""
    PROOF_UNBOUND = "proof.unbound"
    PROOF_OFF = "proof.off"
    PROOF_CNF = "proof.cnf"
    PROOF_MISSING = "proof.missing"
    PROOF_KEY = "proof.key"
    PROOF_SIZE = "proof.size"
    PROOF_SHAPE = "proof.shape"
    PROOF_ATH = "proof.ath"
    PROOF_PEER = "proof.peer"
    PROOF_IAT = "proof.iat"
    PROOF_SIGNATURE = "proof.signature"
    ISSUER_KEYS = "issuer.keys"
    """The issuer's keys can be neither fetched nor taken from memory."""
    GROUPS_UNAVAILABLE = "groups.unavailable"
    """The place that has the user's groups does not answer."""
    SESSION_AGE = "session.age"
    """The session reached its greatest age; its token may still be good."""
    RESTRICTED_READ_ONLY = "restricted.read_only"
    RESTRICTED_NO_SECRETS = "restricted.no_secrets"
    RESTRICTED_NAMESPACES = "restricted.namespaces"
    RESTRICTED_VERBS = "restricted.verbs"
    RESTRICTED_PATH = "restricted.path"
    """A restricted session asks for what cannot be told apart from what it gave up."""
    RESTRICTED_UNTIL = "restricted.until"
    """The time that the session was restricted to is over."""
    RESTRICTED_UNKNOWN = "restricted.unknown"
    """A restriction that the agent does not know, or another one than that of the session."""
    AGENT_CREDENTIAL = "agent.credential"
    """The API server refuses the agent's own credential."""
    AGENT_API_CA = "agent.api_ca"
    """The API server's certificate is not of the CA that the agent's settings name."""
    AGENT_IMPERSONATION = "agent.impersonation"
    """The API server does not let the agent act as the caller."""

    @property
    def family(self) -> str:
        """The first word of the rule: what it is about."""
        return self.partition(".")[0]

    @property
    def check(self) -> str:
        """The rule without its family."""
        return self.partition(".")[2]


MAX_WANTED: Final = 200
"""Characters of an audience, a claim's name or a group that are sent."""
MAX_GROUPS: Final = 10
"""Names of groups that are sent."""


class Refusal:
    """The fields of a refusal: two with the same fields are equal."""

    __slots__ = ("groups", "more_groups", "rule", "wanted")

    def __init__(
        self, rule: RefusalRule = RefusalRule.NONE, wanted: str = "", groups: tuple[str, ...] = (), more_groups: int = 0
    ) -> None:
        """`wanted`: the audience, or the claim's name, that the refusing end wants; empty where it does not say.
        `groups`: those of the user that the policy names, of a `policy.rule`; `more_groups`: how many others came."""
        self.rule = rule
        self.wanted = wanted
        self.groups = groups
        self.more_groups = more_groups

    def _key(self) -> tuple[object, ...]:
        return self.rule, self.wanted, self.groups, self.more_groups

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Refusal) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Refusal{self._key()!r}"

    def fields(self) -> dict[str, str]:
        """Return the fields that are not empty, by name."""
        return {name: text for name, text in (("rule", self.rule.value), ("wanted", self.wanted)) if text}


NO_REFUSAL: Final = Refusal()
_MOST_COUNTED: Final = 9999
"""Groups of which a number from outside is believed; a token has 1000 at most."""


def read_refusal(rule: Any, wanted: object = "", groups: str = "", more_groups: int = 0) -> Refusal:
    """Return the refusal that fields from outside name; a rule that is not known here is none. `groups`: one a line."""
    try:
        known = RefusalRule(rule)
    except ValueError:
        return NO_REFUSAL
    names = groups.split("\n", MAX_GROUPS) if groups else []
    quotable = tuple(name for name in names[:MAX_GROUPS] if name and _is_quotable(name))
    more = min(more_groups, _MOST_COUNTED) + len(names) - len(quotable)
    return Refusal(known, wanted if isinstance(wanted, str) and _is_quotable(wanted) else "", quotable, more)


def sendable_groups(groups: Sequence[str]) -> tuple[str, ...]:
    """Return the first groups that a peer takes."""
    return tuple(name for name in groups if _is_quotable(name))[:MAX_GROUPS]


def _is_quotable(text: str) -> bool:
    """Return whether a text is short, printable ASCII, without quotes and backslashes, and begins with no space."""
    plain = text.isascii() and text.isprintable() and not {'"', "\\"} & set(text)
    return plain and len(text) <= MAX_WANTED and not text.startswith(" ")
