"""Functions on strings, where Python and Go differ; `test_evaluation` has the table of what they give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.identity.cel.strings import (
    MAX_SIZE,
    bounded,
    join,
    lower_ascii,
    quoted_as_go,
    replace,
    split,
    substring,
    trim,
    upper_ascii,
)
from arcbridge.identity.cel.values import EvaluationError, LimitExceeded


def test_nothing_larger_than_the_bound_is_made() -> None:
    bounded(MAX_SIZE)
    with pytest.raises(LimitExceeded):
        bounded(MAX_SIZE + 1)
    with pytest.raises(LimitExceeded):
        replace("x" * 2000, "x", "y" * 1000)
    with pytest.raises(LimitExceeded):
        join(["x" * 1000] * 1000, "y" * 100)
    assert len(replace("x" * 2000, "x", "y" * 1000, 2)) == 3998


def test_ascii_alone_changes_its_case() -> None:
    assert lower_ascii("ÀA") == "Àa"
    assert upper_ascii("ßa") == "ßA"


def test_what_is_blank() -> None:
    assert trim("\u2003 a\x85") == "a"
    assert trim("\x1ca\x1f") == "\x1ca\x1f", "Python's strip() would take these"


def test_parts() -> None:
    assert split("a,b,c", ",", 2) == ["a", "b,c"]
    assert split("abc", "", 2) == ["a", "bc"]
    assert split("", "") == []
    assert split("", ",") == [""]
    assert split("a,b", ",", 0) == []
    assert replace("aaa", "a", "b", 0) == "aaa"


@given(st.text(max_size=20), st.text(min_size=1, max_size=3))
def test_what_was_split_can_be_joined(text: str, separator: str) -> None:
    assert join(split(text, separator), separator) == text


def test_what_go_quotes() -> None:
    assert quoted_as_go('a"\n\x01é\u200b\U000e0001') == '"a\\"\\n\\x01é\\u200b\\U000e0001"'


@pytest.mark.parametrize(("start", "end"), [(2, 1), (-1, 2), (0, 9), (9, 9)])
def test_ranges_outside_a_string(start: int, end: int) -> None:
    with pytest.raises(EvaluationError):
        substring("abc", start, end)
