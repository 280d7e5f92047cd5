"""What the body of a write to a pod asks for, in each form that a client sends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.agent.kube.asked import asked
from arcbridge.agent.kube.pod_body import MAX_BODY, MAX_HELD, Inspection, is_inspected, pod_details

POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "p", "labels": {"privileged": "true"}},
    "spec": {
        "hostPID": True,
        "hostNetwork": False,
        "volumes": [{"name": "root", "hostPath": {"path": "/"}}, {"name": "e", "emptyDir": {}}],
        "initContainers": [
            {"name": "init", "securityContext": {"capabilities": {"add": ["SYS_ADMIN"], "drop": ["X"]}}}
        ],
        "containers": [
            {"name": "plain", "image": "i", "command": ["a"]},
            {"securityContext": {"privileged": True}, "name": "strong"},
        ],
    },
}
PRIVILEGED = ["hostPID", "hostPath /", "capability SYS_ADMIN init", "privileged strong"]
DEBUG = {
    "spec": {
        "ephemeralContainers": [
            {
                "name": "debugger-1",
                "image": "busybox",
                "command": ["sh"],
                "args": ["-c", "id"],
                "targetContainerName": "web",
            }
        ]
    }
}
DEBUGGED = {
    "ephemeral_containers": ["debugger-1"],
    "images": ["busybox"],
    "target_containers": ["web"],
    "command": ["sh", "-c", "id"],
}


def details(document: object, content_type: str = "application/json", *, commands: bool = True) -> dict[str, Any]:
    return dict(pod_details(json.dumps(document).encode(), content_type, commands=commands))


@pytest.mark.parametrize(
    ("method", "target", "looked_at"),
    [
        ("POST", "/api/v1/namespaces/n/pods", True),
        ("PUT", "/api/v1/namespaces/n/pods/p", True),
        ("PATCH", "/api/v1/namespaces/n/pods/p", True),
        ("PATCH", "/api/v1/namespaces/n/pods/p/ephemeralcontainers", True),
        ("PUT", "/api/v1/namespaces/n/pods/p/ephemeralcontainers", True),
        ("POST", "/api/v1/namespaces/n/pods/p/eviction", False),
        ("PATCH", "/api/v1/namespaces/n/pods/p/status", False),
        ("DELETE", "/api/v1/namespaces/n/pods/p", False),
        ("POST", "/api/v1/namespaces/n/secrets", False),
        ("POST", "/apis/example.com/v1/namespaces/n/pods", False),
    ],
)
def test_which_bodies_are_looked_at(method: str, target: str, looked_at: bool) -> None:
    assert is_inspected(asked(method, target, False).info, method) is looked_at


def test_a16_privileges() -> None:
    found = details(POD)
    assert set(found) == {"privileged"}
    assert sorted(found["privileged"]) == sorted(PRIVILEGED)
    plain = {"spec": {"containers": [{"name": "c", "securityContext": {"privileged": False}}]}}
    assert details(plain) == {}


def test_a16_ephemeral_containers() -> None:
    assert details(DEBUG, "application/strategic-merge-patch+json") == DEBUGGED
    without = {key: value for key, value in DEBUGGED.items() if key != "command"}
    without["more"] = {"command": "3 left out by audit.commands"}
    assert details(DEBUG, commands=False) == without


def test_a16_a_json_patch() -> None:
    patch = [
        {"op": "add", "path": "/spec/ephemeralContainers/-", "value": DEBUG["spec"]["ephemeralContainers"][0]},
        {"op": "replace", "path": "/spec/containers/0/securityContext/privileged", "value": True},
        {"op": "add", "path": "/spec/hostIPC", "value": True},
        {"op": "remove", "path": "/spec/x"},
    ]
    assert details(patch, "application/json-patch+json") == {**DEBUGGED, "privileged": ["privileged", "hostIPC"]}


def test_a16_a_key_that_stands_there_twice_hides_nothing() -> None:
    """Go merges both values; the last one alone is what Python's reader keeps."""
    body = b'{"spec":{"containers":[{"name":"c","securityContext":{"privileged":true},"securityContext":{}}]}}'
    assert pod_details(body, "application/json", commands=True) == {"privileged": ["privileged c"]}


@pytest.mark.parametrize(
    ("body", "content_type", "why"),
    [
        (b"spec:\n  hostPID: true\n", "application/apply-patch+yaml", "apply-patch+yaml"),
        (b"\xd9\xd9\xf7\xa1", "application/cbor", "cbor"),
        (b"", "", "malformed"),
        (b"[" * 100_000, "application/json", "json"),
        (b"k8s\x00\x12\xff", "application/vnd.kubernetes.protobuf", "vnd.kubernetes.protobuf"),
        (b"\xff\xfe", "application/json", "json"),
    ],
)
def test_a16_what_cannot_be_read_is_said_to_be_unparsed(body: bytes, content_type: str, why: str) -> None:
    assert pod_details(body, content_type, commands=True) == {"unparsed": why}


# -- Kubernetes' protobuf -------------------------------------------------------------------------------------------


def field(number: int, value: bytes | bool) -> bytes:
    if isinstance(value, bool):
        return bytes(varint(number << 3)) + bytes([value])
    return bytes(varint(number << 3 | 2)) + bytes(varint(len(value))) + value


def varint(number: int) -> list[int]:
    out = []
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return [*out, number]


def protobuf(spec: bytes) -> bytes:
    meta = field(1, b"v1") + field(2, b"Pod")
    return (
        b"k8s\x00"
        + field(1, meta)
        + field(2, field(1, field(1, b"p")) + field(2, spec))
        + field(3, b"")
        + field(4, b"")
    )


def test_a16_protobuf() -> None:
    strong = field(1, b"strong") + field(15, field(2, True))
    init = field(1, b"init") + field(15, field(1, field(1, b"SYS_ADMIN")))
    volume = field(1, b"root") + field(2, field(1, field(1, b"/")))
    spec = field(1, volume) + field(2, field(1, b"plain")) + field(2, strong) + field(12, True) + field(20, init)
    found = pod_details(protobuf(spec), "application/vnd.kubernetes.protobuf", commands=True)
    assert sorted(found["privileged"]) == sorted(PRIVILEGED)  # type: ignore[arg-type]
    common = field(1, b"debugger-1") + field(2, b"busybox") + field(3, b"sh") + field(4, b"-c") + field(4, b"id")
    spec = field(34, field(1, common) + field(2, b"web"))
    assert pod_details(protobuf(spec), "application/vnd.kubernetes.protobuf", commands=True) == DEBUGGED
    assert pod_details(protobuf(b""), "application/vnd.kubernetes.protobuf", commands=True) == {}


@given(st.binary(max_size=200))
def test_any_bytes_end_in_words(data: bytes) -> None:
    for body in (data, b"k8s\x00" + data, protobuf(data)):
        assert isinstance(pod_details(body, "application/vnd.kubernetes.protobuf", commands=True), dict)


# -- as a body passes -----------------------------------------------------------------------------------------------


async def seen(*chunks: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []

    async def found(details: dict[str, Any]) -> None:
        told.append(details)

    inspection = Inspection([(b"Content-Type", b"application/json"), *headers], found, commands=True)
    for chunk in chunks:
        inspection.feed(chunk)
    await inspection.complete()
    assert Inspection.held == 0
    return told


async def test_a_body_in_pieces() -> None:
    body = json.dumps(DEBUG).encode()
    assert await seen(*[body[n : n + 7] for n in range(0, len(body), 7)]) == [DEBUGGED]
    assert await seen(b'{"spec":{}}') == []


async def test_bodies_are_held_up_to_a_bound() -> None:
    assert await seen(b"x" * MAX_BODY, b"x", b"x" * MAX_BODY) == [{"unparsed": "too long"}]
    assert await seen(b"{}", headers=((b"Content-Encoding", b"gzip"),)) == [{"unparsed": "encoded"}]

    async def found(_: object) -> None:
        return

    held = [Inspection([], found, commands=True) for _ in range(MAX_HELD // MAX_BODY)]
    for one in held:
        one.feed(b"x" * MAX_BODY)
    assert Inspection.held == MAX_HELD
    last = Inspection([], found, commands=True)
    last.feed(b"x")
    assert Inspection.held == MAX_HELD
    for one in (*held, last):
        one.release()
        one.release()
    assert Inspection.held == 0
