"""What is read from documents of the API server, and which port of a pod is meant."""

from __future__ import annotations

from typing import Any

import pytest

from arcbridge.client.serving.pod_ports.target import parse_targets
from arcbridge.client.serving.pod_ports.workload import MAX_PORTS, NoSuchPort, Pod, Workload


def pod(name: str = "web-1", **changes: Any) -> dict[str, Any]:
    """A pod that is ready; `changes` are those of its status, but for `ending`."""
    metadata = {"name": name, "uid": f"uid-{name}", "creationTimestamp": "2026-11-29T08:00:00Z"}
    if changes.pop("ending", False):
        metadata["deletionTimestamp"] = "2026-11-29T09:00:00Z"
    ports = [{"name": "http", "containerPort": 8080}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}]
    status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}], **changes}
    return {"metadata": metadata, "spec": {"containers": [{"name": "main", "ports": ports}]}, "status": status}


def workload(kind: str, spec: dict[str, Any]) -> Workload:
    return Workload.of(parse_targets([f"{kind}/web", "80"], "shop")[0], {"metadata": {"name": "web"}, "spec": spec})


SERVICE = {
    "selector": {"app": "web", "a": "b"},
    "clusterIP": "10.0.0.1",
    "ports": [
        {"name": "web", "port": 80, "targetPort": "http"},
        {"name": "admin", "port": 81, "targetPort": 9000},
        {"name": "plain", "port": 82},
        {"name": "dns", "port": 53, "protocol": "UDP"},
    ],
}


def test_ports_of_a_service_are_those_of_its_pods() -> None:
    service, one = workload("svc", SERVICE), Pod.of(pod())
    assert service.selector == "a=b,app=web"
    asked = ("80", "web", "81", "admin", "82")
    assert [service.number(port) for port in asked] == [80, 80, 81, 81, 82]
    assert [service.port_of(port, one) for port in asked] == [8080, 8080, 9000, 9000, 82]
    headless = workload("svc", {**SERVICE, "clusterIP": "None"})
    assert headless.port_of("80", one) == 80, "as kubectl has it"
    for port in ("53", "dns", "8080", "nosuch"):
        with pytest.raises(NoSuchPort, match=r"it has 80 \(web\), 81 \(admin\), 82 \(plain\)"):
            service.number(port)
    with pytest.raises(NoSuchPort, match="pod web-1 has no TCP port 'http'; it names none"):
        service.port_of("80", Pod.of({**pod(), "spec": {}}))


def test_ports_of_pods_and_workloads() -> None:
    one = Pod.of(pod())
    itself = workload("pod", pod()["spec"])
    template = {"selector": {"matchLabels": {"app": "web"}}, "template": {"spec": pod()["spec"]}}
    for thing in (itself, workload("deploy", template)):
        assert (thing.number("http"), thing.number("5")) == (8080, 5)
        assert (thing.port_of("http", one), thing.port_of("5", one)) == (8080, 5)
        with pytest.raises(NoSuchPort):
            thing.number("dns")


def test_which_pods_are_behind_a_name() -> None:
    expressions = [
        {"key": "tier", "operator": "In", "values": ["a", "b"]},
        {"key": "env", "operator": "NotIn", "values": ["x"]},
        {"key": "has", "operator": "Exists"},
        {"key": "not", "operator": "DoesNotExist"},
    ]
    selector = {"matchLabels": {"app": "web"}, "matchExpressions": expressions}
    made = workload("sts", {"selector": selector})
    assert made.selector == "app=web,tier in (a,b),env notin (x),has,!not"
    assert not made.unready
    assert workload("svc", {**SERVICE, "publishNotReadyAddresses": True}).unready
    assert workload("pod", {}).unready
    with pytest.raises(NoSuchPort, match="selects no pods"):
        workload("svc", {"ports": [], "externalName": "example.org"})
    with pytest.raises(ValueError, match="everything"):
        workload("deploy", {"selector": {}})


def test_which_pods_may_serve() -> None:
    ready = Pod.of(pod())
    unready = Pod.of(pod(conditions=[{"type": "Ready", "status": "False"}]))
    assert ready.usable(unready=False)
    assert not unready.usable(unready=False)
    assert unready.usable(unready=True)
    for never in (pod(phase="Pending"), pod(ending=True), pod(phase="Failed"), pod(phase="Succeeded")):
        assert not Pod.of(never).usable(unready=True)
    assert Pod.of(pod(phase="Failed")).over
    assert not ready.over


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {"metadata": {}}, {"metadata": {"name": "a/b"}}, {"metadata": {"name": "a\r\nb"}}, {"metadata": 1},
     {"metadata": {"name": "a"}, "status": 1}, {"metadata": {"name": "a"}, "spec": {"containers": [1]}},
     {"metadata": {"name": "a"}, "status": {"conditions": [1]}},
     *({"metadata": {"name": "a"}, "spec": {"containers": [{"ports": [{"name": "x", "containerPort": port}]}]}}
       for port in ("y", "80", 0, -5, 70000, 80.5, float("inf"), None))],
)  # fmt: skip
def test_what_is_no_pod(document: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which one does not matter
        Pod.of(document)


@pytest.mark.parametrize("port", [70000, -5, 0, "80", float("inf"), None])
def test_a_service_whose_port_is_none(port: Any) -> None:
    with pytest.raises(ValueError, match="1 to 65535"):
        workload("svc", {**SERVICE, "ports": [{"name": "web", "port": port}]})


def test_what_is_kept_of_a_pod_is_bounded() -> None:
    long = Pod.of({"metadata": {"name": "a", "uid": "u" * 5000, "creationTimestamp": "2" * 5000}})
    assert len(long.uid) == len(long.created) == 64
    ports = [{"name": f"p{number}" * 100, "containerPort": number} for number in range(1, 10 * MAX_PORTS)]
    kept = Pod.of({**pod(), "spec": {"containers": [{"ports": ports}]}}).ports
    assert len(kept) <= MAX_PORTS
    assert all(len(name) < 64 for name in kept)
