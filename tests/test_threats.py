"""docs/threats.md and docs/security.md: citations lead somewhere, and rows and claims name tests that exist."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import citations, pages
from tests.support.citations import ROOT, SECURITY, claims, rows

PAGE = citations.THREATS

CITATION = re.compile(r"docs/(threats|security)\.md((?:#[A-Z]\d+(?:, | to | and )?)+)")
CODE = re.compile(r"#([A-Z]\d+)")

# A code alone, as a reader of the repository cannot look it up. The letters are those of the page's sections.
BARE = re.compile(r"(?<![\w#./-])[ABDEFGHIJLMNOQRSTUVWX]\d{1,2}(?!\w|[.-]\d)")
# What looks like a code and is none, each with its reason.
NO_CODES: dict[str, str] = {"tests/bench/": "A1, B2: names of made-up systems and rounds"}


def sources() -> Iterator[tuple[str, Path]]:
    for folder in ("arcbridge", "tests", "bench", "docs", "config"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".md", ".toml", ".yaml") and file not in (PAGE, Path(__file__)):
                yield file.relative_to(ROOT).as_posix(), file


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment, and of each string that spans a statement of its own or several lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.endswith('"""')):
            yield token.start[0], token.string


def test_each_citation_leads_to_a_row() -> None:
    known = {"threats": dict(rows()), "security": dict(claims())}
    found = 0
    for name, file in sources():
        for page, citation in CITATION.findall(file.read_text(encoding="utf-8")):
            for code in CODE.findall(citation):
                found += 1
                assert code in known[page], f"{name} cites docs/{page}.md#{code}, which is not there"
    assert found > 50, "the pattern finds the citations that are there"


def test_no_code_stands_alone() -> None:
    alone = [
        f"{name}:{line}: {match.group()}"
        for name, file in sources()
        if file.suffix == ".py" and not any(name.startswith(folder) for folder in NO_CODES)
        for line, text in comments(file.read_text(encoding="utf-8"))
        for match in BARE.finditer(text)
    ]
    assert not alone, "write docs/threats.md#CODE: " + ", ".join(alone)


def test_each_row_is_whole_and_its_tests_exist() -> None:
    for code, row in rows():
        attack, defence, held_by, state = (cell.strip() for cell in row.split(" | "))
        assert attack, code
        assert defence, code
        assert citations.tests(held_by), f"{code} names no test"
        assert citations.missing(row) == [], code
        # What is not held says why, or until when, in the same cell.
        assert re.fullmatch(r"held|(?:held|open|accepted)[,;:]? .{10,}", state), f"{code}: {state}"


def test_no_row_stands_twice() -> None:
    codes = [code for code, _ in rows()]
    assert len(codes) == len(set(codes)) > 50


def test_each_row_of_the_table_is_read() -> None:
    """A row that the pattern does not find would be held by nothing."""
    lines = [line for line in pages.read(PAGE).splitlines() if line.startswith("| <a id=")]
    assert len(lines) == len(rows())


def test_each_claim_says_what_it_rests_on_what_it_leaves_out_and_which_tests_hold_it() -> None:
    # A claim keeps its number wherever it stands, so that it can be cited; none is left out.
    assert sorted(int(code[1:]) for code, _ in claims()) == list(range(1, len(claims()) + 1))
    for code, text in claims():
        sentence, _, rest = text.partition("**")
        assert re.fullmatch(r"[^.]+(?:\.\S[^.]*)*\.", sentence), f"{code} is not one sentence: {sentence}"
        rests, leaves, held = re.findall(r"^\* \*([A-Z][a-z ]+):\* (.+)$", rest, re.MULTILINE)
        assert (rests[0], leaves[0], held[0]) == ("Rests on", "Does not cover", "Held by"), code
        assert min(len(rests[1]), len(leaves[1])) > 10, code
        assert citations.tests(held[1]), f"{code} names no test"
        assert citations.missing(held[1]) == [], code
        assert held[1].endswith(f"`make claim CODE={code}`"), code


def test_each_claim_is_read() -> None:
    assert len(claims()) == pages.read(SECURITY).count("\n* *Held by:*") > 20


@pytest.mark.timeout(600)  # alone it imports most of the tests and what they need
def test_the_command_of_a_claim_names_its_tests(request: pytest.FixtureRequest) -> None:
    """pytest itself collects what the command names: a test within a class goes by another name than one outside. A run
    of all tests has collected them."""
    named = {argument for code, _ in [*rows(), *claims()] for argument in citations.arguments(code)}
    assert len(named) > 200
    collected = set[str]()
    for item in request.session.items:
        file, *names = item.nodeid.partition("[")[0].split("::")
        collected |= {"::".join([file, *names[:depth]]) for depth in range(len(names) + 1)}
    if missing := sorted(named - collected):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", *missing]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_test_that_is_not_there_is_found() -> None:
    text = "`tests/test_threats.py::test_no_such_test`, `tests/no_such_file.py`, `tests/test_threats.py::sources`"
    assert citations.missing(text) == [
        "tests/test_threats.py has no test_no_such_test",
        "tests/no_such_file.py does not exist",
    ]
