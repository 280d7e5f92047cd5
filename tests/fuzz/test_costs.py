"""Every entrance costs memory and work in proportion to its bytes, and the oracle that says so finds what does not."""

from __future__ import annotations

import random
import re

import pytest

from tests.fuzz import costs
from tests.fuzz.costs import Entrance, Read
from tests.fuzz.readers import IN_BYTES, READERS

IN_CALLS = 4 * 1024
"""Bytes that come one by one."""
LARGEST = 32 * 1024
"""Bytes of an input here; `python -m tests.fuzz.costs` goes up to the largest of each entrance."""
SMALLER = dict.fromkeys(("authentication_file", "foreign_kubeconfig", "kubeconfig", "policy_file"), 4 * 1024)
"""Less for files of operators and users, whose parsers are slow."""
LARGER = {"pod_body": 128 * 1024}
"""Where half of the bytes beside the other half were once a GiB."""
EACH = 1
"""Spans of a kind that are pumped in each input of a corpus."""
MOST = 12
"""Shapes of a target at most; `python -m tests.fuzz.costs` tries all."""
MORE = {"pod_body": (6, 60)} | dict.fromkeys(SMALLER, (1, 4))
"""Spans and shapes where a product of two was once found: more, and where a parser is slow: fewer."""

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("target", READERS)
def test_an_entrance_costs_what_its_bytes_are_worth(target: str) -> None:
    largest = SMALLER.get(target, LARGER.get(target, LARGEST))
    each, most = MORE.get(target, (EACH, MOST))
    assert list(costs.excesses(target, READERS[target], each=each, largest=largest, most=most)) == []


@pytest.mark.parametrize("target", IN_BYTES)
def test_bytes_that_come_one_by_one_cost_what_they_cost_together(target: str) -> None:
    """docs/threats.md#J28: the same bytes in twice as many calls are twice the work, and not four times."""
    read = IN_BYTES[target]
    grown = [shape for _, shape in costs.inputs(target, EACH)]
    for shape in grown[:1] + random.Random(target).sample(grown, min(MOST, len(grown))):
        few, fewer, many = (costs.lines(read, shape(size)) for size in (IN_CALLS // 4, IN_CALLS // 2, IN_CALLS))
        assert many <= costs.LINE_ALLOWANCE or not costs.is_square(many, fewer, few), (shape(60), few, fewer, many)


def test_a_parser_that_begins_anew_at_each_byte_is_found() -> None:
    def read(data: bytes) -> None:
        for end in range(len(data)):
            for _ in data[:end:16]:
                pass

    few, fewer, many = (costs.lines(read, bytes(size)) for size in (IN_CALLS // 4, IN_CALLS // 2, IN_CALLS))
    assert costs.is_square(many, fewer, few)


def entrance(memory: int = 10, steps: int = 100) -> Entrance:
    return Entrance("", "", 1 << 20, None, memory, steps, "", "")


def product(data: bytes) -> list[bytes]:
    """One text for each entry and name, as the audit once made of a pod."""
    name, _, entries = data.partition(b":")
    return [name + entry for entry in entries.split(b",")]


def backwards(data: bytes) -> str:
    """The last word of a text, looked for from each of its positions, as `clean` once did."""
    return re.sub(r"[^\s]{0,512}\Z", "", data.decode("latin-1")[:4096])


def pairs(data: bytes) -> int:
    """Each byte beside each other one, in Python."""
    return sum(1 for one in data[:600] for other in data[:600] if one == other)


def test_memory_of_names_times_entries_is_found() -> None:
    data = b"a" * 8000 + b":" + b"b," * 8000
    assert "bytes of memory" in costs.excess(product, data, entrance())
    assert costs.excess(len, data, entrance()) == ""


def test_a_pattern_that_looks_back_from_each_position_is_found() -> None:
    assert "steps" in costs.excess(backwards, b"a" * 4097, entrance(steps=30))


@pytest.mark.parametrize(
    ("read", "size", "words"),
    [
        (pairs, 600, "lines of Python become"),
        # With the cube of its length: what others do on the machine meanwhile does not hide that.
        (lambda data: re.search(rb"a*a*b", data), 900, "steps become"),
        (lambda data: re.search(rb"b", data * 100), 16_000, ""),
        (lambda data: sum(data), 400_000, ""),
    ],
)
def test_growth_that_is_no_proportion_is_found(read: Read, size: int, words: str) -> None:
    found = costs.growth(read, lambda size: b"a" * size, size)
    assert words in found
    assert bool(found) == bool(words)
