"""Real kubectl, every version this machine has, through three processes to a real API server.

What it answers is compared with what it answers straight to the API server.
"""

from __future__ import annotations

import json
import re
import secrets

import pytest

from tests.support.cluster import Cluster, Kubectl
from tests.support.reports import audited, until
from tests.support.world import World

CONFIGMAP = """
apiVersion: v1
kind: ConfigMap
metadata:
  name: {name}
  namespace: default
data:
  key: {value}
"""


@pytest.mark.parametrize(
    "args",
    [
        ("get", "namespaces", "-o", "name"),
        ("get", "--raw", "/version"),
        ("get", "clusterroles", "-o", "yaml"),
        ("get", "pods", "-A", "-o", "wide", "--show-kind"),
        ("api-resources", "--sort-by=name"),
        ("explain", "pod.spec.containers"),
        ("get", "pod", "no-such-pod"),
        ("get", "nonsense"),
        ("auth", "can-i", "delete", "pods"),
        ("create", "namespace", "default"),
    ],
    ids=lambda args: " ".join(args),
)
def test_answers_are_those_of_the_api_server(kubectl: Kubectl, direct: Kubectl, args: tuple[str, ...]) -> None:
    def answer(of: Kubectl) -> tuple[int, str, str]:
        done = of.run(*args, check=False)
        return done.returncode, done.stdout, done.stderr

    def between() -> list[tuple[int, str, str]]:
        """Ours, and the API server's, which did not change meanwhile: a column AGE does."""
        before, through = answer(direct), answer(kubectl)
        return [through, before] if answer(direct) == before else []

    through, straight = until(between, "the API server answers the same twice")
    assert through == straight


def test_the_api_server_sees_the_person(kubectl: Kubectl) -> None:
    answer = json.loads(kubectl.run("auth", "whoami", "-o", "json").stdout)["status"]["userInfo"]
    assert answer["username"] == "alice@example.com"
    assert answer["groups"] == ["platform", "system:authenticated"]


def test_apply_patch_label_and_delete(kubectl: Kubectl, direct: Kubectl, kubectl_version: str) -> None:
    name = "written-" + re.sub(r"[^a-z0-9]", "-", kubectl_version)
    kubectl.run("apply", "-f", "-", input=CONFIGMAP.format(name=name, value="one"))
    kubectl.run(
        "apply", "--server-side", "--force-conflicts", "-f", "-", input=CONFIGMAP.format(name=name, value="two")
    )
    assert direct.run("get", "configmap", name, "-o", "jsonpath={.data.key}").stdout == "two"
    kubectl.run("patch", "configmap", name, "--type=merge", "-p", '{"data":{"key":"three"}}')
    kubectl.run("label", "configmap", name, "seen=yes")
    found = json.loads(direct.run("get", "configmap", name, "-o", "json").stdout)
    assert found["data"] == {"key": "three"}
    assert found["metadata"]["labels"] == {"seen": "yes"}
    kubectl.run("delete", "configmap", name)
    assert direct.run("get", "configmap", name, check=False).returncode == 1


def test_large_objects_pass_whole(kubectl: Kubectl, direct: Kubectl, kubectl_version: str) -> None:
    name = "large-" + re.sub(r"[^a-z0-9]", "-", kubectl_version)
    value = "".join(chr(97 + index % 26) for index in range(900_000))
    kubectl.run("create", "-f", "-", input=CONFIGMAP.format(name=name, value=value))
    try:
        assert kubectl.run("get", "configmap", name, "-o", "jsonpath={.data.key}").stdout == value
        assert direct.run("get", "configmap", name, "-o", "jsonpath={.data.key}").stdout == value
    finally:
        direct.run("delete", "configmap", name)


def test_watch_shows_events_as_they_happen(kubectl: Kubectl, direct: Kubectl, kubectl_version: str) -> None:
    name = "watched-" + re.sub(r"[^a-z0-9]", "-", kubectl_version)
    direct.run("create", "configmap", f"{name}-first", "--from-literal=a=b")
    with kubectl.start("get", "configmaps", "--watch", "-o", "name") as watch:
        watch.wait_for_line(f"configmap/{name}-first", timeout=20)
        direct.run("create", "configmap", f"{name}-second", "--from-literal=a=b")
        watch.wait_for_line(f"configmap/{name}-second", timeout=20)
        assert watch.running
    direct.run("delete", "configmap", f"{name}-first", f"{name}-second")


def test_as_another_user_is_judged_by_the_api_server(world: World, cluster: Cluster, kubectl: Kubectl) -> None:
    """alice is cluster-admin, who may impersonate; the review says so, and the server sees the other user."""
    answer = json.loads(
        kubectl.run("auth", "whoami", "-o", "json", "--as", "carol@example.com", "--as-group", "guests").stdout
    )["status"]["userInfo"]
    assert answer["username"] == "carol@example.com"
    assert answer["groups"] == ["guests", "system:authenticated"]
    assert answer["extra"]["arcbridge.io/original-user"] == ["alice@example.com"]


def test_audit_has_one_record_per_request(world: World, kubectl: Kubectl, cluster: Cluster) -> None:
    name, after = (f"{word}-{secrets.token_hex(4)}" for word in ("recorded", "recorded-after"))
    for one in (name, after):
        kubectl.run("get", "--raw", f"/api/v1/namespaces/default/configmaps/{one}", check=False)
    audited(world, "the second request", name=after)  # whatever there is of the first one stands before it
    (record,) = [one for one in world.audit_records() if one.get("name") == name]
    assert record["resource"] == "configmaps"
    assert record["user"] == "alice@example.com"
    assert record["verb"] == "get"
    assert record["namespace"] == "default"
    # The same request id in the API server's own audit log: one id from end to end.
    until(
        lambda: record["request"] in {event["auditID"] for event in cluster.audit_events()},
        "the API server has recorded it",
    )
