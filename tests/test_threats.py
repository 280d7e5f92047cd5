"""docs/threats.md: every citation of a threat leads to a row, and every row names tests that exist."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "threats.md"

ROW = re.compile(r'^\| <a id="([A-Z]\d+)"></a>\1 \|(.*)\|$', re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
CITATION = re.compile(r"docs/threats\.md((?:#[A-Z]\d+(?:, | to | and )?)+)")
CODE = re.compile(r"#([A-Z]\d+)")

# A code alone, as a reader of the repository cannot look it up. The letters are those of the page's sections.
BARE = re.compile(r"(?<![\w#./-])[ABDEFHJLMNOQRSTUVWX]\d{1,2}(?!\w|[.-]\d)")
# What looks like a code and is none, each with its reason.
NO_CODES: dict[str, str] = {
    "tests/bench/": "A1, B2: names of made-up systems and rounds",
}


def rows() -> dict[str, str]:
    return dict(ROW.findall(PAGE.read_text(encoding="utf-8")))


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
    known = rows()
    found = 0
    for name, file in sources():
        for citation in CITATION.findall(file.read_text(encoding="utf-8")):
            for code in CODE.findall(citation):
                found += 1
                assert code in known, f"{name} cites docs/threats.md#{code}, which has no row"
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
    for code, row in rows().items():
        attack, defence, held_by, state = (cell.strip() for cell in row.split(" | "))
        assert attack, code
        assert defence, code
        assert state, code
        assert TEST.findall(held_by), f"{code} names no test"
        for path, function in TEST.findall(held_by):
            file = ROOT / path
            assert file.is_file(), f"{code}: {path} does not exist"
            if function:
                text = file.read_text(encoding="utf-8")
                assert re.search(rf"\b(def|class) {function}\b", text), f"{code}: {path} has no {function}"


def test_no_row_stands_twice() -> None:
    codes = [code for code, _ in ROW.findall(PAGE.read_text(encoding="utf-8"))]
    assert len(codes) == len(set(codes)) > 50
