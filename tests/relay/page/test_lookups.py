"""What the page says of one user: which rules lead to the caller's clusters, and nothing of what concerns others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from arcbridge.identity.policy import Policy
from arcbridge.identity.policy_rules import Rule, covers
from arcbridge.pki.authority import Authority
from arcbridge.relay.admin import Administered
from arcbridge.relay.operations import Question, Row
from arcbridge.relay.page import lookups
from arcbridge.relay.page.lookups import MOST_CLUSTERS, MOST_COMPARED, MOST_RULES, TOGETHER, UserReach, reach_of
from arcbridge.relay.registry.base import Registry
from arcbridge.settings.config import RelayConfig
from tests.support.clock import Clock

POLICY = """
[[allow]]
groups = ["oidc:shop-users", "oidc:shop-more"]
clusters = ["shop-*"]

[[allow]]
groups = ["oidc:bank-root"]
clusters = ["bank"]

[[admin]]
groups = ["oidc:owners"]
clusters = ["*"]
what = ["read"]
"""
NAMES = ("bank", "shop-1", "shop-2")


@dataclass
class Questioned:
    """A relay that knows of one user, whom rules for shop and bank and an `[[admin]]` name by groups."""

    groups: list[str] = field(default_factory=lambda: ["oidc:bank-root", "oidc:owners"])
    rows: dict[str, list[Row]] = field(default_factory=dict)
    comparing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self, question: Question) -> list[Row]:
        if question["ask"] == "user":
            return [{"from": "join", "at": 7.0, "groups": self.groups, "more": 12}]
        return self.rows.get(question["ask"], [])

    async def reach(self, policy: Policy, *patterns: str, names: Sequence[str] = NAMES) -> UserReach:
        async def authority() -> Authority:
            raise AssertionError("not asked for")

        def registry(_: bool) -> nullcontext[Registry]:
            raise AssertionError("not asked for")

        config = RelayConfig(data_dir=Path("/nowhere"))
        relay = Administered(config, registry, authority, self.ask, nullcontext, Clock())
        own = [name for name in names if covers(patterns, name)]
        return await reach_of("ceo", relay, policy, own, patterns, self.comparing, whole=False)


async def test_k11_of_a_token_one_sees_what_leads_to_own_clusters() -> None:
    """docs/threats.md#K11: not when a user came whom nothing leads here, nor groups that lead elsewhere."""
    policy, relay = Policy.load(POLICY), Questioned()
    found = await relay.reach(policy, "shop-*")
    assert (found.token, found.rules, found.complete) == (None, (), True)
    # A rule for everybody says nothing of this user.
    everybody = Policy.load(POLICY.replace('groups = ["oidc:shop-users", "oidc:shop-more"]', 'users = ["*"]'))
    found = await relay.reach(everybody, "shop-*")
    assert (found.token, len(found.rules)) == (None, 1)
    relay.groups.append("oidc:shop-users")
    assert (await relay.reach(policy, "shop-*")).token == {"at": 7.0, "groups": ["oidc:shop-users"]}
    assert (await relay.reach(policy, "bank")).token == {"at": 7.0, "groups": ["oidc:bank-root"]}


def rules(count: int, clusters: str, more: str = "") -> Policy:
    return Policy.load(f'[[allow]]\nusers = ["ceo"]\nclusters = [{clusters}]\n' * count + more)


async def test_a_reach_is_complete_at_ten_thousand_clusters_or_says_so() -> None:
    many, patterns = [f"shop-{number}" for number in range(10_000)], '"bank", "far-*", "near-*"'
    last = '[[allow]]\nusers = ["ceo"]\nclusters = ["shop-9999"]\n'
    reading = asyncio.create_task(Questioned().reach(rules(16, patterns, last), "shop-*", names=many))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    found = reading.result()
    assert ([one.clusters for one in found.rules], found.complete) == ([("shop-9999",)], True)
    assert turns > 16 * 3 * len(many) / (2 * TOGETHER), "others have a turn between some comparisons"
    # More than is compared, which hides no rule that is; names cost nothing; more rules than are shown.
    far = ", ".join(f'"far-{number}*"' for number in range(MOST_COMPARED // len(many) + 1))
    found = await Questioned().reach(rules(1, far, last), "shop-*", names=many)
    assert (len(found.rules), found.complete) == (1, False)
    listed = ", ".join(f'"shop-{number}"' for number in range(1000))
    found = await Questioned().reach(rules(2, listed), "shop-*", names=many)
    assert ([one.more for one in found.rules], found.complete) == ([1000 - MOST_CLUSTERS] * 2, True)
    found = await Questioned().reach(rules(MOST_RULES, '"shop-1"'), "shop-*")
    assert (len(found.rules), found.complete) == (MOST_RULES, True)
    found = await Questioned().reach(rules(MOST_RULES + 1, '"shop-1"'), "shop-*")
    assert (len(found.rules), found.complete) == (MOST_RULES, False)


async def test_k13_users_are_compared_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K13: each takes a part of every turn of the loop."""
    under_way, most, reached = 0, 0, lookups._reached

    async def counted(rule: Rule, clusters: Sequence[str], left: int) -> tuple[list[str] | None, int]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        found = await reached(rule, clusters, left)
        under_way -= 1
        return found

    monkeypatch.setattr(lookups, "_reached", counted)
    relay, policy = Questioned(), rules(3, '"shop-*"')
    found = await asyncio.gather(*(relay.reach(policy, "shop-*") for _ in range(5)))
    assert ({len(one.rules) for one in found}, most) == ({3}, 1)


async def test_k11_a_session_or_a_refusal_at_own_clusters_makes_a_user_known() -> None:
    """docs/threats.md#K11."""
    policy = Policy.load(POLICY)
    for kind in ("sessions", "refusals"):
        for cluster, token in (("bank", None), ("shop-1", {"at": 7.0, "groups": []})):
            relay = Questioned(rows={kind: [{"user": "ceo", "cluster": cluster, "at": 1.0}]})
            assert (await relay.reach(policy, "shop-*")).token == token, (kind, cluster)
