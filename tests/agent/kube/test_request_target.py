"""What a target asks for: what is recorded before it leaves, and the fields of exec, attach and port-forward."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arcbridge.agent.audit.record import AuditRecord, AuditSubject
from arcbridge.agent.kube.request_info import MAX_SEGMENT
from arcbridge.agent.kube.request_target import query_details, request_target
from arcbridge.agent.kube.status import RequestRefusal

SUBJECT = AuditSubject("s")

POD = "/api/v1/namespaces/n/pods/p"


@pytest.mark.parametrize(
    ("method", "target", "upgrade", "begins"),
    [
        ("GET", POD, False, False),
        ("GET", "/api/v1/pods", False, False),
        ("HEAD", POD, False, False),
        ("OPTIONS", "/", False, False),
        ("GET", "/api/v1/pods?watch=1", False, True),
        ("GET", "/api/v1/pods?limit=500&watch=true&x=y", False, True),
        ("GET", "/api/v1/pods?watch=false", False, False),
        ("GET", "/api/v1/watch/pods", False, True),
        ("GET", f"{POD}/log?follow=true", False, True),
        ("GET", f"{POD}/log?follow=false", False, False),
        ("GET", f"{POD}/log?follow=yes", False, True),
        ("GET", f"{POD}/log?follow=0&follow=1", False, False),
        ("GET", "/api/v1/pods?watch=on", False, True),
        ("GET", f"{POD}/log", False, False),
        ("GET", f"{POD}/exec?command=sh", True, True),
        ("POST", f"{POD}/exec?command=sh", True, True),
        ("GET", f"{POD}/attach", True, True),
        ("POST", f"{POD}/portforward", True, True),
        ("GET", f"{POD}/proxy/index.html", False, True),
        ("POST", "/api/v1/namespaces/n/pods", False, True),
        ("PUT", POD, False, True),
        ("PATCH", POD, False, True),
        ("DELETE", POD, False, True),
        ("DELETE", "/api/v1/namespaces/n/pods", False, True),
        ("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", False, True),
    ],
)
def test_a12_what_is_recorded_before_it_leaves(method: str, target: str, upgrade: bool, begins: bool) -> None:
    found = request_target(method, target, upgrade)
    assert found.begins is begins
    assert request_target(method, target, upgrade) is found, "it is remembered"
    long = f"{target}{'&' if '?' in target else '?'}labelSelector={'x' * 600}"
    assert request_target(method, long, upgrade).begins is begins


def details(target: str, *, commands: bool = True) -> object:
    return query_details(request_target("GET", target, True).info, target, commands=commands)


def test_a16_exec_and_attach() -> None:
    target = f"{POD}/exec?command=sh&command=-c&command=echo+a%20b&container=web&stdin=true&stdout=true&tty=1&tty=0"
    assert details(target) == {"container": "web", "command": ["sh", "-c", "echo a b"], "stdin": True, "tty": True}
    assert details(target, commands=False) == {
        "container": "web", "stdin": True, "tty": True, "more": {"command": "3 left out by audit.commands"},
    }  # fmt: skip
    assert details(f"{POD}/exec?comm%61nd=id&stdin=false") == {"command": ["id"]}
    assert details(f"{POD}/exec?command=a;command=b&command=c&command=%zz") == {"command": ["c"]}
    assert details(f"{POD}/exec?%2563ommand=x&command&xcommand=y&command%3Dz=1&command=a=b") == {"command": ["", "a=b"]}
    assert details(f"{POD}/attach?container=c&tty=true&stdin=1") == {"container": "c", "stdin": True, "tty": True}
    assert details(f"{POD}/attach") is None


@pytest.mark.parametrize("decoys", [1, 64, 1000])
def test_a31_a_field_that_is_not_read_where_it_goes_is_no_word_of_a_command(decoys: int) -> None:
    """The API server knows no `cmd` and no `input` of exec, and the kubelet's exec no `cmd` and no `stdin`."""
    for path, field, decoy, stdin, no_stdin in (
        (f"{POD}/exec", "command", "cmd", "stdin", "input"),
        ("/api/v1/nodes/n/proxy/exec/a/b/c", "command", "cmd", "input", "stdin"),
        ("/api/v1/nodes/n/proxy/run/a/b/c", "cmd", "command", "input", "stdin"),
    ):
        found = details(f"{path}?" + f"{decoy}=ls&" * decoys + f"{field}=sh&{field}=-c&{no_stdin}=false&{stdin}=1")
        assert (found["command"], found["stdin"]) == (["sh", "-c"], True)


@pytest.mark.parametrize("value", ["yes", "on", "", "t", "2", "00", "no", "%ff"])
def test_a30_a_switch_is_true_as_the_api_server_reads_it(value: str) -> None:
    assert details(f"{POD}/exec?stdin={value}&tty={value}&stdin=0") == {"stdin": True, "tty": True}
    assert details(f"{POD}/exec?stdin=False&tty=0&tty={value}") is None


def test_a16_port_forward_names_ports_in_its_query_or_not_at_all() -> None:
    assert details(f"{POD}/portforward?ports=80&ports=8080") == {"ports": ["80", "8080"]}
    assert details(f"{POD}/portforward") is None


def test_nothing_else_of_a_query_is_taken() -> None:
    assert details(f"{POD}/exec?token=abc&access_token=def") is None
    found = details(f"{POD}/proxy/x?command=secret&ports=1")
    assert found == {
        "proxy_path": "/x",
        "more": {"query": "2 fields"},
        "sha256": {"target": sha256(f"{POD}/proxy/x?command=secret&ports=1")},
    }


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("filling", ["x", "", "command", "%63"])
def test_a21_no_number_of_fields_hides_the_command(filling: str) -> None:
    found = details(f"{POD}/exec?" + f"{filling}&" * 5000 + "container=c&command=cat&command=/etc/shadow")
    assert found["container"] == "c"
    if filling == "command":
        assert found["command"] == [""] * 64
        assert found["more"] == {"command": "4938 left out"}
        assert found["sha256"] == {"command": sha256("\0" * 5000 + "cat\0/etc/shadow\0")}
    else:
        assert found["command"] == ["cat", "/etc/shadow"]
        assert "more" not in found


def test_a21_the_hash_of_a_command_is_of_the_bytes_that_came() -> None:
    found = details(f"{POD}/exec?command=%ff%00&command=" + "x" * 5000)
    assert found["command"][0] == r"\udcff\x00"
    assert found["sha256"] == {"command": hashlib.sha256(b"\xff\0\0" + b"x" * 5000 + b"\0").hexdigest()}


@pytest.mark.parametrize(
    ("method", "target", "recorded"),
    [
        (
            "GET",
            "/api/v1/nodes/n1/proxy/exec/prod/db-0/db?command=cat&command=/etc/shadow&input=1",
            {"proxy_path": "/exec/prod/db-0/db", "command": ["cat", "/etc/shadow"], "stdin": True},
        ),
        ("POST", "/api/v1/nodes/n1/proxy/run/a/b/c?cmd=id", {"proxy_path": "/run/a/b/c", "command": ["id"]}),
        ("GET", "/api/v1/nodes/n1/proxy//%65xec/a?command=id", {"proxy_path": "/exec/a", "command": ["id"]}),
        ("GET", "/api/v1/proxy/nodes/n1/attach/a?tty=1", {"proxy_path": "/attach/a", "tty": True}),
        ("GET", "/api/v1/namespaces/n/services/https:s:1/proxy/a/b?c=d", {"proxy_path": "/a/b"}),
    ],
)  # fmt: skip
def test_a24_what_is_asked_of_a_node_a_pod_or_a_service_behind_proxy(
    method: str, target: str, recorded: dict[str, object]
) -> None:
    found = query_details(request_target(method, target, False).info, target, commands=True)
    altered = {"path": "not as it was sent"} if "%" in target else {}
    assert found.pop("more") == {"query": f"{target.count('=')} fields"} | altered
    assert found.pop("sha256") == {"target": sha256(target)}
    assert found == recorded
    without = query_details(request_target(method, target, False).info, target, commands=False)
    assert without is not None
    assert "command" not in without
    if "command" in recorded:
        assert "sha256" not in without, "a short command could be guessed from it"


def test_a21_a_path_that_was_cut_has_the_hash_of_the_target() -> None:
    target = "/api/v1/namespaces/n/pods/" + "p" * 254
    found = request_target("DELETE", target, False)
    assert found.detailed
    expected = {"more": {"path": "cut"}, "sha256": {"target": sha256(target)}}
    assert query_details(found.info, target, commands=True) == expected
    assert not request_target("DELETE", target[:-1], False).detailed


@pytest.mark.parametrize("name", ["%C3%A9" * 130 + "-evil", "%01" * 70 + "evil", "%F0%9F%98%80" * 70])
def test_a32_a_name_that_a_record_cuts_by_its_bytes_is_said_to_be_cut(name: str) -> None:
    target = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/" + name
    found = request_target("DELETE", target, False)
    assert json.loads("{" + found.text[1:] + "}")["name"].endswith("…")
    assert found.detailed
    expected = {"more": {"path": "cut"}, "sha256": {"target": sha256(target)}}
    assert query_details(found.info, target, commands=True) == expected


@pytest.mark.parametrize(
    ("method", "target", "missing"),
    [
        ("DELETE", "/api/v1/namespaces/n/pods?labelSelector=a&x=b", {"query": "2 fields"}),
        ("POST", "/else/where", {"path": "its class only"}),
        ("POST", "/api/v1/namespaces/n/pods/p/exec/x", {"path": "not as it was sent"}),
        ("DELETE", "/api/v1/namespaces/n/pods/%ff", {"path": "not as it was sent"}),
        ("DELETE", "/api/v1/namespaces/n/pods%2Fp", {"path": "not as it was sent"}),
    ],
)
def test_a21_what_of_a_target_is_in_no_field(method: str, target: str, missing: dict[str, str]) -> None:
    found = query_details(request_target(method, target, False).info, target, commands=True)
    assert found == {"more": missing, "sha256": {"target": sha256(target)}}


_PARTS = st.lists(
    st.sampled_from(["a", "b", "/", "//", "%2F", "%61", "%ff", "%fe", "%EF%BF%BD", "/proxy", "/proxy/", "/exec/"]),
    max_size=6,
)


@settings(max_examples=500, deadline=None)
@given(_PARTS, _PARTS)
@example(["a", "/proxy/", "%ff"], ["a", "/proxy/", "%fe"])
@example(["a", "/proxy/", "a", "/", "b"], ["a", "/proxy/", "a", "%2F", "b"])
@example(["a", "/proxy/", "%61"], ["a", "/proxy/", "a"])
@example(["%ff"], ["%fe"])
@example(["a", "/proxy", "a"], ["a", "/proxy", "%61"])
def test_a41_paths_that_differ_have_records_that_differ(first: list[str], second: list[str]) -> None:
    """But for an escape that every reader resolves alike, in a name that is not behind `proxy`."""
    records = []
    for parts in (first, second):
        target = "/api/v1/namespaces/n/services/" + "".join(parts)
        found = request_target("POST", target, False)
        extra = query_details(found.info, target, commands=True) if found.detailed else None
        name, *behind = re.split("(/proxy(?=/|$))", target, maxsplit=1)
        records.append((name.replace("%61", "a") + "".join(behind), found.text, extra))
    if records[0][0] != records[1][0]:
        assert records[0][1:] != records[1][1:]


def test_h20_fields_of_a_path_are_cut_to_what_a_name_may_have() -> None:
    """They are whole in what goes on; the record says that they were cut."""
    long = "a" * 8000
    found = request_target("GET", f"/apis/{long}/v1/namespaces/{long}/{long}/{long}/{long}", False)
    info = found.info
    fields = (info.group, info.namespace, info.resource, info.name, info.subresource)
    assert {*fields} == {"a" * (MAX_SEGMENT - 1) + "…"}
    assert len(found.text) < 6 * MAX_SEGMENT
    assert found.detailed
    details = query_details(info, "/x", commands=True)
    assert json.loads(AuditRecord("r", SUBJECT, path_fields=found.text, details=details).line(0.0))["more"] == {
        "path": "cut"
    }
    whole = request_target("GET", f"/api/v1/namespaces/n/pods/{'a' * MAX_SEGMENT}", False)
    assert (whole.info.name, whole.info.cut) == ("a" * MAX_SEGMENT, False)
    assert not whole.detailed


REFUSED_TARGETS = ["", "x", "*", "http://a/", "a:1", "/..", "/a/.", "/%2e", "/a%2f%2E%2e%2fb", "/..;x/y", "/\\", "/%5C"]


@pytest.mark.parametrize(
    "target", [*REFUSED_TARGETS, "/%00", "/#", "/ ", "/é", "/%", "/%zz", "/a%4", "/%4g", "/%" * 1000]
)
def test_targets_refused(target: str) -> None:
    with pytest.raises(RequestRefusal):
        request_target("GET", target, False)


@pytest.mark.parametrize("target", ["/", "//a", "/a/...", "/..a", "/a;b", "/a?%zz", "/a?../..", "/a?%2e%2e", "/a%2Fb"])
def test_targets_accepted(target: str) -> None:
    request_target("GET", target, False)
