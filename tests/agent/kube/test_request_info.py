"""How a request reads to the API server."""

from __future__ import annotations

from urllib.parse import urlencode

import pytest

from arcbridge.agent.kube.request_info import RequestInfo, is_true, query_values, request_info

TABLE = [
    ("GET", "/api/v1/pods", RequestInfo("list", "", "v1", "pods")),
    ("GET", "/api/v1/pods?watch=true", RequestInfo("watch", "", "v1", "pods")),
    ("GET", "/api/v1/pods?watch=1&limit=5", RequestInfo("watch", "", "v1", "pods")),
    ("GET", "/api/v1/pods?watch", RequestInfo("watch", "", "v1", "pods")),
    ("GET", "/api/v1/pods?watch=false", RequestInfo("list", "", "v1", "pods")),
    ("GET", "/api/v1/pods?w%61tch=tru%65", RequestInfo("watch", "", "v1", "pods")),
    ("GET", "/api/v1/pods?watch=0&watch=1", RequestInfo("list", "", "v1", "pods")),
    ("GET", "/api/v1/pods?a;b&watch=1;c&xwatch=1", RequestInfo("list", "", "v1", "pods")),
    ("GET", "/api/v1/pods?watch=yes", RequestInfo("watch", "", "v1", "pods")),
    ("GET", "/api/v1/pods?watch=2", RequestInfo("watch", "", "v1", "pods")),
    ("GET", "/api/v1/pods?watch=%zz&watch=0", RequestInfo("list", "", "v1", "pods")),
    ("GET", "/api/v1/pods?watch=FALSE", RequestInfo("list", "", "v1", "pods")),
    ("HEAD", "/api/v1/namespaces/a/pods/b", RequestInfo("get", "", "v1", "pods", "", "a", "b")),
    ("GET", "/api/v1/namespaces/a/pods/b/log", RequestInfo("get", "", "v1", "pods", "log", "a", "b")),
    ("POST", "/api/v1/namespaces/a/pods", RequestInfo("create", "", "v1", "pods", "", "a")),
    (
        "PUT",
        "/apis/apps/v1/namespaces/a/deployments/b/scale",
        RequestInfo("update", "apps", "v1", "deployments", "scale", "a", "b"),
    ),
    (
        "PATCH",
        "/apis/apps/v1/namespaces/a/deployments/b",
        RequestInfo("patch", "apps", "v1", "deployments", "", "a", "b"),
    ),
    (
        "DELETE",
        "/apis/apps/v1/namespaces/a/deployments/b",
        RequestInfo("delete", "apps", "v1", "deployments", "", "a", "b"),
    ),
    ("DELETE", "/api/v1/namespaces/a/pods", RequestInfo("deletecollection", "", "v1", "pods", "", "a")),
    ("GET", "/api/v1/namespaces", RequestInfo("list", "", "v1", "namespaces")),
    ("GET", "/api/v1/namespaces/a", RequestInfo("get", "", "v1", "namespaces", "", "a", "a")),
    ("PUT", "/api/v1/namespaces/a/finalize", RequestInfo("update", "", "v1", "namespaces", "finalize", "a", "a")),
    ("GET", "/api/v1/watch/pods", RequestInfo("watch", "", "v1", "pods")),
    ("GET", "/api/v1/pods%2Fx", RequestInfo("get", "", "v1", "pods", "", "", "x", altered=True)),
    ("GET", "//api/v1//pods/", RequestInfo("list", "", "v1", "pods", altered=True)),
    ("GET", "/api/v1/namespaces/a/pods/b%3Ac", RequestInfo("get", "", "v1", "pods", "", "a", "b:c")),
    ("GET", "/", RequestInfo("get", path_class="root")),
    ("GET", "/api", RequestInfo("get", path_class="api")),
    ("GET", "/apis/apps/v1", RequestInfo("get", path_class="apis")),
    ("GET", "/healthz/ping", RequestInfo("get", path_class="healthz")),
    ("GET", "/openapi/v3/x", RequestInfo("get", path_class="openapi")),
    ("GET", "/anything/else", RequestInfo("get", path_class="other")),
    ("POST", "/api", RequestInfo("post", path_class="api")),
]


@pytest.mark.parametrize(("method", "target", "info"), TABLE, ids=[f"{m} {t}" for m, t, _ in TABLE])
def test_table(method: str, target: str, info: RequestInfo) -> None:
    assert request_info(method, target) == info


def test_a_get_that_upgrades_is_create_in_spirit() -> None:
    assert request_info("GET", "/api/v1/namespaces/a/pods/b/exec", upgrade=True).verb == "create"
    assert request_info("POST", "/api/v1/namespaces/a/pods/b/exec", upgrade=True).verb == "create"
    for behind in ("log", "status", "proxy/a", ""):
        assert request_info("GET", f"/api/v1/namespaces/a/pods/b/{behind}", upgrade=True).verb == "get"


@pytest.mark.parametrize("fields", [1000, 1001, 30_000])
def test_l35_any_number_of_query_fields_is_read(fields: int) -> None:
    query = "&".join(["x=1"] * (fields - 1))
    assert request_info("GET", f"/api/v1/pods?{query}&watch=1").verb == "watch"
    assert request_info("GET", f"/api/v1/pods?{query}&y=1").verb == "list"


@pytest.mark.parametrize(("query", "values"), [
    ("a=1&a=2&b=3", ["1", "2"]), ("a", [""]), ("a=&xa=1&a%3D=2", [""]), ("%61=x+y%20z", ["x y z"]),
    ("a=1;a=2&a=%zz&a=3", ["3"]), ("a=b=c", ["b=c"]), ("A=1", []), ("a=%ff", ["\udcff"]), ("", []),
])  # fmt: skip
def test_values(query: str, values: list[str]) -> None:
    assert query_values(query, "a") == values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # What `Convert_Slice_string_To_bool` of k8s.io/apimachinery makes of them.
        ([], False),
        (["true"], True),
        (["TRUE"], True),
        (["false"], False),
        (["FALSE"], False),
        (["fal\u017fe"], False),
        (["0"], False),
        (["1"], True),
        ([""], True),
        (["x"], True),
        (["00"], True),
        ([" false"], True),
        (["no"], True),
        (["off"], True),
        (["true", "false"], True),
        (["false", "true"], False),
    ],
)
def test_a30_true_is_whatever_is_not_false(values: list[str], expected: bool) -> None:
    assert is_true(urlencode([("a", value) for value in values]), "a") is expected
