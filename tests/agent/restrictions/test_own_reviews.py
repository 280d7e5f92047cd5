"""`kubectl auth can-i` in a restricted session, and its other requests, from the stream to the API server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.restrictions.own_reviews import MAX_REVIEW, remaining
from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions
from arcbridge.wire.records import Restrictions
from tests.agent.kube.bench import PODS, Bench, Response, running
from tests.support.fake_apiserver import impersonation_of, reply

ACCESS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
RULES = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
RECORD = Restrictions(read_only=True, no_secrets=True, namespaces="shop")
EXTRA = "impersonate-extra-arcbridge.io%2frestricted"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running(tmp_path) as made:
        restrict(made, RECORD)
        yield made


def restrict(bench: Bench, record: Restrictions) -> None:
    bench.caller.restrictions = SessionRestrictions(record)
    bench.caller.__post_init__()


async def post(bench: Bench, path: str, document: Any, *headers: str) -> Response:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    head = "\n".join([f"POST {path} HTTP/1.1", "Host: k", f"Content-Length: {len(body)}", *headers])
    return await bench.ask(head, body)


def access(**attributes: str) -> dict[str, Any]:
    return {"kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}}


# -- requests -------------------------------------------------------------------------------------------------------


async def test_h43_both_entrances_refuse_and_say_why(bench: Bench) -> None:
    for headers in ((), ("Accept-Encoding: gzip", "Expect: 100-continue")):  # plain, and not
        answer = await bench.get("/api/v1/namespaces/shop/secrets", *headers)
        assert answer.status == 403
        status = answer.status_object
        assert status["details"]["causes"][0]["reason"] == "restricted.no_secrets"
        assert "--no-secrets" in status["message"]
    assert (await bench.get("/api/v1/nodes")).status_object["details"]["causes"][0]["reason"] == "restricted.namespaces"
    deleted = await bench.get("/api/v1/namespaces/shop/pods/a", method="DELETE")
    assert deleted.status_object["details"]["causes"][0]["reason"] == "restricted.read_only"
    assert bench.api.requests == [], "nothing has left"
    assert bench.proxy.stats.restricted == {"read_only": 1, "no_secrets": 2, "namespaces": 1, "verbs": 0, "path": 0}
    lines = bench.audit.lines()
    assert {line["outcome"] for line in lines} == {"refused"}
    assert {tuple(line["restricted"]) for line in lines} == {("read-only", "no-secrets", "namespaces=shop")}


@pytest.mark.parametrize("headers", [(), ("Accept-Encoding: gzip", "Cookie: a", "Expect: 100-continue")])
async def test_the_api_server_hears_what_a_session_gave_up(bench: Bench, headers: tuple[str, ...]) -> None:
    assert (await bench.get("/api/v1/namespaces/shop/pods", *headers)).status == 200
    assert impersonation_of(bench.api.last)[EXTRA] == [b"read-only", b"no-secrets", b"namespaces=shop"]
    answer = await bench.get("/api", "Impersonate-User: bob")
    assert answer.status == 200
    assert impersonation_of(bench.api.last)[EXTRA] == [b"read-only", b"no-secrets", b"namespaces=shop"]
    assert (
        await bench.get("/api", "Impersonate-User: bob", "Impersonate-Extra-Arcbridge.io%2Frestricted: x")
    ).status == 400
    bench.caller.restrictions = None
    bench.caller.__post_init__()
    bench.caller.subject_lines = type(bench.caller.subject_lines)()
    assert (await bench.get(PODS)).status == 200
    assert EXTRA not in impersonation_of(bench.api.last)


async def test_h43_as_another_user_takes_no_way_round(bench: Bench) -> None:
    answer = await bench.get("/api/v1/namespaces/shop/pods/a", "Impersonate-User: bob", method="DELETE")
    assert answer.status == 403
    assert bench.api.requests == [], "nor is the API server asked about bob"


def field(number: int, value: bytes) -> bytes:
    return bytes((number << 3 | 2, len(value))) + value


def in_protobuf(attributes: dict[str, str]) -> bytes:
    """As kubectl writes it: `Unknown`, the review, its spec, the attributes."""
    numbers = {"namespace": 1, "verb": 2, "group": 3, "resource": 5, "subresource": 6, "name": 7}
    inner = b"".join(field(numbers[name], value.encode()) for name, value in attributes.items())
    return b"k8s\x00" + field(1, field(1, b"authorization.k8s.io/v1")) + field(2, field(2, field(1, inner)))


# -- can-i ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "flag"),
    [
        ({"verb": "delete", "resource": "pods", "namespace": "shop"}, "--read-only"),
        ({"verb": "*", "resource": "*", "namespace": "shop"}, "--read-only"),
        ({"verb": "get", "resource": "pods", "subresource": "proxy", "namespace": "shop"}, "--read-only"),
        ({"verb": "get", "resource": "pods/exec", "namespace": "shop"}, "--read-only"),
        ({"verb": "get", "resource": "secrets", "namespace": "shop"}, "--no-secrets"),
        ({"verb": "get", "resource": "*", "namespace": "shop"}, "--no-secrets"),
        ({"verb": "list", "resource": "pods"}, "--namespace"),
        ({"verb": "list", "resource": "nodes"}, "--namespace"),
        # kubectl sends the namespace of its context with these too
        ({"verb": "list", "resource": "nodes", "namespace": "shop"}, "--namespace"),
        ({"verb": "list", "resource": "namespaces", "namespace": "shop"}, "--namespace"),
        ({"verb": "get", "resource": "namespaces", "name": "other", "namespace": "shop"}, "--namespace"),
        ({"verb": "list", "resource": "namespaces", "name": "shop", "namespace": "shop"}, "--namespace"),
        (
            {
                "verb": "get",
                "group": "rbac.authorization.k8s.io",
                "resource": "clusterroles",
                "name": "a",
                "namespace": "shop",
            },
            "--namespace",
        ),
        ({"verb": "get", "resource": "pods", "subresource": "*", "namespace": "shop"}, "--read-only"),
        ({"verb": "get", "resource": "namespaces", "name": "other"}, "--namespace"),
        ({}, "--read-only"),
    ],
)
async def test_can_i_says_no_to_what_the_session_gave_up(bench: Bench, attributes: dict[str, str], flag: str) -> None:
    answer = await post(bench, ACCESS, access(**attributes))
    assert answer.status == 201
    document = json.loads(answer.body)
    assert (document["status"]["allowed"], document["status"]["denied"]) == (False, True)
    assert flag in document["status"]["reason"]
    assert document["spec"] == {"resourceAttributes": attributes}
    assert json.loads((await post(bench, ACCESS, in_protobuf(attributes))).body)["status"] == document["status"]
    assert bench.api.requests == []


@pytest.mark.parametrize(
    ("record", "attributes", "flag"),
    [
        (Restrictions(no_secrets=True), {"verb": "get", "resource": "nodes", "subresource": "proxy"}, "--no-secrets"),
        (Restrictions(no_secrets=True), {"verb": "create", "resource": "services/proxy"}, "--no-secrets"),
        (Restrictions(verbs="update"), {"verb": "update", "resource": "services"}, "--verb"),
        (Restrictions(verbs="update"), {"verb": "update", "resource": "services/status"}, "--verb"),
    ],
)
async def test_can_i_says_no_by_one_restriction(
    bench: Bench, record: Restrictions, attributes: dict[str, str], flag: str
) -> None:
    restrict(bench, record)
    status = json.loads((await post(bench, ACCESS, access(**attributes))).body)["status"]
    assert (status["denied"], flag in status["reason"]) == (True, True)
    assert bench.api.requests == []


@pytest.mark.parametrize(
    "attributes",
    [
        {"verb": "list", "resource": "pods", "namespace": "shop"},
        {"verb": "get", "resource": "namespaces", "name": "shop"},
        {"verb": "get", "resource": "namespaces", "name": "shop", "namespace": "default"},
        {"verb": "get", "group": "example.com", "resource": "clusterroles", "namespace": "shop"},
        {"verb": "impersonate", "resource": "users", "name": "bob", "namespace": "shop"},
        {"verb": "impersonate:user-info", "group": "authentication.k8s.io", "resource": "users"},
        {"verb": "create", "group": "authorization.k8s.io", "resource": "selfsubjectaccessreviews"},
    ],
)
async def test_can_i_asks_the_api_server_about_the_rest(bench: Bench, attributes: dict[str, str]) -> None:
    judged = {"kind": "SelfSubjectAccessReview", "status": {"allowed": False}}
    bench.api.routes[ACCESS] = reply(201, json.dumps(judged).encode())
    answer = await post(bench, ACCESS, access(**attributes), "Accept: application/vnd.kubernetes.protobuf")
    assert (answer.status, json.loads(answer.body)) == (201, judged)
    sent = bench.api.last
    assert json.loads(sent.body) == access(**attributes)
    assert impersonation_of(sent)["impersonate-user"] == [b"alice"]
    assert [value for name, value in sent.lines if name.lower() == b"accept"] == [b"application/json"]
    await post(bench, ACCESS, in_protobuf(attributes), "Content-Type: application/vnd.kubernetes.protobuf")
    assert bench.api.last.body == in_protobuf(attributes)
    record = (await bench.audit.wait(2))[0]
    assert (record.status, record.verb, record.resource) == (201, "create", "selfsubjectaccessreviews")


@pytest.mark.parametrize(
    ("path", "allowed"), [("/version", True), ("/", True), ("/logs/a", False), ("/metrics", False)]
)
async def test_can_i_of_a_path(bench: Bench, path: str, allowed: bool) -> None:
    bench.api.routes[ACCESS] = reply(201, json.dumps({"status": {"allowed": True}}).encode())
    asked = {"spec": {"nonResourceAttributes": {"verb": "get", "path": path}}}
    assert json.loads((await post(bench, ACCESS, asked)).body)["status"]["allowed"] is allowed


def rule(verbs: str, groups: str, resources: str) -> dict[str, list[str]]:
    return {"verbs": verbs.split(), "apiGroups": groups.split(","), "resources": resources.split()}


SELF = rule("create", "authorization.k8s.io", "selfsubjectaccessreviews selfsubjectrulesreviews")
ADMIN = rule("*", "*", "*")
DEVELOPER = rule("get list create delete", "", "pods pods/exec pods/log secrets serviceaccounts/token services/proxy")


LEFT = [
    (
        Restrictions(read_only=True),
        [rule("get list watch", "*", "*"), rule("get list", "", "pods pods/log secrets serviceaccounts/token")],
    ),
    (Restrictions(no_secrets=True), [ADMIN, rule("get list create delete", "", "pods pods/exec pods/log")]),
    (Restrictions(namespaces="other"), []),
    (Restrictions(namespaces="shop"), [ADMIN, DEVELOPER]),
    (Restrictions(verbs="get delete"), [rule("delete get", "*", "*"), {**DEVELOPER, "verbs": ["get", "delete"]}]),
    (Restrictions(True, verbs="delete"), []),
]


def test_the_list_of_rules_has_nothing_cluster_wide_and_no_way_into_pods() -> None:
    listed = [
        rule("get list", "", "nodes nodes/proxy pods namespaces"),
        {**rule("get", "", "namespaces"), "resourceNames": ["other"]},
        rule("*", "*", "clusterroles deployments"),
        rule("get", "example.com", "clusterroles"),
        rule("get impersonate", "", "pods/* users"),
    ]
    answer = {"status": {"resourceRules": listed}}
    found = remaining(SessionRestrictions(Restrictions(read_only=True, namespaces="shop")), answer, "shop")["status"]
    assert found["resourceRules"] == [
        rule("get list", "", "pods"),
        {**rule("get", "", "namespaces"), "resourceNames": ["shop"]},
        rule("get list watch", "*", "deployments"),
        rule("get", "example.com", "clusterroles"),
        rule("get impersonate", "", "users"),
    ]


@pytest.mark.parametrize(("record", "left"), LEFT, ids=[" ".join(record.words()) for record, _ in LEFT])
def test_the_list_of_rules_has_what_is_left(record: Restrictions, left: list[dict[str, Any]]) -> None:
    paths = [
        {"verbs": ["get"], "nonResourceURLs": ["/api/*", "/healthz", "/logs/*"]},
        {"verbs": ["put"], "nonResourceURLs": ["*"]},
    ]
    status = {"resourceRules": [SELF, ADMIN, DEVELOPER, "x"], "nonResourceRules": paths, "incomplete": False}
    found = remaining(SessionRestrictions(record), {"status": status}, "shop")["status"]
    assert found["resourceRules"] == [SELF, *left]
    assert found["nonResourceRules"] == [{"verbs": ["get"], "nonResourceURLs": ["/api/*", "/healthz"]}]
    assert found["incomplete"] is True
    assert " ".join(record.words()) in found["evaluationError"]


async def test_rules_come_from_the_api_server_and_are_taken_from(bench: Bench) -> None:
    listed = {"spec": {}, "status": {"resourceRules": [DEVELOPER], "nonResourceRules": []}}
    bench.api.routes[RULES] = reply(201, json.dumps(listed).encode())
    kind = field(1, field(2, b"SelfSubjectRulesReview"))
    for namespace, left in (("shop", [rule("get list", "", "pods pods/log")]), ("other", []), ("", [])):
        asked = b"k8s\x00" + kind + field(2, field(2, field(1, namespace.encode())))
        for document in ({"spec": {"namespace": namespace}}, asked):
            answer = json.loads((await post(bench, RULES, document)).body)
            assert answer["status"]["resourceRules"] == left
    bench.api.routes[RULES] = reply(403, b'{"kind":"Status"}')
    refused = await post(bench, RULES, {"spec": {"namespace": "shop"}})
    assert (refused.status, refused.body) == (403, b'{"kind":"Status"}')


@pytest.mark.parametrize("body", [b"k8s\x00abc", b"k8s\x00" + field(2, b"\xff"), b"[]", b"{", b"[" * 5000, b""])
async def test_a_review_that_cannot_be_read_is_refused(bench: Bench, body: bytes) -> None:
    assert (await post(bench, ACCESS, body)).status == 400
    assert bench.api.requests == []


async def test_h45_a_review_is_bounded(bench: Bench) -> None:
    grown = [await post(bench, ACCESS, b" " * size) for size in (MAX_REVIEW + 1, 8 * MAX_REVIEW)]
    assert [answer.status for answer in grown] == [413, 413]
    bench.api.routes[ACCESS] = reply(201, b"{" + b" " * (2 << 20) + b"}")
    answer = await post(bench, ACCESS, access(verb="get", resource="pods", namespace="shop"))
    assert answer.status == 502
    await bench.audit.wait(3)


async def test_l32_a_review_counts_for_its_user(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcbridge.agent.kube.apiserver.SEAT_WAIT", 0.0)
    account = bench.caller.account
    account.seats.most = account.seats.held = 1
    asked = access(verb="get", resource="pods", namespace="shop")
    assert (await post(bench, ACCESS, asked)).status == 429
    assert bench.api.requests == []
    account.seats.leave()
    assert (await post(bench, ACCESS, asked)).status == 200
    assert (account.connections, account.seats.held) == (0, 0)


async def test_h45_a_slow_review_says_so_and_takes_no_time_of_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.agent.restrictions.own_reviews.DEADLINE", 0.2)
    restrictions = bench.caller.restrictions
    await restrictions.reviewing.acquire()
    second = asyncio.create_task(post(bench, ACCESS, access(verb="delete", resource="pods")))
    await asyncio.sleep(0.4)  # it waits for longer than its own review may take
    assert bench.caller.account.arriving.held, "its body waits with it"
    restrictions.reviewing.release()
    assert (await second).status == 201
    head = "\n".join([f"POST {ACCESS} HTTP/1.1", "Host: k", "Content-Length: 9"])
    slow = await bench.ask(head, b"{")
    assert slow.status == 504
    assert "took longer than 0.2 s" in slow.status_object["message"]


async def test_what_is_no_post_is_no_review(bench: Bench) -> None:
    restrict(bench, Restrictions(read_only=True))
    await bench.get(ACCESS, "Accept-Encoding: gzip", "Cookie: a", "Expect: 100-continue")
    assert [request.method for request in bench.api.requests] == ["GET"]


async def test_an_unrestricted_session_is_answered_as_ever(bench: Bench) -> None:
    for record in (None, SessionRestrictions(Restrictions(until=4_000_000_000))):
        bench.caller.restrictions = record
        bench.api.routes[ACCESS] = reply(201, b"\x00whatever")
        answer = await post(bench, ACCESS, b"k8s\x00binary")
        assert (answer.status, answer.body) == (201, b"\x00whatever")
        assert bench.api.last.body == b"k8s\x00binary"
