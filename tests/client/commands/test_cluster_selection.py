"""Which clusters a command is for."""

from __future__ import annotations

import pytest

from arcbridge.client.commands.cluster_selection import Chosen, check_names, choose, is_pattern
from arcbridge.errors import ConfigError, Unreachable

LISTED = [
    {"name": "prod-b", "state": "Offline"},
    {"name": "prod-a"},
    {"name": "prod-old", "revoked": True},
    {"name": "staging"},
]


def names(chosen: list[Chosen]) -> list[str]:
    return [one.name for one in chosen]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["prod-*"], ["prod-a", "prod-b"]),
        (["*"], ["prod-a", "prod-b", "staging"]),
        (["prod-?", "staging"], ["prod-a", "prod-b", "staging"]),
        (["prod-[!a]"], ["prod-b"]),
        (["staging", "prod-*"], ["staging", "prod-a", "prod-b"]),
        (["not-listed"], ["not-listed"]),
        (["staging", "s*"], ["staging"]),
        (["prod-old"], ["prod-old"]),
    ],
)
def test_choose(wanted: list[str], found: list[str]) -> None:
    assert names(choose(wanted, LISTED)) == found


def test_what_a_pattern_chose_says_so_unless_it_was_named_too() -> None:
    assert choose(["prod-*", "prod-b"], LISTED) == [Chosen("prod-a", "prod-*"), Chosen("prod-b")]


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(Unreachable, match="no cluster that you may reach matches 'x-\\*'"):
        choose(["staging", "x-*"], LISTED)


@pytest.mark.parametrize("name", ["Prod", "a..b", "Prod-*", "a b*", "*" * 129, "prod-*\x1b[2J", "../*"])
def test_what_is_neither_a_name_nor_a_pattern(name: str) -> None:
    if name == "../*":
        check_names(["..*"])  # dots are of names, so a pattern may have them
    with pytest.raises(ConfigError, match="flag --cluster"):
        check_names([name])


def test_no_cluster() -> None:
    with pytest.raises(ConfigError, match="required"):
        check_names([])
    assert not is_pattern("prod-1.eu")
