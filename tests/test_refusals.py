"""The fields of a refusal as they come from outside: a rule that is known, and a text that may stand in quotes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.refusals import MAX_WANTED, NO_REFUSAL, Refusal, RefusalRule, read_refusal


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
