"""Which sessions are recorded: users, groups, namespaces, and the strictest of several rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arcbridge.agent.recording.rules import Demand, RecordingRules
from arcbridge.identity.claims import Identity
from arcbridge.settings.config import RecordingRuleConfig

ALICE = Identity("alice", "u-1", ("dev", "ops"), "https://issuer#alice", "https://issuer", 4e9)
RULES = RecordingRules(
    {
        "shop": RecordingRuleConfig(groups=("dev",), namespaces=("shop",), required=False, typed_input=True),
        "vault": RecordingRuleConfig(namespaces=("vault",)),
        "bob": RecordingRuleConfig(users=("bob",)),
    }
)


@pytest.mark.parametrize(
    ("namespace", "demand"),
    [
        ("shop", Demand(required=False, typed_input=True)),
        ("vault", Demand(required=True, typed_input=False)),
        ("default", None),
        (None, Demand(required=True, typed_input=True)),
    ],
)
def test_a_user_in_a_namespace(namespace: str | None, demand: Demand | None) -> None:
    assert RULES.of([ALICE], namespace) == demand


def test_of_several_rules_the_strictest_counts() -> None:
    rules = RecordingRules(
        {"a": RecordingRuleConfig(required=False), "b": RecordingRuleConfig(users=("alice",), typed_input=True)}
    )
    assert rules.of([ALICE], "x") == Demand(required=True, typed_input=True)


def test_a_rule_of_others_is_none() -> None:
    rules = RecordingRules({"a": RecordingRuleConfig(users=("bob",), groups=("finance",))})
    assert rules.of([ALICE], "shop") is None
    assert rules.of([ALICE], None) is None


def test_p2_a_rule_for_a_group_that_the_api_server_adds_is_for_those_whom_it_adds_it_to() -> None:
    account = replace(ALICE, username="system:serviceaccount:prod:builder", groups=())
    for group, alice, builder in (
        ("system:authenticated", True, True),
        ("system:serviceaccounts", False, True),
        ("system:serviceaccounts:prod", False, True),
        ("system:serviceaccounts:test", False, False),
    ):
        rules = RecordingRules({"a": RecordingRuleConfig(groups=(group,))})
        assert [rules.of([one], "x") is not None for one in (ALICE, account)] == [alice, builder], group
