"""Every regular expression of the package takes work in proportion to its text.

Each one is looked for in the source, and its own parse tells where it repeats something without end. There runs of
characters are put in: letters of two alphabets, blanks, digits, marks, as many as a request head may have.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from re import _constants as code
from re import _parser as parser
from typing import Any

import pytest

import arcbridge

FEW, MANY = 2_000, 8_000
FILLERS = ("a", "A", "0", " ", "\t", "\n", "-", ".", "/", "=", "é", '"', "'", ",", "%", "{", "aA0", "a ", "a.", "a=")
ENDS = ("", "\x00", "b", " b", "\r\n")
LEAST = 0.02
"""Seconds of CPU below which nothing is said."""


def patterns() -> dict[str, tuple[re.Pattern[Any], bool]]:
    """Return the patterns that modules keep, by name, and whether the module looks for one anywhere in a text."""
    found = {}
    for module in pkgutil.walk_packages(arcbridge.__path__, "arcbridge."):
        if module.name.endswith("__main__"):
            continue
        loaded = importlib.import_module(module.name)
        source = Path(str(loaded.__file__)).read_text(encoding="utf-8")
        for name, value in vars(loaded).items():
            if isinstance(value, re.Pattern) and re.search(rf"(?m)^{name}\b", source):
                anywhere = re.search(rf"\b{name}\.(?!match\b|fullmatch\b)|[(,] *{name}\b(?!\.)", source)
                found[f"{module.name}.{name}"] = (value, anywhere is not None)
    return found


PATTERNS = patterns()
for _name in (
    # These read only texts of which another pattern has found that they are such parts and nothing else.
    "arcbridge.identity.cel.timestamps._DURATION_PART",
    "arcbridge.settings.config_loader._DURATION_PART",
):
    del PATTERNS[_name]


def texts(pattern: re.Pattern[Any]) -> Iterator[tuple[str, str]]:
    """Yield what stands before and behind each place where a run may grow."""
    text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    yield "", ""
    flags = pattern.flags & ~re.UNICODE
    yield from _places(list(parser.parse(text, flags)), "")


def _places(items: list[Any], before: str) -> Iterator[tuple[str, str]]:
    for position, (kind, value) in enumerate(items):
        behind = "".join(map(example, items[position + 1 :]))
        if kind in (code.MAX_REPEAT, code.MIN_REPEAT, code.POSSESSIVE_REPEAT):
            if value[1] > FEW:
                yield before + example((kind, value)), behind
            for first, last in _places(list(value[2]), before):
                yield first, last + behind
        elif kind is code.SUBPATTERN:
            for first, last in _places(list(value[3]), before):
                yield first, last + behind
        elif kind is code.BRANCH:
            for branch in value[1]:
                for first, last in _places(list(branch), before):
                    yield first, last + behind
        before += example((kind, value))


def example(item: tuple[Any, Any]) -> str:
    """Return a short text that this part of a pattern matches, as far as one is easily found."""
    kind, value = item
    if kind is code.LITERAL:
        return chr(value)
    if kind in (code.MAX_REPEAT, code.MIN_REPEAT, code.POSSESSIVE_REPEAT):
        return "".join(map(example, value[2])) * min(max(value[0], 1), value[1], 64)
    if kind is code.SUBPATTERN:
        return "".join(map(example, value[3]))
    if kind is code.ATOMIC_GROUP:
        return "".join(map(example, value))
    if kind is code.BRANCH:
        return "".join(map(example, value[1][0]))
    if kind in (code.IN, code.ANY, code.NOT_LITERAL, code.CATEGORY):
        return next((one for one in "a0 -./=A:,é\n" if _accepts(item, one)), "a")
    return ""


def _accepts(item: tuple[Any, Any], character: str) -> bool:
    kind, value = item
    if kind is code.ANY:
        return character != "\n"
    if kind is code.NOT_LITERAL:
        return ord(character) != value
    negated, found = False, False
    for what, which in value if kind is code.IN else [item]:
        negated = negated or what is code.NEGATE
        found = found or (what is code.LITERAL and which == ord(character))
        found = found or (what is code.RANGE and which[0] <= ord(character) <= which[1])
        found = found or (what is code.CATEGORY and _of_category(str(which), character))
    return found != negated


def _of_category(name: str, character: str) -> bool:
    sort = name.removeprefix("CATEGORY_").removeprefix("UNI_")
    among = {"DIGIT": str.isdigit, "SPACE": str.isspace, "WORD": lambda one: one.isalnum() or one == "_"}
    tell: Callable[[str], bool] = among[sort.removeprefix("NOT_")]
    return tell(character) != sort.startswith("NOT_")


def seconds(pattern: re.Pattern[Any], text: str, *, anywhere: bool) -> float:
    given: Any = text if isinstance(pattern.pattern, str) else text.encode()
    begin = time.process_time()
    if anywhere:
        for _ in pattern.finditer(given):
            pass
    else:
        pattern.match(given)
        pattern.fullmatch(given)
    return time.process_time() - begin


def slow(pattern: re.Pattern[Any], *, anywhere: bool) -> str:
    """Return a text whose work grows with the square of its length, as an expression; empty where none was found."""
    for (before, behind), filler, end in itertools.product(set(texts(pattern)), FILLERS, ENDS):
        few, many = (before + filler * (count // len(filler)) + end + behind for count in (FEW, MANY))
        for _ in range(3):  # what seems slow is tried again: others use the machine, too
            took = seconds(pattern, many, anywhere=anywhere)
            if took < LEAST or took < 9 * seconds(pattern, few, anywhere=anywhere):
                break
        else:
            return f"{before!r} + {filler!r} * {MANY} + {end + behind!r}: {took:.2f} s"
    return ""


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_a_pattern_grows_with_its_text(name: str) -> None:
    pattern, anywhere = PATTERNS[name]
    assert slow(pattern, anywhere=anywhere) == ""


@pytest.mark.parametrize(
    "text",
    [
        # What one GET stopped the agent with: a run of blanks within a value.
        r"(?im)^kubectl-(command|session):[ \t]*([^\r\n]*?)[ \t]*\r?$",
        # What looks ahead takes more for a word than what looks back.
        r"(?<![A-Za-z0-9_])(?=\w*[A-Z])[A-Za-z0-9_]{40,}+",
    ],
)
def test_a_pattern_that_goes_back_and_forth_is_found(text: str) -> None:
    assert slow(re.compile(text), anywhere=True) != ""
