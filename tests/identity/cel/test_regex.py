"""Regular expressions: the language of RE2, whole matches, and a bound on what one may take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.identity.cel import regex
from arcbridge.identity.cel.values import EvaluationError, LimitExceeded
from tests.identity.cel.stopwatch import LENGTH, seconds

GROUPS = [
    ("(a)b", "(?:a)b"), ("(?P<n>a)(?<m>b)", "(?:a)(?:b)"), ("(?:a)(?i)b(?i:c)", "(?:a)(?i)b(?i:c)"),
    ("\\(a\\)", "\\(a\\)"), ("[(]a[)]", "[(]a[)]"), ("[]()]", "[]()]"), ("[^]()]", "[^]()]"),
    ("[[:alpha:](]", "[[:alpha:](]"), ("\\Q(a)\\E(b)", "\\Q(a)\\E(?:b)"), ("\\Q(a", "\\Q(a"),
    ("((a)|(b))*", "(?:(?:a)|(?:b))*"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "without"), GROUPS, ids=[row[0] for row in GROUPS])
def test_groups_that_capture_nothing(pattern: str, without: str) -> None:
    assert regex.without_groups(pattern) == without
    regex.check(without)


@given(st.text("ab()[]^\\QE|*?", max_size=8), st.text("ab()[]^", max_size=8))
def test_a_pattern_means_the_same_without_its_groups(pattern: str, text: str) -> None:
    try:
        expected = regex.matches(text, pattern)
    except EvaluationError:
        return
    assert regex.matches(text, regex.without_groups(pattern)) == expected


@pytest.mark.parametrize("pattern", ["(", "[", "a**", "(?=a)", "\\1", "a{1001}", "(?<n", "\ud800"])
def test_no_pattern(pattern: str) -> None:
    with pytest.raises(EvaluationError):
        regex.check(pattern)


@pytest.mark.parametrize("pattern", ["a\\C", "(?P<é>x)", "(?<é>x)"])
def test_t63_what_go_refuses_is_no_pattern(pattern: str) -> None:
    with pytest.raises(EvaluationError):
        regex.check(pattern)


def test_what_only_looks_like_what_go_refuses_is_a_pattern() -> None:
    assert regex.matches("\\C(?P<é>", "^\\Q\\C(?P<é>\\E$")
    assert regex.matches("\\C", "^\\\\C$")
    assert regex.matches("x", "(?P<a_1>x)")


def test_matches_are_whole() -> None:
    assert regex.find("alice@example.com", "(ali)ce@") == "alice@"
    assert regex.find("a", "b") == ""
    assert regex.find_all("a1b22", "([0-9])([0-9])?") == ["1", "22"]
    assert regex.find_all("aaa", "a", 2) == ["a", "a"]
    assert regex.find_all("aaa", "a", 0) == []
    with pytest.raises(EvaluationError, match="empty text"):
        regex.find_all("abc", "x*")


def test_a_group_without_a_name_is_no_pattern() -> None:
    with pytest.raises(EvaluationError, match="not a regular expression"):
        regex.find("a", "(?P<>a)")


def test_a_pattern_that_python_would_run_for_years() -> None:
    assert regex.matches("a" * 30_000 + "!", "^(a+)+$") is False


def test_a_pattern_is_too_expensive_for_a_long_text() -> None:
    pattern = "(.{1,1000})(.{1,1000})z"
    assert regex.weight(pattern) == 1000 * len(pattern)
    assert regex.matches("a" * 100, pattern) is False
    with pytest.raises(LimitExceeded):
        regex.matches("a" * 30_000, pattern)
    assert regex.weight("^[a-z]{1,64}@example") == 64 * 20
    assert regex.weight("a{2,}b{3}") == 6 * 9


@pytest.mark.parametrize("pattern", ["[" + "[:" * 24_000, "(?P<" * 12_000, "(?" * 24_000, "(" * LENGTH])
def test_t41_a_long_pattern_loses_its_groups_in_linear_time(pattern: str) -> None:
    assert seconds(regex.without_groups, pattern) < 0.5
