"""Problems: collected, named, placed."""

from __future__ import annotations

import pytest

from arcbridge.errors import ConfigError
from arcbridge.settings.problems import Place, Problem, Problems, SettingsRefused, Severity, located


def test_a_check_goes_on_behind_a_mistake() -> None:
    problems = Problems()
    with problems.collect("limits"):
        raise ConfigError("limits.streams: must be 0, for no limit, or above")
    with problems.collect("relays[0]"):
        raise ConfigError("address 'x y': expected only host and port")
    with problems.collect("max_age"):
        raise ConfigError("forbidden: 'a' is an audience")
    problems.warn("token_mode", "on")
    assert [(problem.setting, problem.message) for problem in problems] == [
        ("limits.streams", "limits.streams: must be 0, for no limit, or above"),
        ("relays[0]", "relays[0]: address 'x y': expected only host and port"),
        ("forbidden", "forbidden: 'a' is an audience"),
        ("token_mode", "token_mode: on"),
    ]
    assert len(problems.errors) == 3
    assert [problem.severity for problem in problems.warnings] == [Severity.WARNING]


def test_only_errors_refuse() -> None:
    problems = Problems()
    problems.warn("a", "b")
    problems.refuse()
    problems.error("c", "d")
    with pytest.raises(SettingsRefused, match=r"^c: d$") as caught:
        problems.refuse()
    assert len(caught.value.problems) == 2
    again = Problems()
    with again.collect("other"):
        raise caught.value
    assert list(again) == list(problems)


def test_places() -> None:
    there = Problem("policy", "wrong", place=Place("policy.toml", 3, 9))
    here = Problem("listen", "listen: wrong")
    found = located([there, here], lambda setting: Place("flag --listen") if setting == "listen" else None)
    assert [str(problem) for problem in found] == [
        "policy.toml, line 3, column 9: wrong",
        "flag --listen: listen: wrong",
    ]
    assert str(Problem("x", "x: wrong")) == "x: wrong"


def test_the_same_is_said_once() -> None:
    problems = Problems()
    problems.error("a", "b")
    problems.error("a", "b")
    assert len(list(problems)) == 1
