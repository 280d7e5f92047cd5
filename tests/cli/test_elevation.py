"""What the commands of elevation print, and their exit codes; the work is in `client.commands.elevation`."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from arcbridge.cli.run import run
from arcbridge.client.commands import elevation as module
from arcbridge.client.commands.elevation import OfferedRule
from arcbridge.errors import ExitCode
from tests.agent.elevation.documents import request_document, rule_document

FLAGS = ("--relay", "https://relay.example.org", "-n", "berlin", "--access-token-file", "a", "--id-token-file", "b")


class Cluster:
    """A cluster whose requests are in a list."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.found = [
            request_document(begins=time.time() - 60),
            request_document("bob-1", user="bob", approved=(), created=time.time()),
        ]
        self.rule = rule_document()
        self.interrupted = False

    async def user(self) -> tuple[str, tuple[str, ...]]:
        return "alice", ("dev",)

    async def rules(self) -> list[OfferedRule]:
        return [module._rule(self.rule)]

    async def requests(self) -> list[Any]:
        return [module._elevation(one) for one in self.found]

    async def ask(self, *words: Any) -> Any:
        self.asked.append(words[2:])
        return module._elevation(self.found[0])

    async def begun(self, name: str, approvals: int) -> Any:
        if self.interrupted:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(10)
        return module._elevation(self.found[0])

    async def approve(self, name: str) -> Any:
        self.asked.append(("approve", name))
        return module._elevation(self.found[1])

    async def deny(self, name: str, reason: str) -> Any:
        self.asked.append(("deny", name, reason))
        return module._elevation(self.found[1])

    async def withdraw(self, name: str) -> Any:
        self.asked.append(("withdraw", name))
        return module._elevation(self.found[1])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Cluster:
    made = Cluster()

    @asynccontextmanager
    async def given(context: Any) -> AsyncIterator[Cluster]:
        assert context.config.clusters or context.config.cluster == "berlin"
        yield made

    monkeypatch.setattr(module, "elevations_of", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    return made


def test_elevate_asks_waits_and_says_until_when(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*FLAGS, "elevate", "--for", "30m", "--reason", "INC-42", "--group", "operators"]) == ExitCode.DONE
    ((groups, seconds, reason),) = cluster.asked
    assert (groups, seconds, reason) == (("operators",), 1800, "INC-42")
    shown = capsys.readouterr()
    assert shown.out.startswith("operators until ")
    assert "`arcbridge withdraw alice-1` ends it" in shown.out
    assert "Asked as alice-1. A user in leads approves by: arcbridge approve alice-1" in shown.err.replace("\n  ", " ")


def test_who_stops_waiting_is_told_that_the_request_stays(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.interrupted = True
    assert run([*FLAGS, "elevate", "--reason", "INC-42"]) == ExitCode.INTERRUPTED
    assert "arcbridge withdraw alice-1" in capsys.readouterr().err.replace("\n  ", " ")


def test_without_approval_no_approver_is_named(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.rule = rule_document(approvers=())
    assert run([*FLAGS, "elevate", "--reason", "INC-42"]) == ExitCode.DONE
    assert cluster.asked[0][1] == 3600
    assert "approve" not in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (("--reason", " "), "flag --reason"), ((), "flag --reason"), (("--reason", "x" * 257), "flag --reason"),
    (("--reason", "x", "--for", "soon"), "flag --for"), (("--reason", "x", "--for", "2h"), "3600 s at most"),
])  # fmt: skip
def test_what_cannot_be_asked_is_a_usage_error(
    words: tuple[str, ...], said: str, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*FLAGS, "elevate", *words]) == ExitCode.USAGE
    assert said in capsys.readouterr().err
    assert cluster.asked == []


@pytest.mark.parametrize(
    ("words", "asked", "said"),
    [
        (("approve", "bob-1"), ("approve", "bob-1"), "approved: bob, operators for 30 min, INC-42 it burns (bob-1)"),
        (("deny", "bob-1", "--reason", "no"), ("deny", "bob-1", "no"), "denied: bob, "),
        (("withdraw", "bob-1"), ("withdraw", "bob-1"), "withdrawn: bob, "),
    ],
)
def test_decisions(
    words: tuple[str, ...], asked: Any, said: str, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*FLAGS, *words]) == ExitCode.DONE
    assert cluster.asked == [asked]
    assert capsys.readouterr().out.startswith(said)


def test_elevations_are_those_that_wait_or_lend(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.found.append(request_document("old-1", begins=1000))
    cluster.found.append(request_document("no-1", denied={"user": "bob"}))
    cluster.found.append(request_document("late-1", created=time.time() - 86400))
    assert run([*FLAGS, "elevations", "-o", "name"]) == ExitCode.DONE
    assert capsys.readouterr().out.split() == ["alice-1", "bob-1"]
    assert run([*FLAGS, "elevations", "--all"]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["STATE", "active", "waiting", "over", "denied", "lapsed"]
    assert run([*FLAGS, "elevations", "-o", "json"]) == ExitCode.DONE
    assert '"approved_by": [\n' in capsys.readouterr().out
    cluster.found.clear()
    assert run([*FLAGS, "elevations"]) == ExitCode.DONE
    assert "no request waits" in capsys.readouterr().err
