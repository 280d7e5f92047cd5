"""What another policy changes, and what is read of a relay that runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import StateError
from arcbridge.identity.policy import Policy, admin_changes
from arcbridge.relay import policy_review as module
from arcbridge.relay.admin_socket import MAX_QUESTION
from arcbridge.relay.policy_review import (
    GROUPS_ASKED,
    _changed_rules,
    _changed_users,
    _connected,
    _rights,
    policy_in_force,
)
from arcbridge.settings.config import RelayConfig

OLD = """[[allow]]
groups = ["dev"]
clusters = ["shop-*"]
[[allow]]
users = ["anna"]
clusters = ["lab"]
[[allow]]
groups = ["ops"]
clusters = ["*"]
"""


def session(user: str, cluster: str, *groups: str) -> dict[str, Any]:
    return {"user": user, "cluster": cluster, "groups": list(groups)}


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ('["dev"]', '["dev", "qa"]', [("changed", "allow[0]", ["group qa"], [])]),
        ('["lab"]', '["lab-2"]', [("changed", "allow[1]", ["cluster lab-2"], ["cluster lab"])]),
        ('[[allow]]\nusers = ["anna"]\nclusters = ["lab"]\n', "",
         [("removed", "allow[1]", [], ["cluster lab", "user anna"])]),
    ],
)  # fmt: skip
def test_which_rules_differ(old: str, new: str, changes: list[tuple[Any, ...]]) -> None:
    rules, others = Policy.load(OLD).rules, Policy.load(OLD.replace(old, new)).rules
    found = _changed_rules(rules, others)
    assert [(row["change"], row["rule"], row["gains"], row["loses"]) for row in found] == changes
    back = _changed_rules(others, rules)
    assert [(row["gains"], row["loses"]) for row in back] == [(loses, gains) for *_, gains, loses in changes]
    assert _changed_rules(rules, rules[::-1]) == [], "their order means nothing"


def test_which_connected_users_gain_and_lose() -> None:
    clusters = ["shop-1", "shop-2", "lab"]
    new = OLD.replace('["shop-*"]', '["shop-1", "lab"]').replace('"anna"', '"*"')
    old_rights, new_rights = (_rights(Policy.load(text).rules, clusters) for text in (OLD, new))
    found = _changed_users(
        [
            session("bob", "shop-2", "dev"),
            session("bob", "shop-1", "dev"),
            session("anna", "lab"),  # by her name before, and as everyone now
            session("otto", "shop-2", "ops", "dev"),  # by another rule
            session("carl", "gone"),
        ],
        clusters,
        old_rights,
        new_rights,
    )
    assert found == [
        {"user": "bob", "gains": ["lab"], "loses": ["shop-2"], "sessions_lost": 1},
        {"user": "carl", "gains": ["lab"], "loses": [], "sessions_lost": 0},
    ]


async def test_questions_are_no_larger_than_a_relay_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """docs/threats.md#V23. However many groups there are; the answers about one session are one row."""
    groups = sorted(f"{n}{'x' * 1020}" for n in range(3 * GROUPS_ASKED))
    sizes = []

    async def ask(data_dir: Path, question: Mapping[str, Any]) -> list[dict[str, Any]]:
        sizes.append(len(json.dumps(question)))
        return [{**session("anna", "lab", *question["groups"][:1]), "session": "a", "relay": "r", "worker": None}]

    monkeypatch.setattr(module, "ask", ask)
    (row,) = await _connected(RelayConfig(data_dir=tmp_path), groups)
    assert row["groups"] == groups[::GROUPS_ASKED]
    assert max(sizes) < MAX_QUESTION
    assert [one["groups"] for one in await _connected(RelayConfig(data_dir=tmp_path), [])] == [[]]


@pytest.mark.parametrize("rows", [None, [{"rule": 0}], [{"rule": "x", "line": 1, "kind": "users", "name": "a"}], [{}]])
async def test_a_relay_of_another_version_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[dict[str, Any]] | None
) -> None:
    async def ask(data_dir: Path, question: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        return [{"hash": "x", "rules": 2}] if question["ask"] == "policy" else rows

    monkeypatch.setattr(module, "ask", ask)
    with pytest.raises(StateError, match="does not send its rules"):
        await policy_in_force(RelayConfig(data_dir=tmp_path))


async def test_the_administrators_of_the_relay_that_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rule = [("users", "anna"), ("clusters", "lab")]
    admin = [("groups", "ops"), ("clusters", "shop-*"), ("what", "tokens")]
    rows = [{"rule": 0, "line": 1, "kind": kind, "name": name} for kind, name in rule]
    rows += [{"admin": 0, "line": 4, "kind": kind, "name": name} for kind, name in admin]

    async def ask(data_dir: Path, question: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        return [{"hash": "x", "rules": 1, "admins": 1}] if question["ask"] == "policy" else rows

    monkeypatch.setattr(module, "ask", ask)
    former, _ = await policy_in_force(RelayConfig(data_dir=tmp_path))
    text = '[[admin]]\ngroups = ["ops"]\nclusters = ["shop-*"]\nwhat = ["tokens"]\n'
    assert admin_changes(former, Policy.load(text)) == []
    changes = admin_changes(former, Policy.load(text.replace('"tokens"', '"tokens", "read"')))
    assert changes == [("group ops", ["read of shop-*"], [])]
    rows[2:] = []
    with pytest.raises(StateError, match="does not send its rules"):
        await policy_in_force(RelayConfig(data_dir=tmp_path))


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ({}, True),
        ({"policy": "former"}, False),
        ({"policy": "former", "more": 0}, True),
        ({"cut": 1}, False),
        ({"policy": "former", "groups": ["dev"]}, True),
    ],
    ids=["of this policy", "of the former", "it named all", "too many", "allowed all the same"],
)
async def test_groups_that_a_former_policy_did_not_name_are_not_taken_for_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: dict[str, Any], known: bool
) -> None:
    """Right after a policy was mended, the user whom it was mended for has not joined again."""
    policy = Policy.load(OLD)

    async def in_force(config: RelayConfig) -> tuple[Policy, bool]:
        return policy, True

    async def ask(data_dir: Path, question: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"from": "join", "at": 5.0, "groups": [], "more": 2, "policy": policy.hash, "cut": 0} | said]

    monkeypatch.setattr(module, "policy_in_force", in_force)
    monkeypatch.setattr(module, "ask", ask)
    row = await module.explain_access(RelayConfig(data_dir=tmp_path), "bob", (), "shop-1")
    assert row["known"] == known
    assert ("give --groups" in row["reason"]) != known


def test_what_actors_gain_and_lose() -> None:
    """A rule with actors gives nothing to users alone, and one without nothing to programs."""
    new = OLD.replace('groups = ["dev"]', 'groups = ["dev"]\nactors = ["bot"]')
    (row,) = _changed_rules(Policy.load(OLD).rules, Policy.load(new).rules)
    assert (row["change"], row["gains"], row["loses"]) == ("changed", ["actor bot"], [])
    old_rights, new_rights = (_rights(Policy.load(text).rules, ["shop-1"]) for text in (OLD, new))
    assert new_rights["shop-1"] - old_rights["shop-1"] == {"group dev through actor bot"}
    sessions = [{**session(name, "shop-1", "dev"), "actor": actor} for name, actor in (("a", ""), ("b", "bot"))]
    assert _changed_users([*sessions, session("c", "shop-1", "dev")], ["shop-1"], old_rights, new_rights) == [
        {"user": "a", "gains": [], "loses": ["shop-1"], "sessions_lost": 1},
        {"user": "b", "gains": ["shop-1"], "loses": [], "sessions_lost": 0},
        {"user": "c", "gains": [], "loses": ["shop-1"], "sessions_lost": 1},
    ]


async def test_what_decides_of_a_program_that_acts_for_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    policy = Policy.load(OLD.replace('groups = ["dev"]', 'groups = ["dev"]\nactors = ["bot"]'))

    async def in_force(config: RelayConfig) -> tuple[Policy, bool]:
        return policy, False

    monkeypatch.setattr(module, "policy_in_force", in_force)
    config = RelayConfig(data_dir=tmp_path)
    for actor, allowed, reason in (
        ("bot", True, 'allows it, by the group "dev" through the actors "bot"'),
        ("", False, 'is for the actors "bot"'),
        ("ci", False, 'is for the actors "bot"'),
    ):
        row = await module.explain_access(config, "", ("dev",), "shop-1", actor)
        assert (row["actor"], row["allowed"]) == (actor, allowed)
        assert reason in row["reason"]
