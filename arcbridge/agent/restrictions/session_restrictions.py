"""Decides which requests of a restricted session are refused, and says why.

It only takes away: what it lets through, RBAC judges as always. A request is let through where it is surely one of
those that the restrictions leave; one that two readers could take for different requests, and a non-resource path that
is not listed here, is refused. Invariant: nothing that the API server reads as a write passes a session that is
read-only, and nothing of another namespace passes one that has namespaces (docs/threats.md#H43).

Source: `RequestInfoFactory` of k8s.io/apiserver for verbs, resources and namespaces (`kube.request_info`).
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.kube.request_info import RequestInfo
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.errors import PermissionRefused, RemoteProtocolError
from arcbridge.refusals import Refusal, RefusalRule
from arcbridge.wire.records import MOST_NAMESPACES, NAMESPACE_NAME, RESTRICTION_VERBS, UNRESTRICTED, Restrictions

READS: Final = frozenset({"get", "list", "watch"})
ACCESS, RULES = "selfsubjectaccessreviews", "selfsubjectrulesreviews"
SELF_REVIEWS: Final = frozenset(
    {("authorization.k8s.io", ACCESS), ("authorization.k8s.io", RULES), ("authentication.k8s.io", "selfsubjectreviews")}
)
"""What a session may create whatever its restrictions: questions about itself, which change nothing."""
TUNNELS: Final = frozenset({"exec", "attach", "portforward", "proxy"})
"""Subresources that open a way into pods, nodes or services, with each method."""
_CHANGES: Final = frozenset(f"application/{kind}-patch+json" for kind in ("json", "merge", "strategic-merge"))
"""Types of patches that change an object and never make one, as server-side apply does."""
MADE_BY_PUT: Final = frozenset(
    (group, resource)
    for group, resources in {
        "": "endpoints events limitranges services",
        "coordination.k8s.io": "leasecandidates leases",
        "events.k8s.io": "events",
        "node.k8s.io": "runtimeclasses",
        "rbac.authorization.k8s.io": "clusterrolebindings clusterroles rolebindings roles",
    }.items()
    for resource in resources.split()
)
"""Built-in resources of which a PUT makes the object that is not there (`AllowCreateOnUpdate` of their strategies)."""
_MADE_BY_STATUS: Final = frozenset({"services", "validatingadmissionpolicies"})
"""Built-in resources of which an apply of the status makes the object, too, and a PUT of it where one makes it."""
DISCOVERY: Final = ("root", "api", "apis", "openapi", "version", "healthz", "livez", "readyz", ".well-known")
"""Classes of non-resource paths that every session may read: clients ask there what there is, and whether it is up."""
_METHODS: Final = frozenset({"GET", "HEAD"})
_NAMES: Final = re.compile(r"[a-z0-9.-]*/[a-z0-9.-]*/[a-z0-9._-]*/[a-z0-9._-]*/[a-z0-9.-]*")
"""Group, version, resource, subresource and namespace that every reader takes for the same; no segment has a slash.
Resources and subresources of the metrics APIs are names of metrics, in which `_` is usual."""
_PATH: Final = re.compile(r"(?:/[A-Za-z0-9._~:-]+)*/?")
"""A non-resource path without escapes and empty segments."""
_FLAGS: Final = {
    RefusalRule.RESTRICTED_READ_ONLY: "--read-only",
    RefusalRule.RESTRICTED_NO_SECRETS: "--no-secrets",
    RefusalRule.RESTRICTED_NAMESPACES: "--namespace",
    RefusalRule.RESTRICTED_VERBS: "--verb",
}
"""The client's flags that ask for the restrictions."""
_ASK: Final = (
    "to do more, use a session without {flag}, or [restrict] in its settings (`arcbridge connect`, or the context of "
    "one)"
)


@dataclass(frozen=True)
class SessionRestrictions:
    """What one session gave up when it began; equal where the session that is resumed gave up the same."""

    record: Restrictions
    reviewing: asyncio.Lock = field(default_factory=asyncio.Lock, compare=False, repr=False)
    """Held while a review of the session's own rights is under way."""

    @classmethod
    def read(cls, encoded: bytes) -> SessionRestrictions:
        """Read the record of an AUTH. Raises PermissionRefused for one that is not understood: what is not understood
        cannot be kept."""
        try:
            found = cls(Restrictions.decode(encoded))
        except RemoteProtocolError as error:
            raise _unknown("asks for a restriction that this agent does not know; update the agent") from error
        names = found.record.namespaces.split()
        if found.record == UNRESTRICTED:
            raise _unknown("asks for a restricted session, and for no restriction")
        lists = (found.record.namespaces, found.record.verbs)
        if found.record.encode() != encoded or any(one != " ".join(dict.fromkeys(one.split())) for one in lists):
            raise _unknown("sends restrictions in another form than they have; each word of a list is there once")
        if not found.verbs.issubset(RESTRICTION_VERBS):
            raise _unknown(f"restricts a session to other verbs than {', '.join(RESTRICTION_VERBS)}")
        if len(names) > MOST_NAMESPACES or not all(map(NAMESPACE_NAME.fullmatch, names)):
            raise _unknown(f"restricts a session to more than {MOST_NAMESPACES} namespaces, or to what is none")
        return found

    @cached_property
    def namespaces(self) -> frozenset[str]:
        """The only namespaces that the session may see; empty: all."""
        return frozenset(self.record.namespaces.split())

    @cached_property
    def verbs(self) -> frozenset[str]:
        """The only verbs that the session may use; empty: all."""
        return frozenset(self.record.verbs.split())

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Each restriction as a word, as records and `Impersonate-Extra` have them."""
        return self.record.words()

    @property
    def until(self) -> float:
        """Unix seconds at which the session ends; 0: as any other."""
        return float(self.record.until)

    @cached_property
    def judges(self) -> bool:
        """Whether what the session does is restricted, and not its end alone. Such a session opens no TCP target: what
        goes through one cannot be told apart."""
        record = self.record
        return record.read_only or record.no_secrets or bool(record.namespaces or record.verbs)

    def answers(self, info: RequestInfo) -> bool:
        """Return whether the agent answers a request itself, which asks what the session may do (`own_reviews`)."""
        asks = info.verb == "create" and info.resource in (ACCESS, RULES)
        return self.judges and asks and self.is_self_review(info)

    def check(self, facts: RequestFacts, info: RequestInfo) -> None:
        """Raise RequestRefusal for a request that the session may not make."""
        if not self.judges:
            return
        if not info.resource:
            if (
                facts.method not in _METHODS
                or b"upgrade" in facts.values
                or not _PATH.fullmatch(facts.target.partition("?")[0])
                or not self.allows_path(info.path_class)
            ):
                raise self._refusal(f"{facts.method} of this path", RefusalRule.RESTRICTED_PATH)
            return
        names = f"{info.group}/{info.version}/{info.resource}/{info.subresource}/{info.namespace}"
        if info.altered or info.cut or not _NAMES.fullmatch(names):
            raise self._refusal("a path that can be read in more than one way", RefusalRule.RESTRICTED_PATH)
        if facts.method == "POST" and info.verb == "create" and self.is_self_review(info):
            return
        if info.verb in READS and facts.method not in _METHODS:  # POST to /watch/, a watch by its path alone
            raise self._refusal(f"{facts.method} with the verb {info.verb}", RefusalRule.RESTRICTED_PATH)
        for verb in _verbs_of(facts, info):
            if rule := self.rule_against(verb, info.group, info.resource, info.subresource, info.namespace):
                what = f"{info.resource}/{info.subresource}" if info.subresource else info.resource
                raise self._refusal(f'"{verb}" of {what}', rule)

    def rule_against(self, verb: str, group: str, resource: str, subresource: str, namespace: str) -> RefusalRule:
        """Return the restriction that forbids a verb on a resource; NONE where there is none. `*` stands for all, and
        an empty `namespace` for all of them, or for none."""
        record = self.record
        if record.read_only and (verb not in READS or subresource in TUNNELS or subresource == "*"):
            return RefusalRule.RESTRICTED_READ_ONLY
        if record.no_secrets and (verb == "proxy" or hides_secrets(resource, subresource)):
            return RefusalRule.RESTRICTED_NO_SECRETS
        if self.verbs and verb not in self.verbs:
            return RefusalRule.RESTRICTED_VERBS
        if self.namespaces and namespace not in self.namespaces:
            return RefusalRule.RESTRICTED_NAMESPACES
        return RefusalRule.NONE

    def allows_path(self, path_class: str) -> bool:
        """Return whether non-resource paths of a class may be read."""
        return path_class in DISCOVERY or (path_class == "metrics" and not self.namespaces)

    @staticmethod
    def is_self_review(info: RequestInfo) -> bool:
        """Return whether the target is that of a question about oneself."""
        within = info.namespace or info.name or info.subresource
        return not within and (info.group, info.resource) in SELF_REVIEWS

    def sentence(self, rule: RefusalRule) -> str:
        """Return what a restriction leaves, and how to do more."""
        match rule:
            case RefusalRule.RESTRICTED_READ_ONLY:
                left = "is read-only: get, list and watch, without exec, attach, port-forward and proxy"
            case RefusalRule.RESTRICTED_NO_SECRETS:
                left = "sees no secrets, no tokens of service accounts, and no proxy, behind which there may be some"
            case RefusalRule.RESTRICTED_NAMESPACES:
                left = f"sees {_listed(self.namespaces, 'namespace')} alone, and nothing cluster-wide"
            case RefusalRule.RESTRICTED_VERBS:
                left = f"has {_listed(self.verbs, 'verb')} alone"
            case _:
                return f"this session is restricted ({' '.join(self.words)}); use one without restrictions"
        return f"this session {left}; {_ASK.format(flag=_FLAGS[rule])}"

    def _refusal(self, what: str, rule: RefusalRule) -> RequestRefusal:
        return RequestRefusal(403, f"{what} is refused: {self.sentence(rule)}", refusal=Refusal(rule))


def _verbs_of(facts: RequestFacts, info: RequestInfo) -> tuple[str, ...]:
    """Return the verbs that a request may turn out to be at the API server: a patch or a PUT makes an object that is
    not there, and a GET with an upgrade opens something, or is answered as any other (docs/threats.md#H46)."""
    if facts.method in _METHODS and b"upgrade" in facts.values:
        return "create", info.verb
    if info.subresource and (info.subresource != "status" or info.resource not in _MADE_BY_STATUS):
        return (info.verb,)
    if facts.method == "PATCH" and facts.first(b"content-type").partition(";")[0] not in _CHANGES:
        return info.verb, "create"
    if facts.method == "PUT" and (info.group, info.resource) in MADE_BY_PUT:
        return info.verb, "create"
    return (info.verb,)


def hides_secrets(resource: str, subresource: str) -> bool:
    """Return whether a resource holds secrets, makes tokens, or leads to what may hold them (`proxy`), of whichever API
    group; `*` does."""
    return resource in ("secrets", "*") or subresource in ("secrets", "proxy", "*") or (resource, subresource) == (
        "serviceaccounts", "token"
    )  # fmt: skip


def _unknown(what: str) -> PermissionRefused:
    error = PermissionRefused(f"the client {what}")
    error.refusal = Refusal(RefusalRule.RESTRICTED_UNKNOWN)
    return error


def _listed(names: frozenset[str], what: str) -> str:
    shown = sorted(names)
    return f"the {what}{'s' * (len(shown) > 1)} {', '.join(shown[:5])}{' and others' * (len(shown) > 5)}"
