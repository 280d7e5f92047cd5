"""Which rule decides, or which is nearest and what it lacks."""

from __future__ import annotations

import pytest

from arcbridge.identity.policy import Policy
from arcbridge.identity.policy_rules import explain, named, quoted, who

POLICY = Policy.load(
    """[[allow]]
groups = ["oidc:dev"]
clusters = ["shop-*"]
[[allow]]
users = ["oidc:anna"]
groups = ["oidc:ops"]
clusters = ["shop-*", "lab"]
[[allow]]
users = ["*"]
clusters = ["demo"]
"""
)


@pytest.mark.parametrize(
    ("user", "groups", "cluster", "rule", "by"),
    [
        ("x", ("oidc:dev",), "shop-1", "allow[0]", 'group "oidc:dev"'),
        ("oidc:anna", (), "lab", "allow[1]", 'user "oidc:anna"'),
        ("", (), "demo", "allow[2]", 'user "*"'),
    ],
)
def test_what_allows(user: str, groups: tuple[str, ...], cluster: str, rule: str, by: str) -> None:
    found = explain(POLICY.rules, named(user, groups), cluster)
    assert found.rule is not None
    assert (found.allowed, found.rule.path, found.by) == (True, rule, by)
    assert found.sentence() == f"{rule} (line {found.rule.line}) allows it, by the {by}"


@pytest.mark.parametrize(
    ("user", "groups", "cluster", "rule", "lacks", "near"),
    [
        # A rule for the cluster, of several the one with a name that resembles one of the user's.
        ("x", ("other",), "shop-1", "allow[0]", ("group",), ""),
        ("x", ("OPS",), "shop-1", "allow[1]", ("group", "user"), "oidc:ops"),
        ("x", ("/dev",), "shop-1", "allow[0]", ("group",), "oidc:dev"),
        ("anna", (), "lab", "allow[1]", ("group", "user"), "oidc:anna"),
        # No rule for the cluster: one for the user.
        ("x", ("oidc:ops",), "lba", "allow[1]", ("cluster",), "lab"),
        ("x", ("oidc:ops",), "munich", "allow[1]", ("cluster",), ""),
    ],
)
def test_what_is_nearest(
    user: str, groups: tuple[str, ...], cluster: str, rule: str, lacks: tuple[str, ...], near: str
) -> None:
    found = explain(POLICY.rules, named(user, groups), cluster)
    assert found.rule is not None
    assert (found.allowed, found.rule.path, found.lacks, found.near) == (False, rule, lacks, near)
    assert rule in found.sentence()
    assert (f'did you mean "{near}"?' in found.sentence()) == bool(near)
    assert found.allowed == POLICY.allows(named(user, groups), cluster)


def test_a_rule_that_lacks_everything_is_explained_too() -> None:
    found = explain(POLICY.rules[:2], named("x"), "munich")
    assert found.sentence() == (
        'no rule allows it, and the nearest, allow[0] (line 1), is for the clusters "shop-*" and is for the groups '
        '"oidc:dev"'
    )
    assert explain((), named("x"), "munich").sentence() == "the policy has no rule"


def test_names_for_people() -> None:
    assert who(named("a", ("b", "c"))) == 'user "a" in the groups "b", "c"'
    assert who(named("", ("b",))) == 'a user in the groups "b"'
    assert who(named("a")) == 'user "a"'
    assert quoted("gfedcba") == '"a", "b", "c", "d", "e" and 2 more'


ACTED = Policy.load(
    """[[allow]]
groups = ["oidc:dev"]
clusters = ["shop-*"]
[[allow]]
groups = ["oidc:dev"]
actors = ["bot", "ci"]
clusters = ["lab"]
"""
)


@pytest.mark.parametrize(
    ("actor", "cluster", "sentence"),
    [
        ("bot", "lab", 'allow[1] (line 4) allows it, by the group "oidc:dev" through the actors "bot", "ci"'),
        ("bot", "shop-1",
         "no rule allows it, and the nearest, allow[0] (line 1), is for users without an actor"),
        ("", "lab", 'no rule allows it, and the nearest, allow[1] (line 4), is for the actors "bot", "ci"'),
        ("x", "munich",
         'no rule allows it, and the nearest, allow[0] (line 1), is for the clusters "shop-*" and is for users without '
         "an actor"),
    ],
)  # fmt: skip
def test_what_a_rule_says_of_an_actor(actor: str, cluster: str, sentence: str) -> None:
    identity = named("anna", ("oidc:dev",), actor)
    found = explain(ACTED.rules, identity, cluster)
    assert found.sentence() == sentence
    assert found.allowed == ACTED.allows(identity, cluster)
    assert ("actor" in found.lacks) == (not found.allowed)
    assert who(named("a", ("b",), "bot")) == 'user "a" in the groups "b" through the actor "bot"'
