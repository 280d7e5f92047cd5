"""What a restricted session may ask for: a table, and properties beside the API server's own reading."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arcbridge.agent.kube.request_target import request_target
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.restrictions.session_restrictions import DISCOVERY, SessionRestrictions
from arcbridge.errors import PermissionRefused
from arcbridge.refusals import RefusalRule
from arcbridge.wire.records import MOST_NAMESPACES, Restrictions
from tests.agent.kube.desk import parsed, plain

from . import upstream

READ_ONLY = SessionRestrictions(Restrictions(read_only=True))
NO_SECRETS = SessionRestrictions(Restrictions(no_secrets=True))
SHOP = SessionRestrictions(Restrictions(namespaces="shop web"))
GET_LIST = SessionRestrictions(Restrictions(verbs="get list"))
UNTIL = SessionRestrictions(Restrictions(until=1))
ALL = (READ_ONLY, NO_SECRETS, SHOP, GET_LIST)
UPGRADE = ((b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"))


def refused(restrictions: SessionRestrictions, method: str, target: str, *fields: tuple[bytes, bytes]) -> RefusalRule:
    """By which rule a request is refused; NONE where it goes on, BAD where no session may make it."""
    facts = parsed(*fields, method=method, target=target)
    try:
        wanted = request_target(method, target, b"upgrade" in facts.values)
    except RequestRefusal:
        return RefusalRule.TOKEN_SHAPE  # 400, before any restriction
    try:
        restrictions.check(facts, wanted.info)
    except RequestRefusal as refusal:
        found = refusal
    else:
        return RefusalRule.NONE
    assert found.status_code == 403
    assert found.refusal.rule
    return found.refusal.rule


NONE, PATH = RefusalRule.NONE, RefusalRule.RESTRICTED_PATH
RO, SECRETS = RefusalRule.RESTRICTED_READ_ONLY, RefusalRule.RESTRICTED_NO_SECRETS
NAMESPACES, VERBS = RefusalRule.RESTRICTED_NAMESPACES, RefusalRule.RESTRICTED_VERBS
POD = "/api/v1/namespaces/shop/pods/web"
SELF = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
TABLE = [
    # method, target, and by what read-only, no-secrets, namespaces (shop, web) and verbs (get, list) refuse it
    ("GET", "/api/v1/namespaces/shop/pods", NONE, NONE, NONE, NONE),
    ("HEAD", POD, NONE, NONE, NONE, NONE),
    ("GET", POD + "/log?follow=true", NONE, NONE, NONE, NONE),
    ("GET", POD + "/status", NONE, NONE, NONE, NONE),
    ("GET", "/api/v1/namespaces/shop", NONE, NONE, NONE, NONE),
    ("GET", "/api/v1/namespaces/shop/pods?watch", NONE, NONE, NONE, VERBS),
    ("GET", "/api/v1/namespaces/shop/pods?watch=1&watch=0", NONE, NONE, NONE, VERBS),
    ("GET", "/api/v1/namespaces/shop/pods?w%61tch=yes", NONE, NONE, NONE, VERBS),
    ("GET", "/api/v1/namespaces/shop/pods?watch=false", NONE, NONE, NONE, NONE),
    ("GET", "/api/v1/watch/namespaces/shop/pods", NONE, NONE, NONE, VERBS),
    ("GET", "/api/v1/pods", NONE, NONE, NAMESPACES, NONE),
    ("GET", "/api/v1/watch/pods", NONE, NONE, NAMESPACES, VERBS),
    ("GET", "/api/v1/namespaces", NONE, NONE, NAMESPACES, NONE),
    ("GET", "/api/v1/namespaces?fieldSelector=metadata.name%3Dshop", NONE, NONE, NAMESPACES, NONE),
    ("GET", "/api/v1/nodes", NONE, NONE, NAMESPACES, NONE),
    ("GET", "/api/v1/namespaces/other/pods", NONE, NONE, NAMESPACES, NONE),
    ("GET", "/api/v1/namespaces/shop/secrets", NONE, SECRETS, NONE, NONE),
    ("GET", "/api/v1/secrets?watch=true", NONE, SECRETS, NAMESPACES, VERBS),
    ("GET", "/api/v1/namespaces/shop/secrets/a", NONE, SECRETS, NONE, NONE),
    ("GET", "/apis/example.com/v1/namespaces/shop/secrets", NONE, SECRETS, NONE, NONE),
    ("GET", "/apis/image.openshift.io/v1/namespaces/shop/imagestreams/a/secrets", NONE, SECRETS, NONE, NONE),
    ("POST", "/api/v1/namespaces/shop/secrets", RO, SECRETS, NONE, VERBS),
    ("POST", "/api/v1/namespaces/shop/serviceaccounts/a/token", RO, SECRETS, NONE, VERBS),
    ("GET", "/api/v1/namespaces/shop/configmaps/a", NONE, NONE, NONE, NONE),
    ("POST", "/api/v1/namespaces/shop/pods", RO, NONE, NONE, VERBS),
    ("POST", "/api/v1/namespaces/shop/pods?dryRun=All", RO, NONE, NONE, VERBS),
    ("PUT", POD, RO, NONE, NONE, VERBS),
    ("PATCH", POD, RO, NONE, NONE, VERBS),
    ("PATCH", POD + "?dryRun=All", RO, NONE, NONE, VERBS),
    ("DELETE", POD, RO, NONE, NONE, VERBS),
    ("DELETE", "/api/v1/namespaces/shop/pods", RO, NONE, NONE, VERBS),
    ("DELETE", "/api/v1/namespaces/shop", RO, NONE, NONE, VERBS),
    ("OPTIONS", POD, RO, NONE, NONE, VERBS),
    ("POST", POD + "/eviction", RO, NONE, NONE, VERBS),
    ("GET", POD + "/exec?command=sh", RO, NONE, NONE, NONE),
    ("GET", POD + "/attach", RO, NONE, NONE, NONE),
    ("GET", POD + "/portforward", RO, NONE, NONE, NONE),
    ("GET", POD + "/proxy", RO, SECRETS, NONE, NONE),
    ("GET", POD + "/proxy/a/b", RO, SECRETS, NONE, NONE),
    ("GET", "/api/v1/namespaces/shop/services/vault:8200/proxy/v1/secret", RO, SECRETS, NONE, NONE),
    ("GET", "/api/v1/nodes/n/proxy/configz", RO, SECRETS, NAMESPACES, NONE),
    ("GET", "/api/v1/nodes/n/proxy/exec/shop/web/c", RO, SECRETS, NAMESPACES, NONE),
    ("GET", "/api/v1/namespaces/shop/services/https:web:1/proxy/", PATH, PATH, PATH, PATH),
    ("GET", "/apis/cluster.karmada.io/v1alpha1/clusters/a/proxy/api/v1/pods", RO, SECRETS, NAMESPACES, NONE),
    ("GET", "/apis/cluster.karmada.io/v1alpha1/clusters/a/proxy/api/v1/secrets", RO, SECRETS, NAMESPACES, NONE),
    ("GET", "/apis/custom.metrics.k8s.io/v1beta1/namespaces/shop/pods/*/http_requests", NONE, NONE, NONE, NONE),
    ("GET", "/apis/external.metrics.k8s.io/v1beta1/namespaces/shop/queue_length", NONE, NONE, NONE, NONE),
    ("GET", "/api/v1/namespaces/shop_a/pods", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/proxy/namespaces/shop/services/web", RO, SECRETS, NONE, VERBS),
    ("POST", "/api/v1/watch/namespaces/shop/pods", PATH, PATH, PATH, PATH),
    ("DELETE", "/api/v1/watch/namespaces/shop/pods/web", PATH, PATH, PATH, PATH),
    ("POST", SELF, NONE, NONE, NONE, NONE),
    ("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", NONE, NONE, NONE, NONE),
    ("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", NONE, NONE, NONE, NONE),
    ("POST", SELF + "/a", RO, NONE, NAMESPACES, VERBS),
    ("POST", "/apis/example.com/v1/selfsubjectaccessreviews", RO, NONE, NAMESPACES, VERBS),
    ("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", RO, NONE, NAMESPACES, VERBS),
    ("POST", "/apis/authentication.k8s.io/v1/tokenreviews", RO, NONE, NAMESPACES, VERBS),
    ("PUT", SELF, RO, NONE, NAMESPACES, VERBS),
    # paths that two readers could take for different ones
    ("GET", "//api/v1/namespaces/shop/pods", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1//namespaces/shop/pods", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/namespaces/shop//pods", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/namespaces/shop/pods/", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/namespaces/shop%2Fpods", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/namespaces/shop/pods%2fweb%2fexec", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/namespaces/shop/%2573ecrets", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/namespaces/shop/Secrets", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/namespaces/shop/secrets;a", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/namespaces/Shop/pods", PATH, PATH, PATH, PATH),
    ("GET", "/api/v1/namespaces/shop/%73ecrets", NONE, SECRETS, NONE, NONE),
    ("GET", "/api/v1/namespaces/shop/pods/web/exec/more", PATH, PATH, PATH, PATH),
    # paths of no resource
    ("GET", "/api", NONE, NONE, NONE, NONE),
    ("GET", "/apis/apps/v1", NONE, NONE, NONE, NONE),
    ("GET", "/openapi/v3/apis/apps/v1?hash=A", NONE, NONE, NONE, NONE),
    ("GET", "/version", NONE, NONE, NONE, NONE),
    ("GET", "/readyz?verbose", NONE, NONE, NONE, NONE),
    ("GET", "/", NONE, NONE, NONE, NONE),
    ("GET", "/metrics", NONE, NONE, PATH, NONE),
    ("GET", "/logs/kube-apiserver.log", PATH, PATH, PATH, PATH),
    ("GET", "/debug/pprof/profile", PATH, PATH, PATH, PATH),
    ("PUT", "/debug/flags/v", PATH, PATH, PATH, PATH),
    ("GET", "/api%2fv1", PATH, PATH, PATH, PATH),
    ("GET", "//version", PATH, PATH, PATH, PATH),
    ("POST", "/api", PATH, PATH, PATH, PATH),
    ("DELETE", "/apis/apps/v1", PATH, PATH, PATH, PATH),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "target", "rules"), [(m, t, r) for m, t, *r in TABLE], ids=[f"{r[0]} {r[1]}" for r in TABLE]
)
def test_h43_table(method: str, target: str, rules: list[RefusalRule]) -> None:
    assert [refused(one, method, target) for one in ALL] == rules
    assert refused(UNTIL, method, target) is NONE, "an end alone restricts no request"


@pytest.mark.parametrize("subresource", ["exec", "attach", "portforward", "proxy", "console"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_h43_read_only_upgrades_nothing(method: str, subresource: str) -> None:
    headers = UPGRADE if method == "GET" else ((b"Connection", b"Upgrade"), (b"Upgrade", b"SPDY/3.1"))
    for resource in ("pods", "virtualmachineinstances"):
        target = f"/api/v1/namespaces/shop/{resource}/web/{subresource}"
        assert refused(READ_ONLY, method, target, *headers) is RO
        assert refused(SHOP, method, target, *headers) is NONE
        assert refused(GET_LIST, method, target, *headers) is VERBS
    assert refused(READ_ONLY, "GET", "/api/v1/pods?watch=1", *UPGRADE) is not NONE
    assert refused(READ_ONLY, "GET", "/api", *UPGRADE) is PATH


CREATE = SessionRestrictions(Restrictions(verbs="create"))
CHANGE = SessionRestrictions(Restrictions(verbs="update patch"))
WRITE = SessionRestrictions(Restrictions(verbs="create update patch"))
POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
ROLE = "/apis/rbac.authorization.k8s.io/v1/namespaces/shop/roles/a"


@pytest.mark.parametrize(
    ("method", "target", "kind", "rule"),
    [
        ("PATCH", POD, "application/merge-patch+json", NONE),
        ("PATCH", POD, "application/json-patch+json; charset=utf-8", NONE),
        ("PATCH", POD, "application/strategic-merge-patch+json", NONE),
        ("PATCH", POD, "application/apply-patch+yaml", VERBS),
        ("PATCH", POD, "application/apply-patch+cbor", VERBS),
        ("PATCH", POD, "application/a-later-kind", VERBS),
        ("PATCH", POD, "", VERBS),
        ("PATCH", POD + "/status", "application/apply-patch+yaml", NONE),
        ("PATCH", f"{POLICIES}/a/status", "application/apply-patch+yaml", VERBS),
        ("PATCH", f"{POLICIES}/a/status", "application/merge-patch+json", NONE),
        ("PUT", f"{POLICIES}/a/status", "application/json", NONE),
        ("PUT", POD, "application/json", NONE),
        ("PUT", "/apis/coordination.k8s.io/v1beta1/namespaces/shop/leasecandidates/a", "application/json", VERBS),
        ("PUT", ROLE, "application/json", VERBS),
        ("PUT", "/api/v1/namespaces/shop/services/web/status", "application/json", VERBS),
        ("PATCH", "/api/v1/namespaces/shop/services/web/status", "application/apply-patch+yaml", VERBS),
        ("PUT", "/api/v1/namespaces/shop/services/web/proxy/a", "application/json", NONE),
    ],
)
def test_h46_what_changes_makes_nothing_without_create(method: str, target: str, kind: str, rule: RefusalRule) -> None:
    assert refused(CHANGE, method, target, (b"Content-Type", kind.encode())) is rule
    assert refused(WRITE, method, target, (b"Content-Type", kind.encode())) is NONE


def test_h46_an_upgrade_that_may_be_none_is_a_read_as_well() -> None:
    for behind in ("log", "status", "proxy/a"):
        assert refused(CREATE, "GET", f"{POD}/{behind}", *UPGRADE) is VERBS
    for behind in ("exec", "attach", "portforward"):
        assert refused(CREATE, "GET", f"{POD}/{behind}", *UPGRADE) is NONE
        assert refused(CREATE, "GET", f"{POD}/{behind}") is VERBS


SEGMENTS = st.sampled_from(
    ["api", "apis", "v1", "apps", "watch", "proxy", "namespaces", "shop", "other", "pods", "secrets", "nodes", "web",
     "services", "serviceaccounts", "token", "exec", "attach", "portforward", "log", "status", "finalize", "", ".",
     "..", "%2f", "a%2Fexec", "%2e%2e", "se%63rets", "%25", "Pods", "pods;x", "authorization.k8s.io",
     "selfsubjectaccessreviews", "version", "metrics", "logs", "healthz", "\u00fc", "a b"]
)  # fmt: skip
METHODS = st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
QUERIES = st.sampled_from(
    ["", "?watch", "?watch=true", "?watch=0", "?watch=a;b", "?WATCH=1", "?dryRun=All", "?x=%zz&watch=1",
     "?fieldSelector=metadata.name=a", "?path=/exec", "?watch=false&watch=true", "?"]
)  # fmt: skip
TARGETS = st.tuples(
    st.sampled_from(["/", "//", "/api/v1/", "/apis/apps/v1/", "/api/v1/namespaces/shop/", "/api/v1/watch/"]),
    st.lists(SEGMENTS, max_size=6),
    QUERIES,
).map(lambda parts: parts[0] + "/".join(parts[1]) + parts[2])


@settings(max_examples=1500, deadline=None)
@given(METHODS, TARGETS)
@example("POST", "/api/v1/watch/pods")
@example("GET", "/api/v1/api?watch=a;b")
@example("GET", "/api/v1/proxy/pods/web")
@example("GET", "/api/v1/namespaces/status/secrets")
@example("GET", "/api/v1/namespaces/shop/status")
@example("GET", "/api/v1/namespaces/shop/finalize/exec")
def test_h43_nothing_passes_that_the_api_server_reads_otherwise(method: str, target: str) -> None:
    found = upstream.read(method, target)
    if found is None:
        return
    review = found.verb == "create" and found.resource.startswith("selfsubject") and not found.subresource
    if refused(READ_ONLY, method, target) is NONE:
        assert not found.writes or review
    if refused(NO_SECRETS, method, target) is NONE and found.resource_request:
        assert found.resource != "secrets"
        assert found.subresource not in ("secrets", "proxy")
        assert (found.resource, found.subresource) != ("serviceaccounts", "token")
    if refused(SHOP, method, target) is NONE and found.resource_request:
        assert found.namespace in ("shop", "web") or review
    if refused(GET_LIST, method, target) is NONE and found.resource_request:
        assert found.verb in ("get", "list") or review


@settings(max_examples=500, deadline=None)
@given(METHODS, TARGETS)
def test_h43_they_only_take_away(method: str, target: str) -> None:
    """What several restrictions let through, each of them does; and both entrances refuse alike."""
    both = SessionRestrictions(Restrictions(True, True, "shop web", "get list"))
    if refused(both, method, target) is NONE:
        assert {refused(one, method, target) for one in ALL} == {NONE}
    if method == "GET" and refused(READ_ONLY, method, target) is not RefusalRule.TOKEN_SHAPE:
        info = request_target(method, target, False).info
        for restrictions in ALL:
            rule = refused(restrictions, method, target)
            if rule:
                with pytest.raises(RequestRefusal):
                    restrictions.check(plain(target=target), info)
            else:
                restrictions.check(plain(target=target), info)


def test_a_refusal_says_which_restriction_and_how_to_do_more() -> None:
    info = request_target("DELETE", POD, False).info
    with pytest.raises(RequestRefusal) as caught:
        READ_ONLY.check(parsed(method="DELETE", target=POD), info)
    assert caught.value.message == (
        'arcbridge: "delete" of pods is refused: this session is read-only: get, list and watch, without exec, attach, '
        "port-forward and proxy; to do more, use a session without --read-only, or [restrict] in its settings "
        "(`arcbridge connect`, or the context of one)"
    )
    many = SessionRestrictions(Restrictions(namespaces=" ".join(f"n{n}" for n in range(9))))
    assert "n0, n1, n2, n3, n4 and others alone" in many.sentence(NAMESPACES)


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        Restrictions(verbs="get impersonate").encode(),
        Restrictions(namespaces="Shop").encode(),
        Restrictions(namespaces="a/b").encode(),
        Restrictions(namespaces=" ".join(f"n{n}" for n in range(MOST_NAMESPACES + 1))).encode(),
        Restrictions(namespaces=" ").encode(),
        Restrictions(verbs=" ").encode(),
        Restrictions(read_only=True, verbs=" ").encode(),
        Restrictions(verbs="get " * 16000).encode(),
        Restrictions(verbs="get get").encode(),
        Restrictions(namespaces="shop  web").encode(),
        Restrictions(namespaces="shop\u00a0web").encode(),
        Restrictions(namespaces="shop ").encode(),
        Restrictions(read_only=True).encode() + b"\x03\x00\x00\x00",
        b"\x01\x00\x00\x01\x02",
        Restrictions(read_only=True).encode() + b"\x06\x00\x00\x01\x01",
        b"\x01\x00\x00\x01",
        b"\x03\x00\x00\x01\xff",
    ],
)
def test_u6_what_is_not_understood_is_refused(encoded: bytes) -> None:
    """A newer client's restriction among them: to skip it would be to serve more than was asked for."""
    with pytest.raises(PermissionRefused) as caught:
        SessionRestrictions.read(encoded)
    assert caught.value.refusal.rule is RefusalRule.RESTRICTED_UNKNOWN


def test_a_record_is_read_as_it_was_written() -> None:
    record = Restrictions(True, True, "shop web", "get list", 2_000_000_000)
    found = SessionRestrictions.read(record.encode())
    assert found == SessionRestrictions(record)
    assert found != READ_ONLY
    assert found.words == ("read-only", "no-secrets", "namespaces=shop,web", "verbs=get,list", "until=2000000000")
    assert (found.judges, UNTIL.judges, found.until) == (True, False, 2e9)
    assert record.kinds() == ("read-only", "no-secrets", "namespaces", "verbs", "until")
    assert len(fields(Restrictions)) == len(record.kinds()), "each restriction has a word"


def test_logs_of_nodes_are_no_discovery() -> None:
    assert "logs" not in DISCOVERY


def test_an_agent_loads_nothing_of_this_before_a_session_is_restricted() -> None:
    code = "import sys, arcbridge.agent.service; print(*[name for name in sys.modules if '.restrictions' in name])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"
