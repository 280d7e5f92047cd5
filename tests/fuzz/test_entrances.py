"""The table of entrances in docs/threats.md names what is there: functions, constants and targets."""

from __future__ import annotations

from tests.fuzz.costs import entrances, named, table
from tests.fuzz.readers import READERS
from tests.fuzz.targets import TARGETS

ENTRANCES = entrances()
NOT_READ = {"sessions"}
"""Targets whose bytes are no input: they choose what happens to two sessions."""


def test_each_row_is_read() -> None:
    lines = [line for line in table().splitlines() if line.startswith("| ") and "`" in line]
    assert len(lines) == len(ENTRANCES) > 25, "a row that the pattern does not take is held by nothing"


def test_each_target_is_an_entrance_and_each_entrance_has_a_target() -> None:
    assert {one.target for one in ENTRANCES} == set(TARGETS) - NOT_READ == set(READERS)


def test_each_function_exists() -> None:
    assert [one.reader for one in ENTRANCES if not callable(named(one.reader))] == []


def test_each_bound_is_the_constant_of_the_code() -> None:
    wrong = {
        one.constant: (one.largest, named(one.constant))
        for one in ENTRANCES
        if one.constant is not None and named(one.constant) != one.largest
    }
    assert wrong == {}
    assert sum(one.constant is None for one in ENTRANCES) <= 1, "a bound that the code does not have"


def test_each_row_has_bounds_and_an_account() -> None:
    for one in ENTRANCES:
        assert 0 < one.memory <= 1000, one.source
        assert 0 < one.steps <= 5000, one.source
        assert one.pays.strip(), one.source
