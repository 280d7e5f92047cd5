"""What one process answers: its sessions, its agents, its checks; and the end of one session."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from arcbridge import __version__
from arcbridge.checks.diagnosis import failed
from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import KnownGroups, Policy
from arcbridge.relay import operations as module
from arcbridge.relay.fleet.base import AgentReport, Lost
from arcbridge.relay.operations import PART, Operations, parts, rows_of
from arcbridge.relay.recent_users import RecentUsers
from tests.support.eventually import until

ALICE = Identity("alice", "", (), "https://issuer#alice", "https://issuer", 4e9)
POLICY = Policy.load('[[allow]]\nusers = ["zoe"]\ngroups = ["dev", "ops"]\nclusters = ["berlin", "test-*"]\n')


class Pump(SimpleNamespace):
    """A session."""

    def abort(self, reason: str) -> None:
        self.closed, self.reason = True, reason


def pump(join_id: str, first: str = "", identity: Identity | None = ALICE, **more: Any) -> Pump:
    fields = {"agent": "agent-1", "source": "192.0.2.1", "restricted": "read-only", "cluster": "berlin",
              "bytes_to_agent": 7, "bytes_to_client": 9, "round_trip": 0.012, "closed": False, "reason": "",
              "started_at": asyncio.get_running_loop().time() - 60}  # fmt: skip
    return Pump(join_id=join_id, first_session=first, identity=identity, **{**fields, **more})


def operations(
    *pumps: Pump, tell: Callable[[Lost], None] = lambda lost: None, links: Any = (), recent: RecentUsers | None = None
) -> Operations:
    fleet: Any = SimpleNamespace(links=lambda cluster=None: [link for link in links if cluster in (None, link.cluster)])
    policy: Any = SimpleNamespace(current=lambda: POLICY)
    made = Operations(
        list(pumps), fleet, tell, policy, recent or RecentUsers(), relay="relay:443", worker=1, clock=lambda: 1000.0
    )
    made.findings = lambda: [failed("thing", "down", "start it", "down")]
    return made


async def test_sessions() -> None:
    acted = replace(ALICE, actor="bot")
    found = operations(pump("b" * 16, "a" * 16, acted), pump("c" * 16, identity=None)).answer({"ask": "sessions"})
    assert found == [
        {
            "session": "b" * 16,
            "first_session": "a" * 16,
            "user": "alice",
            "actor": "bot",
            "cluster": "berlin",
            "agent": "agent-1",
            "source": "192.0.2.1",
            "restricted": "read-only",
            "since": pytest.approx(940.0, abs=5),
            "bytes_to_agent": 7,
            "bytes_to_client": 9,
            "round_trip": 0.012,
            "relay": "relay:443",
            "worker": 1,
        }
    ], "a join that was passed on is the other relay's to tell"


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ({"clusters": ["ber*"]}, "bd"),
        ({"clusters": ["munich"]}, "c"),
        ({"clusters": []}, ""),
        ({"clusters": [["munich"], 1, "munich"]}, "c"),
        ({"clusters": ["*"], "most": 2}, "bc"),
        ({"clusters": ["berlin"], "session": "d" * 16}, "d"),
        ({"clusters": ["munich"], "session": "d" * 16}, ""),
        ({"session": "a" * 16}, "b"),
        ({"clusters": "munich", "most": "2", "session": ""}, "bcd"),
    ],
)
async def test_the_sessions_of_some_clusters(question: dict[str, Any], found: str) -> None:
    made = operations(pump("b" * 16, "a" * 16), pump("c" * 16, cluster="munich"), pump("d" * 16))
    assert "".join(row["session"][0] for row in made.answer({"ask": "sessions", **question})) == found


async def test_agents_that_stay() -> None:
    links = [
        SimpleNamespace(
            cluster=cluster, instance=f"agent-{n}", version="1.0", since=5.0, report=AgentReport(), draining=n == 2
        )
        for n, cluster in enumerate(("berlin", "munich", "berlin"))
    ]
    found = operations(links=links).answer({"ask": "agents"})
    assert [(one["cluster"], one["agent"], one["version"]) for one in found] == [
        ("berlin", "agent-0", "1.0"),
        ("munich", "agent-1", "1.0"),
    ]
    (named,) = operations(links=links).answer({"ask": "agents", "clusters": [["munich"], 1, "munich"]})
    assert named == {"cluster": "munich", "agent": "agent-1"}, "another relay counts, and needs no more"
    assert operations(links=links).answer({"ask": "agents", "clusters": "munich"}) == found
    matching = operations(links=links).answer({"ask": "agents", "patterns": ["mun*", 1]})
    assert matching == [row for row in found if row["cluster"] == "munich"]
    assert operations(links=links).answer({"ask": "agents", "patterns": "munich"}) == found


def test_what_a_process_serves_by(monkeypatch: pytest.MonkeyPatch) -> None:
    made = operations()
    monkeypatch.setattr(made, "policy", SimpleNamespace(current=lambda: POLICY, held=None))
    made.certificate_expires = lambda: 5.0
    (found,) = made.answer({"ask": "policy"})
    assert (found["hash"], found["version"], found["certificate_expires"]) == (POLICY.hash, __version__, 5.0)


def test_checks() -> None:
    made = operations()
    (found,) = made.answer({"ask": "checks"})
    assert (found["state"], found["code"], found["worker"]) == ("failed", "down", 1)


@pytest.mark.parametrize("given", ["b" * 16, "a" * 16], ids=["present", "first"])
async def test_one_session_ends_by_either_of_its_ids(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setattr(module, "GRACE", 0.0)
    told: list[Lost] = []
    mine, other = pump("b" * 16, "a" * 16), pump("d" * 16)
    made = operations(mine, other, tell=told.append)
    found = made.answer({"ask": "end", "session": given, "reason": "maintenance\n tonight"})
    assert [row["session"] for row in found] == ["b" * 16]
    assert told == [Lost("berlin", "alice", "https://issuer#alice", 0, "maintenance\\n tonight", "b" * 16)]
    assert not mine.closed, "the agent is told first"
    await until(lambda: mine.closed)
    assert not other.closed


@pytest.mark.parametrize("question", [{}, {"ask": "x"}, {"ask": "end"}, {"ask": "end", "session": ""}, {"ask": 1}])
async def test_questions_that_mean_nothing(question: dict[str, Any]) -> None:
    assert operations(pump("b" * 16)).answer(question) == []


def test_rows_are_cut_into_parts_that_fit() -> None:
    rows = [{"n": number, "text": "x" * 1000} for number in range(300)]
    found = list(parts(rows))
    assert all(len(data) <= PART + 1100 for data, _ in found)
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert [row for data, _ in found for row in rows_of(data)] == rows
    assert list(parts([])) == [(b"[]", True)]


@pytest.mark.parametrize("data", [b"", b"{}", b"nonsense", json.dumps([1, "x"]).encode()])
def test_what_is_no_part_has_no_rows(data: bytes) -> None:
    assert rows_of(data) == []


def person(name: str, *groups: str, issued_at: float = 0.0) -> Identity:
    return Identity(name, "", groups, f"i#{name}", "i", 4e9, issued_at=issued_at)


async def test_the_rules_in_force_of_the_process_that_is_asked() -> None:
    asked = {"ask": "policy_rules", "relay": "relay:443", "worker": 1}
    found = operations().answer(asked)
    assert {(row["rule"], row["line"], row["kind"], row["name"]) for row in found} == {
        (0, 1, "users", "zoe"), (0, 1, "groups", "dev"), (0, 1, "groups", "ops"),
        (0, 1, "clusters", "berlin"), (0, 1, "clusters", "test-*"),
    }  # fmt: skip
    assert operations().answer({**asked, "worker": 2}) == []
    assert operations().answer({"ask": "policy_rules"}) == []


async def test_what_came_with_a_users_token() -> None:
    recent = RecentUsers(clock=lambda: 500.0)
    recent.note(person("bob"), KnownGroups(("dev",), 3))
    made = operations(
        pump("b" * 16, identity=person("anna", "ops", issued_at=1.0)),
        pump("c" * 16, identity=person("anna", "dev", "x", "y", issued_at=2.0)),
        recent=recent,
    )
    (row,) = made.answer({"ask": "user", "user": "anna"})
    assert (row["from"], row["groups"], row["more"]) == ("session", ("dev",), 2), "the newest token's"
    (row,) = made.answer({"ask": "user", "user": "bob"})
    assert (row["from"], row["groups"], row["more"], row["at"]) == ("join", ("dev",), 3, 500.0)
    assert made.answer({"ask": "user", "user": "carl"}) == []


async def test_which_groups_of_those_asked_for_connected_users_have() -> None:
    made = operations(pump("b" * 16, identity=person("anna", "a", "b")), pump("c" * 16, identity=None))
    (row,) = made.answer({"ask": "connected", "groups": ["b", "c"]})
    assert (row["user"], row["cluster"], row["groups"], row["session"]) == ("anna", "berlin", ["b"], "b" * 16)
    assert row["actor"] == ""
    assert made.answer({"ask": "connected"})[0]["groups"] == []
