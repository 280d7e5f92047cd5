"""What a target asks for: what is recorded before it leaves, and the fields of exec, attach and port-forward."""

from __future__ import annotations

import json

import pytest

from arcbridge.agent.audit.record import AuditRecord
from arcbridge.agent.kube.asked import asked, query_details, redacted_command
from arcbridge.agent.kube.request_info import MAX_SEGMENT
from arcbridge.agent.kube.status import RequestRefusal
from tests.support.growth import growth

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
    found = asked(method, target, upgrade)
    assert found.begins is begins
    assert asked(method, target, upgrade) is found, "it is remembered"
    long = f"{target}{'&' if '?' in target else '?'}labelSelector={'x' * 600}"
    assert asked(method, long, upgrade).begins is begins


def test_a_target_is_checked() -> None:
    for target in ("/api/../x", "/api/../" + "x" * 1000):
        with pytest.raises(RequestRefusal):
            asked("GET", target, False)


def details(target: str, *, commands: bool = True) -> object:
    return query_details(asked("GET", target, True).info, target, commands=commands)


def test_a16_exec_and_attach() -> None:
    target = f"{POD}/exec?command=sh&command=-c&command=echo+a%20b&container=web&stdin=true&stdout=true&tty=1&tty=0"
    assert details(target) == {"container": "web", "command": ["sh", "-c", "echo a b"], "stdin": True, "tty": True}
    assert details(target, commands=False) == {"container": "web", "stdin": True, "tty": True}
    assert details(f"{POD}/exec?comm%61nd=id&stdin=false") == {"command": ["id"]}
    assert details(f"{POD}/exec?command=a;command=b&command=c") == {"command": ["c"]}
    assert details(f"{POD}/attach?container=c&tty=true&stdin=1") == {"container": "c", "stdin": True, "tty": True}
    assert details(f"{POD}/attach") is None


def test_a16_port_forward_names_ports_in_its_query_or_not_at_all() -> None:
    assert details(f"{POD}/portforward?ports=80&ports=8080") == {"ports": ["80", "8080"]}
    assert details(f"{POD}/portforward") is None


def test_nothing_else_of_a_query_is_taken() -> None:
    assert details(f"{POD}/exec?token=abc&access_token=def") is None
    assert details(f"{POD}/proxy/x?command=secret&ports=1") is None


def test_a_query_of_very_many_fields() -> None:
    found = details(f"{POD}/exec?" + "&".join(["command=x"] * 5000))
    assert isinstance(found, dict)
    assert len(found["command"]) == 256


@pytest.mark.parametrize(
    ("command", "recorded"),
    [
        (["psql", "--password=hunter2"], ["psql", "--password=[redacted]"]),
        (["psql", "--password", "hunter2", "x"], ["psql", "--password", "[redacted]", "x"]),
        (["env", "DB_PASSWORD=hunter2", "A=b"], ["env", "DB_PASSWORD=[redacted]", "A=b"]),
        (["sh", "-c", "API_TOKEN='a b' run; x"], ["sh", "-c", "API_TOKEN=[redacted] run; x"]),
        (["sh", "-c", "vault login --token s.abc && ls"], ["sh", "-c", "vault login --token [redacted] && ls"]),
        (["--token", "--verbose"], ["--token", "--verbose"]),
        (["ls", "-la", "/etc"], ["ls", "-la", "/etc"]),
    ],
)
def test_a17_secrets_in_command_lines(command: list[str], recorded: list[str]) -> None:
    assert redacted_command(command) == recorded


PUMPED = [
    "a", "-", "--", ".", "token", "tokens", "-token", "--token", "--token ", "token ", "token=", "token='", 'token="',
    "token: ", " ", "=", "'", "passwd", "private-key", "(token", "x=;", " --secret  ",
]  # fmt: skip


@pytest.mark.parametrize("word", PUMPED)
def test_h20_command_lines_cost_as_much_as_they_are_long(word: str) -> None:
    """One word, and as many words: a square would make it 64 times as much for 8 times the command."""
    text = word * (1000 // len(word))
    for end in ("", "!", "=", " ", "'"):
        assert growth(lambda one: redacted_command([one]), text + end, text * 8 + end) < 24
    assert growth(lambda one: redacted_command(one.split("|")), f"{word}|" * 50, f"{word}|" * 400) < 24


def test_h20_fields_of_a_path_are_cut_to_what_a_name_may_have() -> None:
    """They are whole in what goes on; the record says that they were cut."""
    long = "a" * 8000
    found = asked("GET", f"/apis/{long}/v1/namespaces/{long}/{long}/{long}/{long}", False)
    info = found.info
    fields = (info.group, info.namespace, info.resource, info.name, info.subresource)
    assert {*fields} == {"a" * (MAX_SEGMENT - 1) + "…"}
    assert len(found.text) < 6 * MAX_SEGMENT
    assert json.loads(AuditRecord("r", "s", asked=found.text).line(0.0))["cut"] is True
    whole = asked("GET", f"/api/v1/namespaces/n/pods/{'a' * MAX_SEGMENT}", False)
    assert (whole.info.name, whole.info.cut) == ("a" * MAX_SEGMENT, False)
    assert "cut" not in whole.text
