"""Answers what a restricted session asks about its own rights, so that `kubectl auth can-i` agrees with what happens.

The API server answers for the user, as whom the request runs, and knows no restrictions. A SelfSubjectAccessReview of
what the session gave up is answered here, with `denied`; every other one goes to the API server. From the answer to a
SelfSubjectRulesReview is taken what the session gave up; where RBAC's rules cannot express what is left (`*` without
secrets), the sentence beside them does, which kubectl prints. Reviews are JSON here. Invariant: no answer says yes to
what `SessionRestrictions.check` refuses, but for `*` in the list of rules.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web

from arcbridge.agent.kube.apiserver import MAX_ANSWER, AnswerFailed, ApiServer
from arcbridge.agent.kube.authorize import Plan
from arcbridge.agent.kube.body import RequestBody
from arcbridge.agent.kube.status import RequestRefusal, bad_request
from arcbridge.agent.restrictions.session_restrictions import (
    ACCESS,
    DISCOVERY,
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
"""Seconds for the review's body and the API server's answer together."""
_RESOURCES: Final = {resource for _, resource in SELF_REVIEWS}
_PATHS: Final = [path for one in DISCOVERY if one != "root" for path in (f"/{one}", f"/{one}/*")]


async def review(
    api: ApiServer, plan: Plan, restrictions: SessionRestrictions, request: web.BaseRequest
) -> tuple[int, bytes]:
    """Return code and JSON of the answer to a review. Raises RequestRefusal. One of a session runs at a time."""
    try:
        async with asyncio.timeout(DEADLINE), restrictions.reviewing:
            asked = await _body(request)
            if plan.wanted.info.resource == ACCESS and (reason := _refused(restrictions, asked)):
                status = {"allowed": False, "denied": True, "reason": f"arcbridge: {reason}"}
                return 201, json.dumps({**asked, "status": status}).encode()
            # Written anew: it says to the API server what was read here, whatever the caller's spelling was.
            code, answer = await api.carry(plan.tls, _head(plan, body := json.dumps(asked).encode()) + body)
    except (AnswerFailed, TimeoutError) as error:
        raise RequestRefusal(502, "the API server did not answer the review of your rights") from error
    if plan.wanted.info.resource == RULES and code == 201:
        answer = json.dumps(remaining(restrictions, _object(answer, "the API server's answer"))).encode()
    return code, answer


async def _body(request: web.BaseRequest) -> dict[str, Any]:
    body = bytearray()
    async for chunk in RequestBody(request).chunks():
        body += chunk
        if len(body) > MAX_REVIEW:
            raise RequestRefusal(413, f"a review of your rights has at most {MAX_REVIEW} bytes")
    return _object(bytes(body), "a review of your rights in a restricted session")


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = read_json(text, MAX_ANSWER)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise bad_request(f"{what} has to be JSON")
    return found


def _head(plan: Plan, body: bytes) -> bytes:
    """Return the head of a plan for this body, in JSON, and for an answer in JSON."""
    start, *lines = plan.head.rstrip(b"\r\n").split(b"\r\n")
    framed = (b"content-length:", b"transfer-encoding:", b"content-type:", b"content-encoding:", b"accept")
    kept = [line for line in lines if not line.lower().startswith(framed)]
    own = b"Content-Type: application/json\r\nAccept: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    return b"\r\n".join([start, *kept, own])


def _refused(restrictions: SessionRestrictions, asked: Mapping[str, Any]) -> str:
    """Return why a session may not do what a SelfSubjectAccessReview asks about; empty: RBAC decides."""
    spec = asked.get("spec")
    spec = spec if isinstance(spec, dict) else {}
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
    if verb == "create" and (group, resource) in SELF_REVIEWS:
        return ""
    if resource == "namespaces" and not namespace:
        namespace = str(attributes.get("name", ""))  # as the path of one namespace says
    rule = restrictions.rule_against(verb, group, resource, subresource or behind, namespace)
    return restrictions.sentence(rule) if rule else ""


def remaining(restrictions: SessionRestrictions, answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a SelfSubjectRulesReview without what the session gave up."""
    status = answer.get("status")
    status = dict(status) if isinstance(status, dict) else {}
    spec = answer.get("spec")
    namespace = str(spec.get("namespace", "")) if isinstance(spec, dict) else ""
    here = not restrictions.namespaces or namespace in restrictions.namespaces
    rules = [_left(restrictions, rule, here) for rule in _rules(status, "resourceRules")]
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
        resources = [one for one in resources if one.partition("/")[2] not in TUNNELS]
    if restrictions.record.no_secrets:
        resources = [one for one in resources if one == "*" or not hides_secrets(*_split(one))]
    if restrictions.record.read_only or restrictions.verbs:
        verbs = sorted(kept) if "*" in verbs else [one for one in verbs if one in kept]
    return {**rule, "apiGroups": groups, "resources": resources if here else [], "verbs": verbs}


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
