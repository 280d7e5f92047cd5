"""Who may reach which cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arcbridge.errors import ConfigError
from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import Policy, PolicyFile
from tests.support.clock import Clock

TEXT = """
[[allow]]
users = ["alice"]
groups = ["platform"]
clusters = ["prod-*", "staging"]

[[allow]]
users = ["*"]
clusters = ["demo"]
"""


def who(user: str, *groups: str) -> Identity:
    return Identity(user, "", groups, "s", "i", 0.0)


TABLE = [
    (who("alice"), "prod-eu", True),
    (who("alice"), "prod-", True),
    (who("alice"), "prod", False),
    (who("alice"), "xprod-eu", False),
    (who("alice"), "staging", True),
    (who("alice"), "staging2", False),
    (who("Alice"), "staging", False),
    (who("bob"), "staging", False),
    (who("bob", "platform"), "prod-eu", True),
    (who("platform"), "prod-eu", False),
    (who("bob", "alice"), "prod-eu", False),
    (who("bob"), "demo", True),
    (who("*"), "staging", False),
]


@pytest.mark.parametrize(("identity", "cluster", "allowed"), TABLE)
def test_table(identity: Identity, cluster: str, allowed: bool) -> None:
    assert Policy.load(TEXT).allows(identity, cluster) is allowed


def test_nothing_is_allowed_by_default() -> None:
    assert not Policy.load("").allows(who("alice"), "prod")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deny = []", "deny: unknown key"),
        ("[allow]\nusers=['a']", r"write \[\[allow\]\]"),
        ("[[allow]]\nusers=['a']\nclusters=['*']\nname='x'", r"allow\[0\]\.name: unknown key"),
        ("[[allow]]\nclusters=['*']", r"allow\[0\]: needs users or groups"),
        ("[[allow]]\nusers=['a']", r"allow\[0\]\.clusters: needs"),
        ("[[allow]]\nusers='a'\nclusters=['*']", r"allow\[0\]\.users: must be a list"),
        ("[[allow]]\nusers=['']\nclusters=['*']", r"allow\[0\]\.users\[0\]"),
        ("[[allow]]\nusers=['a']\nclusters=['Prod']", r"allow\[0\]\.clusters\[0\]"),
        ("[[allow]]\nusers=['a']\nclusters=['[ab]']", r"allow\[0\]\.clusters\[0\]"),
        ("[[allow]]\ngroups=['*']\nclusters=['a']", "for everyone write"),
        ("[[allow]", "policy: "),
        pytest.param("allow = " + "1" * 5000, "policy: not valid TOML", id="digits"),
        pytest.param("allow = " + "[" * 5000, "policy: not valid TOML", id="nested"),
    ],
)
def test_refused_by_path(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy.load(text)


def test_a_changed_file_counts_and_a_broken_one_does_not(tmp_path: Path) -> None:
    path, clock = tmp_path / "policy.toml", Clock()
    path.write_text(TEXT)
    policy = PolicyFile(path, clock=clock)
    assert policy.allows(who("alice"), "staging")
    path.write_text("broken = ")
    clock.now += 1
    assert policy.allows(who("alice"), "staging")
    assert "policy.toml" in policy.error
    path.write_text("")
    clock.now += 1
    assert not policy.allows(who("alice"), "staging")
    assert policy.error == ""
    os.unlink(path)
    clock.now += 1
    assert not policy.allows(who("alice"), "staging")
    assert "cannot be read" in policy.error


def test_the_first_reading_must_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        PolicyFile(tmp_path / "none.toml")


def test_a_number_that_python_does_not_write_is_a_mistake_like_any_other(tmp_path: Path) -> None:
    """TOML's hexadecimal numbers have no bound, and Python writes none of more than 4300 digits."""
    with pytest.raises(ConfigError, match="unknown key"):
        Policy.load(f"x = 0x{'f' * 5000}")
