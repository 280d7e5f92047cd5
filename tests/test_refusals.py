"""The fields of a refusal as they come from outside: a rule that is known, and a text that may stand in quotes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.refusals import MAX_GROUPS, MAX_WANTED, NO_REFUSAL, Refusal, RefusalRule, read_refusal, sendable_groups


@pytest.mark.parametrize("wanted", ["arcbridge-relay", "https://relay.example.com/ a", "a, b", "x" * MAX_WANTED])
def test_an_audience_is_read(wanted: str) -> None:
    assert read_refusal("token.aud", wanted) == Refusal(RefusalRule.TOKEN_AUD, wanted)


@pytest.mark.parametrize(
    "wanted", ["", 'a"b', "a\\b", "a\nb", "a\x1b[31m", "é", " a", "x" * (MAX_WANTED + 1), 7, None, []]
)
def test_a_text_that_could_be_read_otherwise_is_none(wanted: object) -> None:
    assert read_refusal("claims.rule", wanted) == Refusal(RefusalRule.CLAIMS_RULE)


@pytest.mark.parametrize("rule", ["", "token.AUD", "token.new", "x" * 5000, 7, None, [], {}])
def test_a_rule_that_is_not_known_is_none(rule: object) -> None:
    assert read_refusal(rule, "wanted") in (NO_REFUSAL, Refusal(RefusalRule.NONE, "wanted"))


@given(st.text(), st.text())
def test_whatever_comes_can_be_quoted(rule: str, wanted: str) -> None:
    found = read_refusal(rule, wanted)
    assert found.rule in RefusalRule
    assert found.wanted.isascii()
    assert found.wanted == "" or (found.wanted.isprintable() and '"' not in found.wanted)


def test_a_rule_has_a_family() -> None:
    assert (RefusalRule.TOKEN_AUD_FORBIDDEN.family, RefusalRule.TOKEN_AUD_FORBIDDEN.check) == ("token", "aud.forbidden")


@pytest.mark.parametrize(
    ("groups", "more", "expected", "count"),
    [
        ("a\nb c", 3, ("a", "b c"), 3),
        ("", 0, (), 0),
        # What could end a quotation, or is too long, is no more than one of the others.
        ('a\n"b\né\n' + "x" * (MAX_WANTED + 1), 1, ("a",), 4),
        ("\n".join("x" * 50_000), 1 << 60, ("x",) * MAX_GROUPS, 10_000),
        ("\n\n\n", 0, (), 4),
    ],
)
def test_groups_come_in_bounds(groups: str, more: int, expected: tuple[str, ...], count: int) -> None:
    """docs/threats.md#J22."""
    found = read_refusal("policy.rule", "", groups, more)
    assert (found.groups, found.more_groups) == (expected, count)


def test_what_is_sent_is_what_is_read() -> None:
    sent = sendable_groups([f"g{n}" for n in range(50)] + ["é"])
    assert sent == tuple(f"g{n}" for n in range(MAX_GROUPS))
    assert read_refusal("policy.rule", "", "\n".join(sent), 41).groups == sent
