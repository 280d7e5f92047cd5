"""Every link of a page leads to a file that is there, and to a heading or row of it."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import pytest

from arcbridge.cli.commands import COMMANDS
from arcbridge.cli.parser import UsageError, parse
from arcbridge.cli.words import role_of
from arcbridge.settings.flags import ROLES
from tests.support.pages import read

ROOT = Path(__file__).resolve().parents[1]

WIDTH = 130
"""Characters of a line of a page."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CITED = re.compile(
    r"\b((?:docs|bench|config)/[\w/.-]+\.md)(?:#(?!CODE)([\w-]+))?|\b(?:SECURITY|CONTRIBUTING|README|CHANGELOG)\.md"
)


def pages() -> Iterator[Path]:
    yield from sorted(ROOT.glob("*.md"))
    for folder in ("docs", "bench", "config"):
        yield from sorted((ROOT / folder).rglob("*.md"))


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """What can stand behind the `#` of a link to a page: its headings as hosts of Markdown name them, and its own."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return frozenset(names | set(re.findall(r'<a id="([^"]+)"', text)))


def broken(source: Path, target: str) -> str:
    """Say what is wrong with a link, or nothing."""
    name, _, anchor = target.partition("#")
    place = (source.parent / name) if name else source
    if not place.exists():
        return f"{source.relative_to(ROOT)}: {target} does not exist"
    if anchor and place.suffix == ".md" and anchor not in anchors(place):
        return f"{source.relative_to(ROOT)}: {target} has no such heading"
    return ""


def test_each_link_leads_somewhere() -> None:
    links = [
        (page, target)
        for page in pages()
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in target
    ]
    assert len(links) > 200
    assert [fault for page, target in links if (fault := broken(page, target))] == []


def test_each_page_that_code_cites_is_there() -> None:
    cited = [
        (file, found.group())
        for folder in ("arcbridge", ".ci/release", "tests", "bench", "config")
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in (".py", ".toml", ".yaml") and file != Path(__file__)
        for found in CITED.finditer(file.read_text(encoding="utf-8"))
    ]
    assert len(cited) > 200
    faults = [(file, broken(ROOT / "README.md", target)) for file, target in cited]
    assert [f"{file.relative_to(ROOT)} cites {fault}" for file, fault in faults if fault] == []


def test_a_broken_link_is_found() -> None:
    page = ROOT / "docs" / "security.md"
    assert broken(page, "no-such-page.md").endswith("does not exist")
    assert broken(page, "threats.md#Z99").endswith("no such heading")
    assert broken(page, "threats.md#M7") == broken(page, "#sessions-and-time") == ""


def typed() -> Iterator[tuple[Path, list[str]]]:
    """The commands of arcbridge that pages of today name: indented lines, and code; without what a shell adds."""
    groups = "|".join(sorted({command.path[0] for command in COMMANDS if len(command.path) > 1}))
    for page in (page for page in pages() if page.parent.name != "decisions"):
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        found = re.findall(r"(?m)^ {4}(?:\$ )?arcbridge (.+)$", text)
        for span in re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", text)):
            named = re.fullmatch(rf"arcbridge (.+)|((?:{groups}) [a-z]+ --\w.*)", span)
            found += [named[1] or named[2]] if named else []
        for line in found:
            words = list(takewhile(lambda word: word not in ("|", ";", ">", "&&"), shlex.split(line, comments=True)))
            if words[0] not in ("help", "--version", "GROUP") and not set("…[|") & set(" ".join(words)):
                yield page, words


def test_arcbridge_knows_each_command_that_a_page_names(capsys: pytest.CaptureFixture[str]) -> None:
    def knows(words: list[str], role: str) -> bool:
        try:
            return parse(words, role).role == role
        except UsageError:  # a page may name a command, or a flag, without what it needs
            said = capsys.readouterr().err
            return any(one in said for one in ("is missing", "expected one argument", "a sub-command is needed"))

    commands = list(typed())
    assert len(commands) > 200
    faults = [(page.name, words) for page, words in commands if not any(knows(words, r) for r in roles_of(words))]
    assert faults == []


def roles_of(words: list[str]) -> Sequence[str]:
    return [role] if (role := role_of(words)) else ROLES


def test_no_word_of_the_glossary_stands_twice() -> None:
    """One meaning each: also a row that explains two words counts for both."""
    text = read(ROOT / "docs" / "glossary.md")
    rows = re.findall(r"^\| ([^|]+) \| ", text, re.MULTILINE)
    words = [word for row in rows if row != "word" for word in re.split(r", | and (?!.* of )", row)]
    assert len(words) > 50
    assert sorted(word for word in set(words) if words.count(word) > 1) == []


def test_no_line_is_too_wide_to_be_read_in_a_review() -> None:
    """Wider may be a word, figures that a program writes, marks of blocks, and output of programs."""
    wide = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in pages()
        if page.name != "report.md"
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH and " " in line.strip() and not line.startswith(("    ", "<!--"))
    ]
    assert wide == []


def test_each_result_that_is_cited_is_there_and_each_study_is_cited() -> None:
    texts = [page.read_text(encoding="utf-8") for page in pages() if page != ROOT / "bench" / "README.md"] + [
        file.read_text(encoding="utf-8") for folder in ("arcbridge", "bench") for file in (ROOT / folder).rglob("*.py")
    ]
    results = ROOT / "bench" / "results"
    cited = {name for text in texts for name in re.findall(r"results/([\w-]+\.json)", text)}
    assert "2026-11-25-full.json" in cited
    assert sorted(name for name in cited if not (results / name).is_file()) == []
    studies = {
        (file.name, study) for file in results.glob("*-studies.json") for study in json.loads(file.read_text("utf-8"))
    }
    assert len(studies) > 10
    uncited = [
        (name, study) for name, study in studies if not any(name in text and f"`{study}`" in text for text in texts)
    ]
    assert sorted(uncited) == []
