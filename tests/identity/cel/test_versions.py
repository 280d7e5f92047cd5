"""Semantic versions."""

from __future__ import annotations

import itertools

import pytest

from arcbridge.identity.cel.values import UINT_MAX, EvaluationError
from arcbridge.identity.cel.versions import read_version
from tests.identity.cel.calls import called

ORDER = [
    "1.0.0-1", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0", "1.2.0",
    "1.10.0",
]  # fmt: skip


def test_the_order_of_the_specification() -> None:
    for (one, left), (other, right) in itertools.product(enumerate(ORDER), repeat=2):
        assert called("compareTo", read_version(left), read_version(right)) == (one > other) - (one < other)


@pytest.mark.parametrize(
    "text", ["", "1", "1.2", "v1.2.3", "01.2.3", "1.2.3-", "1.2.3-01", "1.2.3+", "1.2.3-a..b", "1.2.-3"]
)
def test_no_version(text: str) -> None:
    assert not called("isSemver", text)


NORMALIZED = [("v1.2.3", "1.2.3"), ("1", "1.0.0"), ("01.002", "1.2.0"), ("v0", "0.0.0"), ("1.2.3-a", "1.2.3-a")]


@pytest.mark.parametrize(("text", "same"), NORMALIZED, ids=[row[0] for row in NORMALIZED])
def test_versions_that_are_normalized(text: str, same: str) -> None:
    assert read_version(text, True) == read_version(same)


@pytest.mark.parametrize("text", ["1-a", "1.2+b", "a", "1.a"])
def test_what_cannot_be_normalized(text: str) -> None:
    assert not called("isSemver", text, True)


def test_parts() -> None:
    assert [called(name, read_version("1.2.3")) for name in ("major", "minor", "patch")] == [1, 2, 3]
    with pytest.raises(EvaluationError):
        called("major", "1.2.3")
    assert read_version("1.0.0+a") == read_version("1.0.0+b")


def test_t41_a_number_of_many_digits_in_a_pre_release_is_no_version() -> None:
    assert called("isSemver", f"1.0.0-{UINT_MAX}")
    assert not called("isSemver", f"1.0.0-{UINT_MAX + 1}")
    assert not called("isSemver", "1.0.0-" + "1" * 5000)
