"""What the body of a write to a pod asks for, in each form that a client sends."""

from __future__ import annotations

import hashlib
import json
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.agent.audit.record import MAX_LISTED, AuditRecord, AuditSubject
from arcbridge.agent.kube.pod_body import MAX_BODY, MAX_FIELDS, MAX_VALUES, Inspection, is_inspected, pod_details
from arcbridge.agent.kube.request_facts import RequestFacts, read_facts
from arcbridge.agent.kube.request_info import MAX_SEGMENT
from arcbridge.agent.kube.request_target import request_target
from arcbridge.wire.backlog import Backlog

SUBJECT = AuditSubject("s")

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
    assert is_inspected(request_target(method, target, False).info, method) is looked_at


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


@pytest.mark.parametrize("op", ["copy", "move"])
def test_a29_a_json_patch_that_copies_is_said_to_be_unparsed(op: str) -> None:
    """What it copies stands in the pod, and not in the body."""
    patch = [
        {"op": op, "from": "/metadata/annotations/x", "path": "/spec/ephemeralContainers"},
        {"op": "add", "path": "/spec/hostIPC", "value": True},
    ]
    found = details(patch, "application/json-patch+json")
    assert found == {"privileged": ["hostIPC"], "unparsed": f"a patch with {op}"}
    assert details(patch) == {}, "no patch"


@pytest.mark.parametrize("index", ["-1", "+2", "-0", "+00"])
@pytest.mark.parametrize("rest", ["", "/securityContext"])
def test_a29_an_index_that_rfc_6902_does_not_know_is_said_to_be_unparsed(index: str, rest: str) -> None:
    patch = [{"op": "add", "path": f"/spec/ephemeralContainers/{index}{rest}", "value": {"image": "x"}}]
    assert details(patch, "application/json-patch+json")["unparsed"] == "a patch with an index that has a sign"
    for plain in ("0", "12", "-", "a-1", "-a"):
        patch[0]["path"] = f"/spec/containers/{plain}{rest}"
        assert "unparsed" not in details(patch, "application/json-patch+json")


def test_a29_of_two_names_the_last_one_counts() -> None:
    body = b'{"name":"harmless","securityContext":{"privileged":true},"name":"strong"}'
    assert pod_details(body, "application/json", commands=True) == {"privileged": ["privileged strong"]}


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
        (b"[" * 5_000, "application/json", "json"),
        (b"[" * 10_000, "application/json", "too many values"),
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
    assert sorted(found["privileged"]) == sorted(PRIVILEGED)
    common = field(1, b"debugger-1") + field(2, b"busybox") + field(3, b"sh") + field(4, b"-c") + field(4, b"id")
    spec = field(34, field(1, common) + field(2, b"web"))
    assert pod_details(protobuf(spec), "application/vnd.kubernetes.protobuf", commands=True) == DEBUGGED
    assert pod_details(protobuf(b""), "application/vnd.kubernetes.protobuf", commands=True) == {}


HOST = {11: "hostNetwork", 12: "hostPID", 13: "hostIPC"}
PROTOBUF = "application/vnd.kubernetes.protobuf"


def go_varint(data: bytes, position: int) -> tuple[int, int]:
    """As k8s.io/api `generated.pb.go` reads one: up to ten bytes, and bits above the 64th are dropped."""
    number = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & (1 << 64) - 1, position
    raise ValueError("ErrIntOverflowGenerated")


def as_the_api_server(spec: bytes) -> set[str]:
    """Return which namespaces of the host a PodSpec of plain numbers has, as `PodSpec.Unmarshal` reads it. Raises
    ValueError or IndexError where that refuses it."""
    found, position = dict.fromkeys(HOST, False), 0
    while position < len(spec):
        wire, position = go_varint(spec, position)
        number = (wire >> 3) & 0xFFFFFFFF  # int32(wire >> 3)
        if wire & 7 or not 0 < number < 1 << 31:
            raise ValueError("illegal tag")
        value, position = go_varint(spec, position)
        if number in found:
            found[number] = value != 0
    return {HOST[number] for number, value in found.items() if value}


def judge(spec: bytes) -> None:
    """What is recorded is all that the API server sees, or it is said to be unparsed."""
    try:
        seen = as_the_api_server(spec)
    except (ValueError, IndexError):
        return
    found: dict[str, Any] = dict(pod_details(protobuf(spec), PROTOBUF, commands=True))
    assert "unparsed" in found or seen <= set(found.get("privileged", ())), (spec.hex(), found)


def padded(number: int, size: int) -> bytes:
    """A number in protobuf with so many bytes more than it needs."""
    out = varint(number)
    return bytes([*(byte | 0x80 for byte in out), *[0x80] * (size - 1), 0]) if size else bytes(out)


TAG = 11 << 3
ODD = {
    "a number of 32 bits more": (bytes(varint(TAG + (1 << 35))) + b"\1", False),
    "the largest tag": (bytes(varint(TAG + (0xFFFFFFF << 35))) + b"\1", False),
    "a bit that Go drops": (bytes([TAG | 0x80, *[0x80] * 8, 2]) + b"\1", False),
    "a tag with a byte more": (padded(TAG, 1) + b"\1", False),
    "a value with a byte more": (bytes(varint(TAG)) + b"\x81\0", False),
    "a value that is two": (bytes(varint(TAG)) + b"\2", True),
    "a value of 64 bits": (bytes(varint(TAG)) + b"\xff" * 9 + b"\1", True),
}


@pytest.mark.parametrize("odd", ODD)
def test_a29_odd_protobuf_is_read_as_the_api_server_does_or_unparsed(odd: str) -> None:
    spec, read = ODD[odd]
    assert as_the_api_server(spec) == {"hostNetwork"}
    judge(spec)
    expected = {"privileged": ["hostNetwork"]} if read else {"unparsed": "vnd.kubernetes.protobuf"}
    assert pod_details(protobuf(spec), PROTOBUF, commands=True) == expected


NUMBERS = st.sampled_from([*HOST, 1, 7]).flatmap(
    lambda number: st.sampled_from([number << 3, (number << 3) + (1 << 35), (number << 3) + (1 << 63)])
)


@given(st.lists(st.tuples(NUMBERS, st.integers(0, 3), st.integers(0, 1 << 64), st.integers(0, 3)), max_size=4))
def test_a29_any_numbers_are_read_as_the_api_server_does_or_unparsed(fields: list[tuple[int, int, int, int]]) -> None:
    judge(b"".join(padded(tag, more) + padded(value, longer) for tag, more, value, longer in fields))


@given(st.binary(max_size=200))
def test_any_bytes_end_in_words(data: bytes) -> None:
    for body in (data, b"k8s\x00" + data, protobuf(data)):
        assert isinstance(pod_details(body, "application/vnd.kubernetes.protobuf", commands=True), dict)


# -- what it costs --------------------------------------------------------------------------------------------------

MOST_CALLS = 160_000
TOO_MANY = {"unparsed": "too many values"}
MOST_PER_BYTE = 64
"""Bytes of memory for each byte of a body: what Python's objects for `{}` and for an empty message take."""


def filled(begin: str, piece: str, end: str) -> bytes:
    """Return a body of the largest length, or of the most values, that is looked at."""
    values = sum(map((piece + ",").count, ",[{/"))
    count = min((MAX_BODY - len(begin) - len(end)) // (len(piece) + 1), (MAX_VALUES - 10) // values)
    return (begin + ",".join([piece] * count) + end).encode()


NAME = "n" * (MAX_BODY // 2)
BODIES = {
    "one name and many capabilities": filled(f'{{"name":"{NAME}","capabilities":{{"add":[', '"a"', "]}}"),
    "one name and many that are privileged": filled(f'{{"name":"{NAME}","x":[', '{"privileged":true}', "]}"),
    "paths": filled('{"x":[', '{"hostPath":{"path":"' + "p" * 300 + '"}}', "]}"), "lists": filled("[", "[]", "]"),
    "objects": filled("[", "{}", "]"), "objects with a field": filled("[", '{"a":0}', "]"),
    "pairs": filled("{", '"a":0', "}"), "texts": filled("[", '"\\u1234\\u1234"', "]"),
    "ephemeral containers": filled('{"ephemeralContainers":[', '{"name":"a","command":["a"]}', "]}"),
}  # fmt: skip
PATCHES = {
    "a path": json.dumps([{"op": "add", "path": "/a" * (MAX_BODY // 2 - 30), "value": True}]).encode(),
    "operations": filled("[", '{"path":"/a/a/a/a/a","value":0}', "]"),
}
MESSAGES = {
    "containers": (2, b"", b""),
    "names": (2, b"\x0a\x03abc", b""),
    "volumes": (1, b"\x12\x02\x0a\x00", b""),
    "capabilities": (2, b"\x7a\x07\x0a\x05\x0a\x03abc", b""),
    "one name and many capabilities": (
        2, b"\x7a\x05\x0a\x03\x0a\x01a", b"\x0a\x80\x80\x04" + b"n" * (MAX_BODY // 2)
    ),
}  # fmt: skip


def peak(body: bytes, content_type: str) -> int:
    """Return the bytes that are allocated at once while a body is read and its record written."""
    assert len(body) <= MAX_BODY
    pod_details(b"{}", content_type, commands=True)
    tracemalloc.start()
    try:
        found = pod_details(body, content_type, commands=True)
        AuditRecord("r", SUBJECT, details=found).details_line()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", BODIES)
def test_h21_what_json_takes(shape: str) -> None:
    """One name of 64 KiB and 16 000 capabilities took 1 GiB."""
    assert peak(BODIES[shape], "application/json") < MOST_PER_BYTE * MAX_BODY


@pytest.mark.parametrize("shape", PATCHES)
def test_h21_what_a_json_patch_takes(shape: str) -> None:
    assert peak(PATCHES[shape], "application/json-patch+json") < MOST_PER_BYTE * MAX_BODY


@pytest.mark.parametrize("shape", MESSAGES)
def test_h21_what_protobuf_takes(shape: str) -> None:
    assert peak(message(shape), "application/vnd.kubernetes.protobuf") < MOST_PER_BYTE * MAX_BODY


def calls(body: bytes, content_type: str) -> int:
    """Return how many functions, Python's own too, are called and left while a body is read."""
    pod_details(b"{}", content_type, commands=True)
    count = 0

    def count_one(*_: object) -> None:
        nonlocal count
        count += 1

    before = sys.getprofile()
    sys.setprofile(count_one)
    try:
        pod_details(body, content_type, commands=True)
    finally:
        sys.setprofile(before)
    return count


def message(shape: str) -> bytes:
    number, piece, rest = MESSAGES[shape]
    room = MAX_BODY - len(rest) - 64
    if rest:  # one container with the name, whose security context stands there again and again
        spec = field(number, rest + piece * (room // len(piece)))
    else:
        spec = field(number, piece) * (room // len(field(number, piece)))
    return protobuf(spec)


@pytest.mark.parametrize("shape", [*BODIES, *PATCHES, *MESSAGES])
def test_m21_one_body_does_not_hold_the_event_loop(shape: str) -> None:
    """Bodies of 128 KiB in the worst shapes took up to 2 751 341 calls, and 50 to 700 ms."""
    if shape in MESSAGES:
        assert calls(message(shape), "application/vnd.kubernetes.protobuf") < MOST_CALLS
        return
    content_type = "application/json" if shape in BODIES else "application/json-patch+json"
    body = BODIES[shape] if shape in BODIES else PATCHES[shape]
    assert shape == "a path" or "unparsed" not in pod_details(body, content_type, commands=True), "all of it is read"
    assert calls(body, content_type) < MOST_CALLS


def test_m21_a_body_of_too_many_values_is_not_read() -> None:
    assert pod_details(b"[" + b"{}," * MAX_VALUES + b"{}]", "application/json", commands=True) == TOO_MANY
    patch = json.dumps([{"path": "/a" * MAX_VALUES, "value": 0}]).encode()
    assert pod_details(patch, "application/json-patch+json", commands=True) == TOO_MANY
    assert pod_details(patch, "application/json", commands=True) == {}, "a slash is no value elsewhere"
    for count, found in ((MAX_FIELDS - 20, {}), (MAX_FIELDS, TOO_MANY)):
        body = protobuf(field(1, b"") * count)
        assert pod_details(body, "application/vnd.kubernetes.protobuf", commands=True) == found


def test_h21_deep_bodies_end_in_words() -> None:
    """A path that is an object again, three hundred deep, raised where its text was made."""
    for part in ('{"hostPath":{"path":', '{"capabilities":{"add":', '{"ephemeralContainers":[', '{"name":', "["):
        closing = "".join({"{": "}", "[": "]"}[one] for one in reversed(part) if one in "{[")
        for depth in (100, 300, 10_000):
            body = part * depth + "0" + closing * depth
            assert isinstance(pod_details(body.encode(), "application/json", commands=True), dict)


def test_h21_what_is_left_out_is_counted() -> None:
    added = [f"C{number}" for number in range(200)]
    found = details({"name": "n" * 1000, "capabilities": {"add": [*added, *added[:10]]}})["privileged"]
    assert len(found) == MAX_LISTED
    assert (found[0], found.more) == (f"capability C0 {'n' * (MAX_SEGMENT - 1)}…", 200 - MAX_LISTED)
    written = json.loads(AuditRecord("r", SUBJECT, details={"privileged": found}).details_line())
    kept = len(written["privileged"])
    assert written["more"] == {"privileged": f"{kept} cut, {200 - kept} left out"}
    assert "sha256" not in written, "that of the body is given with it"
    several = {"ephemeralContainers": [{"name": f"c{n}", "image": "i" * 1000, "command": ["a"]} for n in range(100)]}
    found = details(several)
    assert {key: (len(found[key]), found[key].more) for key in ("ephemeral_containers", "images")} == {
        key: (MAX_LISTED, 100 - MAX_LISTED) for key in ("ephemeral_containers", "images")
    }
    assert (found["command"], found["more"]) == (["a"] * MAX_LISTED, {"command": f"{100 - MAX_LISTED} left out"})
    assert found["sha256"] == {"body": hashlib.sha256(json.dumps(several).encode()).hexdigest()}
    assert found["images"][0] == "i" * (MAX_SEGMENT - 1) + "…"


@pytest.mark.parametrize(("name", "count"), [("é" * 200, 9), ("\x01" * 251, 3), ("😀" * 250, 4), ("a" * 100, 30)])
def test_a32_what_a_record_cuts_by_bytes_has_the_hash_of_the_body(name: str, count: int) -> None:
    """None of the names has more than 253 characters."""
    names = [f"{name}{number}" for number in range(count)]
    body = json.dumps([{"name": one, "securityContext": {"privileged": True}} for one in names]).encode()
    found = pod_details(body, "application/json", commands=True)
    line = json.loads(AuditRecord("r", SUBJECT, details=found).details_line())
    assert line["more"].keys() == {"privileged"}
    assert line["sha256"] == {"body": hashlib.sha256(body).hexdigest()}


# -- as a body passes -----------------------------------------------------------------------------------------------


async def seen(*chunks: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []

    async def found(details: dict[str, Any]) -> None:
        told.append(details)

    held = Backlog(10**9)
    inspection = Inspection(
        read_facts("POST", "/", [(b"Content-Type", b"application/json"), *headers]), found, held, commands=True
    )
    for chunk in chunks:
        inspection.feed(chunk)
    await inspection.complete()
    assert held.held == 0
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

    process = Backlog(10**9)
    alice, bob = Backlog(3 * MAX_BODY, process), Backlog(3 * MAX_BODY, process)
    held = [Inspection(RequestFacts("POST", "/"), found, alice, commands=True) for _ in range(3)]
    for one in held:
        one.feed(b"x" * MAX_BODY)
    last, other = (
        Inspection(RequestFacts("POST", "/"), found, alice, commands=True),
        Inspection(RequestFacts("POST", "/"), found, bob, commands=True),
    )
    last.feed(b"x")
    other.feed(b"x")
    assert (alice.held, bob.held, process.held) == (3 * MAX_BODY, 1, 3 * MAX_BODY + 1), "each user has an account"
    for one in (*held, last, other):
        one.release()
        one.release()
    assert alice.held == bob.held == process.held == 0
