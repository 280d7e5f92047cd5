"""Answers what a restricted session asks about its own rights, so that `kubectl auth can-i` agrees with what happens.

The API server answers for the user, as whom the request runs, and knows no restrictions. A SelfSubjectAccessReview of
what the session gave up is answered here, with `denied`; every other one goes to the API server. From the answer to a
SelfSubjectRulesReview is taken what the session gave up; where RBAC's rules cannot express what is left (`*` without
secrets), the sentence beside them does, which kubectl prints. Answers are JSON here. Invariant: no answer says yes to
what `SessionRestrictions.check` refuses, but for `*`, and `update` of what a PUT makes, in the list of rules, for
`patch`, of which a server-side apply takes `create` too, for what is beneath a resource that is asked for as `*`, and,
in a session with namespaces, for cluster-scoped resources that are not built in: kubectl sends its namespace with them
too, and nothing here knows which they are. To impersonate takes no request of its own: RBAC decides about that, as
where `--as` is used.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from aiohttp import web

from arcbridge import protobuf
from arcbridge.agent.accounts import Account
from arcbridge.agent.kube.apiserver import MAX_ANSWER, AnswerFailed, ApiServer
from arcbridge.agent.kube.authorize import Plan
from arcbridge.agent.kube.body import RequestBody
from arcbridge.agent.kube.status import RequestRefusal, bad_request
from arcbridge.agent.restrictions.session_restrictions import (
    ACCESS,
    DISCOVERY,
    MADE_BY_PUT,
    READS,
    RULES,
    SELF_REVIEWS,
    TUNNELS,
    SessionRestrictions,
    hides_secrets,
)
from arcbridge.refusals import RefusalRule
from arcbridge.untrusted_json import read_json

MAX_REVIEW: Final = 64 * 1024
"""Bytes of a review; kubectl's has some hundred."""
DEADLINE: Final = 10.0
"""Seconds for the review's body and the API server's answer together, once it is the review's turn."""
_MAGIC: Final = b"k8s\x00"
_SPEC: Final = {
    1: ("resourceAttributes", {1: "namespace", 2: "verb", 3: "group", 5: "resource", 6: "subresource", 7: "name"}),
    2: ("nonResourceAttributes", {1: "path", 2: "verb"}),
}
"""The fields of `SelfSubjectAccessReviewSpec` that are read of protobuf (k8s.io/api/authorization/v1), by number."""
CLUSTER_SCOPED: Final = frozenset(
    (group, resource)
    for group, resources in {
        "": "componentstatuses nodes persistentvolumes",
        "admissionregistration.k8s.io": "mutatingadmissionpolicies mutatingadmissionpolicybindings "
        "mutatingwebhookconfigurations validatingadmissionpolicies validatingadmissionpolicybindings "
        "validatingwebhookconfigurations",
        "apiextensions.k8s.io": "customresourcedefinitions",
        "apiregistration.k8s.io": "apiservices",
        "authentication.k8s.io": "tokenreviews",
        "authorization.k8s.io": "subjectaccessreviews",
        "certificates.k8s.io": "certificatesigningrequests clustertrustbundles",
        "flowcontrol.apiserver.k8s.io": "flowschemas prioritylevelconfigurations",
        "internal.apiserver.k8s.io": "storageversions",
        "metrics.k8s.io": "nodes",
        "networking.k8s.io": "ingressclasses ipaddresses servicecidrs",
        "node.k8s.io": "runtimeclasses",
        "rbac.authorization.k8s.io": "clusterrolebindings clusterroles",
        "resource.k8s.io": "deviceclasses devicetaintrules resourceslices",
        "scheduling.k8s.io": "priorityclasses",
        "storage.k8s.io": "csidrivers csinodes storageclasses volumeattachments volumeattributesclasses",
        "storagemigration.k8s.io": "storageversionmigrations",
    }.items()
    for resource in resources.split()
)
"""Resources of Kubernetes that are in no namespace, by group. `namespaces` are apart: the name of one counts."""
_OF_ONE: Final = frozenset({"get", "update", "patch", "delete"})
"""Verbs whose path has the name of an object."""
_IMPERSONATE: Final = "impersonate"
"""What the verbs begin with that no request has: `--as` takes them besides."""
_RESOURCES: Final = {resource for _, resource in SELF_REVIEWS}
_PATHS: Final = [path for one in DISCOVERY if one != "root" for path in (f"/{one}", f"/{one}/*")]


async def review(
    api: ApiServer, plan: Plan, restrictions: SessionRestrictions, request: web.BaseRequest, account: Account
) -> tuple[int, bytes]:
    """Return code and JSON of the answer to a review, for which the account's user pays. Raises RequestRefusal. One of
    a session runs at a time."""
    try:
        async with restrictions.reviewing, asyncio.timeout(DEADLINE):
            body = await _body(request)
            asked = _asked(body)
            spec = spec if isinstance(spec := asked.get("spec"), dict) else {}
            if plan.wanted.info.resource == ACCESS and (reason := _refused(restrictions, spec)):
                status = {"allowed": False, "denied": True, "reason": f"arcbridge: {reason}"}
                return 201, json.dumps({**asked, "status": status}).encode()
            code, answer = await api.carry(plan.tls, _head(plan, body) + body, account=account)
    except TimeoutError as error:
        raise RequestRefusal(504, f"the review of your rights took longer than {DEADLINE:g} s") from error
    except AnswerFailed as error:
        raise RequestRefusal(502, "the API server did not answer the review of your rights") from error
    if plan.wanted.info.resource == RULES and code == 201:
        found = _object(answer, "the API server's answer")
        answer = json.dumps(remaining(restrictions, found, str(spec.get("namespace", "")))).encode()
    return code, answer


async def _body(request: web.BaseRequest) -> bytes:
    body = bytearray()
    async for chunk in RequestBody(request).chunks():
        body += chunk
        if len(body) > MAX_REVIEW:
            raise RequestRefusal(413, f"a review of your rights has at most {MAX_REVIEW} bytes")
    return bytes(body)


def _asked(body: bytes) -> dict[str, Any]:
    """Return a review that came as JSON or in Kubernetes' protobuf, as kubectl sends it."""
    if not body.startswith(_MAGIC):
        return _object(body, "a review of your rights in a restricted session")
    try:
        whole = _message(body[len(_MAGIC) :])
        spec = _message(_message(whole.get(2, b"")).get(2, b""))
        if _message(whole.get(1, b"")).get(2) == b"SelfSubjectRulesReview":
            return {"spec": {"namespace": spec.get(1, b"").decode()}}
        found: dict[str, Any] = {}
        for number, (name, names) in _SPEC.items():
            if number in spec:
                texts = _message(spec[number])
                found[name] = {names[one]: text.decode() for one, text in texts.items() if one in names}
    except ValueError as error:
        raise bad_request("a review of your rights is malformed") from error
    return {"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1", "spec": found}


def _message(data: bytes) -> dict[int, bytes]:
    """Return the texts and inner messages of a message in protobuf, by number. Raises ValueError."""
    return {number: value for number, value in protobuf.fields(data) if isinstance(value, bytes)}


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = read_json(text, MAX_ANSWER)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise bad_request(f"{what} has to be JSON")
    return found


def _head(plan: Plan, body: bytes) -> bytes:
    """Return the head of a plan for a whole body, and for an answer in JSON."""
    start, *lines = plan.head.rstrip(b"\r\n").split(b"\r\n")
    framed = (b"content-length:", b"transfer-encoding:", b"content-encoding:", b"accept")
    kept = [line for line in lines if not line.lower().startswith(framed)]
    own = b"Accept: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    return b"\r\n".join([start, *kept, own])


def _refused(restrictions: SessionRestrictions, spec: Mapping[str, Any]) -> str:
    """Return why a session may not do what a SelfSubjectAccessReview asks about; empty: RBAC decides."""
    if isinstance(path := spec.get("nonResourceAttributes"), dict):
        verb, first = str(path.get("verb", "")).lower(), str(path.get("path", "")).strip("/").partition("/")[0]
        good = verb in ("get", "head") and restrictions.allows_path(first or "root")
        return "" if good else restrictions.sentence(RefusalRule.RESTRICTED_PATH)
    attributes = spec.get("resourceAttributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    verb, group, resource, subresource, namespace = (
        str(attributes.get(name, "")) for name in ("verb", "group", "resource", "subresource", "namespace")
    )
    resource, _, behind = resource.partition("/")
    if (verb == "create" and (group, resource) in SELF_REVIEWS) or verb.startswith(_IMPERSONATE):
        return ""
    if resource == "namespaces":  # as the path of one namespace says, whatever namespace kubectl sends besides
        namespace = str(attributes.get("name", "")) if verb in _OF_ONE else ""
    elif _cluster_scoped([group], resource):
        namespace = ""
    behind = subresource or behind
    makes = verb == "update" and behind in ("", "status") and (group, resource) in MADE_BY_PUT
    verbs = (verb, "create") if makes else (verb,)
    rules = [restrictions.rule_against(one, group, resource, behind, namespace) for one in verbs]
    return next((restrictions.sentence(rule) for rule in rules if rule), "")


def _cluster_scoped(groups: Iterable[str], resource: str) -> bool:
    """Return whether a resource of one of the groups, of which `*` is any, is in no namespace."""
    wanted = set(groups)
    return any(name == resource and wanted & {group, "*"} for group, name in CLUSTER_SCOPED)


def remaining(restrictions: SessionRestrictions, answer: dict[str, Any], namespace: str) -> dict[str, Any]:
    """Return the answer to a SelfSubjectRulesReview of a namespace without what the session gave up."""
    status = answer.get("status")
    status = dict(status) if isinstance(status, dict) else {}
    here = not restrictions.namespaces or namespace in restrictions.namespaces
    left = [_left(restrictions, rule, here) for rule in _rules(status, "resourceRules")]
    rules = [one for rule in left for one in _apart(restrictions, rule)]
    paths = _PATHS if restrictions.namespaces else [*_PATHS, "/metrics", "/metrics/*"]
    others = [
        {"verbs": ["get"], "nonResourceURLs": [one for one in paths if _covers(rule, one)]}
        for rule in _rules(status, "nonResourceRules")
        if {"get", "*"} & set(_words(rule, "verbs"))
    ]
    words = f"arcbridge: this session is restricted ({' '.join(restrictions.words)}), which rules cannot all express"
    status["resourceRules"] = [rule for rule in rules if rule["verbs"] and rule["resources"]]
    status["nonResourceRules"] = [rule for rule in others if rule["nonResourceURLs"]]
    status["incomplete"] = True
    status["evaluationError"] = "; ".join(filter(None, (str(status.get("evaluationError") or ""), words)))
    return {**answer, "status": status}


def _left(restrictions: SessionRestrictions, rule: dict[str, Any], here: bool) -> dict[str, Any]:
    """Return what a session keeps of one rule; `here`: the rule's namespace is one of the session's."""
    groups, resources, verbs = (_words(rule, name) for name in ("apiGroups", "resources", "verbs"))
    own = [one for one in resources if one in _RESOURCES]
    if own and own == resources and {"create", "*"} & set(verbs):
        return {**rule, "verbs": ["create"]}
    kept = restrictions.verbs & READS if restrictions.verbs and restrictions.record.read_only else restrictions.verbs
    if restrictions.record.read_only:
        kept = kept or (frozenset() if restrictions.verbs else READS)
        resources = [one for one in resources if one.partition("/")[2] not in (*TUNNELS, "*")]
    if restrictions.record.no_secrets:
        resources = [one for one in resources if one == "*" or not hides_secrets(*_split(one))]
    if restrictions.namespaces:
        resources = [one for one in resources if not _cluster_scoped(groups, one.partition("/")[0])]
    if restrictions.record.read_only or restrictions.verbs:
        verbs = sorted(kept) if "*" in verbs else [one for one in verbs if one in kept or one.startswith(_IMPERSONATE)]
    return {**rule, "apiGroups": groups, "resources": resources if here else [], "verbs": verbs}


def _apart(restrictions: SessionRestrictions, rule: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a session keeps of one rule as rules: of `namespaces` its own, by name, and no list."""
    resources = _words(rule, "resources")
    own = [one for one in resources if _split(one)[0] == "namespaces"]
    if not restrictions.namespaces or not own:
        return [rule]
    named = set(_words(rule, "resourceNames")) or restrictions.namespaces
    names = sorted(restrictions.namespaces & named)
    verbs = [one for one in _words(rule, "verbs") if one in (*_OF_ONE, "*")]
    verbs = sorted(_OF_ONE) if "*" in verbs else verbs
    others = [one for one in resources if one not in own]
    mine = {**rule, "resources": own if names else [], "verbs": verbs, "resourceNames": names}
    return [{**rule, "resources": others}, mine]


def _split(resource: str) -> tuple[str, str]:
    name, _, subresource = resource.partition("/")
    return name, subresource


def _covers(rule: dict[str, Any], path: str) -> bool:
    """Return whether a rule's URLs have a path, as RBAC compares them (`NonResourceURLMatches`)."""
    urls = _words(rule, "nonResourceURLs")
    return any(one in ("*", path) or (one.endswith("*") and path.startswith(one[:-1])) for one in urls)


def _rules(status: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    rules = status.get(name)
    return [rule for rule in rules if isinstance(rule, dict)] if isinstance(rules, list) else []


def _words(rule: Mapping[str, Any], name: str) -> list[str]:
    words = rule.get(name)
    return list(map(str, words)) if isinstance(words, list) else []
