"""`arcbridge admin …`: what is given to the relay, and what is printed of its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from arcbridge.cli.commands import ADMINISTRATION, COMMANDS
from arcbridge.cli.run import run
from arcbridge.client.commands import administration
from arcbridge.client.commands.administration import Answered
from arcbridge.errors import ExitCode
from arcbridge.pki.enrolment import JoinToken
from arcbridge.pki.new_token import API_SERVER_FLAGS
from arcbridge.relay.http.administration import ARGUMENTS
from arcbridge.relay.http.administration import COMMANDS as KNOWN
from arcbridge.settings.flags import CLIENT, RELAY
from tests.client.far_side import RELAY_CA

Asked = list[tuple[str, dict[str, str]]]
SESSION = {"session": "a" * 16, "user": "ann\x1b[2J", "cluster": "a", "since": 1_800_000_000.0}
TOKEN = {"token": JoinToken.create().text, "cluster": "a", "uses": 1, "expires_at": 1_800_000_000.0,
         "relay": "https://relay.test", "relay_ca_pin": RELAY_CA.pin}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    found: Asked = []
    answers: dict[str, list[dict[str, Any]]] = {
        "token create": [TOKEN],
        "cluster list": [{"name": "a", "state": "Connected", "agents": 1, "last_seen": 0.0}],
        "session list": [SESSION],
        "session end": [SESSION],
        "user revoke": [{"user": "bob", "before": 1_800_000_000}],
    }

    async def administer(relays: object, tokens: object, command: str, given: Mapping[str, str]) -> Answered:
        found.append((command, dict(given)))
        return Answered(answers[command], command == "session list")

    monkeypatch.setattr(administration, "administer", administer)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def test_every_command_of_the_relay_but_those_that_change_the_policy() -> None:
    """docs/threats.md#K6."""
    afar = {" ".join(command.path[1:]): command for command in COMMANDS if command.path[0] == "admin"}
    near = {" ".join(command.path): command for command in COMMANDS if command.roles == (RELAY,)}
    assert set(afar) == set(KNOWN) == {word for word in near if word.split()[0] in ADMINISTRATION} | {"policy list"}
    for name, command in afar.items():
        assert (command.roles, command.help) == ((CLIENT,), near[name].help)
        sent = {flag.dest for flag in command.flags} - {"output", *API_SERVER_FLAGS}
        sent |= {command.argument.name} if command.argument is not None else set()
        assert sent == set(KNOWN[name].takes) <= set(ARGUMENTS)


def test_what_the_relay_is_given(asked: Asked) -> None:
    relay = ["--relay", "https://relay.test"]
    kube = ["--kube-server", "https://api", "--kube-token-file", "f", "-o", "json"]
    assert run(["admin", "token", "create", *relay, "--cluster", "a", "--ttl", "2h", "--rebind", *kube]) == 0
    assert run(["admin", "session", "end", *relay, "a" * 16, "--reason", " now "]) == 0
    assert run(["--cluster", "b", "admin", "cluster", "list", *relay]) == 0
    assert asked == [
        ("token create", {"cluster": "a", "ttl": "2h", "rebind": "yes"}),
        ("session end", {"session": "a" * 16, "reason": "now"}),
        ("cluster list", {}),
    ]


def test_what_is_printed(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*words: str) -> str:
        assert run(["admin", *words, "--relay", "https://relay.test"]) == 0
        return capsys.readouterr().out

    assert printed("cluster", "list").splitlines()[0].split()[:3] == ["NAME", "STATE", "AGENTS"]
    assert "ROUND TRIP" in printed("cluster", "list", "-o", "wide")
    assert json.loads(printed("cluster", "list", "-o", "json"))[0]["last_seen"] is None
    assert printed("session", "list", "-o", "name") == "a" * 16 + "\n"
    assert printed("session", "end", "a" * 16) == (
        f"session {'a' * 16} of ann\\x1b[2J with cluster a ends within seconds\n"
    )
    assert "before 2027-01-15T08:00:00Z are refused" in printed("user", "revoke", "bob")
    assert printed("token", "create", "--cluster", "a", "-o", "name") == f"{TOKEN['token']}\n"
    assert "helm install" in printed("token", "create", "--cluster", "a")


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("session end", [{}]),
        ("session end", []),
        ("cluster revoke", [{"cluster": "a", "known": []}, {"known": "x"}]),
        ("user revoke", [{"user": "bob", "before": "today"}]),
        ("user list", [{"user": "bob", "before": "today"}]),
        ("token list", [{"expires_at": [1]}]),
    ],
)
def test_rows_of_another_form(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, rows: list[Any]
) -> None:
    """docs/threats.md#K9. A sentence, and never as if all were well."""

    async def administer(*_: object) -> Answered:
        return Answered(rows, False)

    monkeypatch.setattr(administration, "administer", administer)
    argument = [] if command.endswith("list") else ["a"]
    assert run(["admin", *command.split(), *argument, "--relay", "https://relay.test"]) != ExitCode.DONE
    caught = capsys.readouterr()
    assert "in another form than this version reads" in caught.err
    assert ("may have been done" in caught.err, caught.out) == (not command.endswith("list"), "")


def test_white_space_around_a_name_is_none_of_it(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["admin", "token", "create", "--relay", "https://relay.test", "--cluster", " a "]) == ExitCode.DONE
    assert TOKEN["token"] in capsys.readouterr().out


def test_a_list_without_rows_says_so(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def administer(*_: object) -> Answered:
        return Answered([], False)

    monkeypatch.setattr(administration, "administer", administer)
    assert run(["admin", "session", "list", "--relay", "https://relay.test"]) == ExitCode.DONE
    caught = capsys.readouterr()
    assert (caught.out.split()[0], caught.err) == ("SESSION", "no sessions: none runs now\n")
    assert run(["admin", "session", "list", "-o", "json", "--relay", "https://relay.test"]) == ExitCode.DONE
    assert capsys.readouterr() == ("[]\n", "")


def test_more_rows_than_are_sent(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    run(["admin", "session", "list", "--relay", "https://relay.test"])
    assert "warning: the relay has more than these 1 rows" in capsys.readouterr().err


def test_mistakes_are_told_before_anything_is_sent(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["admin", "token", "create", "--relay", "https://relay.test", "--cluster", "a", "--kube-token-file", "x"]
    assert run(line) == ExitCode.USAGE
    assert "--kube-server is missing" in capsys.readouterr().err
    assert run(["admin", "clustr", "list"]) == ExitCode.USAGE
    assert "did you mean cluster?" in capsys.readouterr().err
    assert run(["admin"]) == ExitCode.USAGE
    assert "one of token, policy, cluster, session, refusal, user" in capsys.readouterr().err
    assert run(["admin", "policy", "accept", "x"]) == ExitCode.USAGE
    assert asked == []
