"""No regular expression of the package takes more than linear time on what it may be given."""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest

from tests.fuzz.patterns import Expression, expressions, out_of_proportion, unread

BOUNDED = {
    "arcbridge.agent.kube.response:_FIELD": "runs over what _FIELDS has matched as a whole: each line has its colon",
    "arcbridge.identity.cel.timestamps:_DURATION_PART": "runs over what _DURATION has matched",
    "arcbridge.settings.config_loader:_DURATION_PART": "runs over what _DURATION has matched: nine digits at most",
}
"""What is out of proportion only on texts that never come to it, with the reason."""
COMPUTED = {
    "arcbridge/agent/kube/request_info.py": "names of query fields that the code looks for",
    "arcbridge/identity/policy_rules.py": "patterns of clusters' names; tests/identity/test_policy.py has the worst",
    "arcbridge/cli/initial_settings.py": "lines of the settings that are shipped",
}
"""Where a pattern is made at run time, and of what."""

pytestmark = pytest.mark.timeout(300)


@functools.cache
def found() -> list[Expression]:
    """All of the package: not at the collection, since that takes seconds."""
    return list(expressions())


def test_every_expression_is_found() -> None:
    assert len(found()) > 100
    assert not [name for name, count in Counter(_constants()).items() if count > 1]
    assert {one.partition(":")[0] for one in unread()} == set(COMPUTED)


@pytest.mark.parametrize("part", range(4))
def test_no_expression_is_out_of_proportion(part: int) -> None:
    texts = {one.place: text for one in found()[part::4] if (text := out_of_proportion(one))}
    assert {place: text for place, text in texts.items() if place not in BOUNDED} == {}


def test_what_is_listed_still_exists() -> None:
    assert set(BOUNDED) <= {one.place for one in found()}


@pytest.mark.parametrize(
    ("pattern", "anywhere", "found"),
    [
        (r"[^\s]{0,512}\Z", True, True),
        (r"(?:a|b|ab)*c", False, True),
        (r"([a-z]+)*:", False, True),
        (r"\s*(.*)\s*x", False, True),
        (r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", False, False),
        (r"\d+ms", True, True),
        (r"(?<!\d)\d++ms", True, False),
        (r"[a-z]{1,63}", False, False),
    ],
)
def test_the_pumps_tell_them_apart(pattern: str, anywhere: bool, found: bool) -> None:
    assert bool(out_of_proportion(Expression("", re.compile(pattern), anywhere))) is found


def test_patterns_of_bytes_and_with_flags_are_pumped() -> None:
    assert out_of_proportion(Expression("", re.compile(rb"(?i)(?:a|A|b)*c|(x+)+y"), False))


def _constants() -> list[str]:
    return [one.place for one in found() if one.place.rpartition(":")[2].isupper()]
