"""The search: a marker is found however it is written."""

from __future__ import annotations

import base64
import os

import pytest

from tests.blindness.sight import find, memory

MARK = "marker4711"


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
@pytest.mark.parametrize("after", ["", "x", "xy"])
def test_a_marker_within_other_text_is_found_in_each_form(before: str, after: str) -> None:
    text = f"{before}{MARK}{after}"
    for data in (
        text.encode(),
        text.encode("utf-16-le"),
        text.encode().hex().encode(),
        base64.b64encode(text.encode()),
        base64.urlsafe_b64encode(text.encode()),
    ):
        assert find([MARK], {"place": data}), data


def test_what_is_not_there_is_not_found() -> None:
    assert find([MARK], {"place": b"marker471 " + base64.b64encode(b"marker4719")}) == []
    assert find([MARK], {"one": b"", "two": MARK.encode()}) == [f"{MARK!r} (as it is) in 'two'"]


def test_memory_of_a_process_has_what_it_holds() -> None:
    held = os.urandom(16).hex()
    assert find([held], memory(os.getpid()))
