"""How blocks of a page are found, and what their marks may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.readme.blocks import Unmarked, blocks, missing
from tests.readme.machines import ROOT


def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```sh\nls\n```\n", "must be a mark"),
        ("<!-- note -->\n```sh\nls\n```\n", "must be a mark"),
        ("<!-- not run: no -->\n```sh\nls\n```\n", "say why"),
        ("<!-- run: vm, quickly -->\n```sh\nls\n```\n", "'quickly' is not understood"),
        ("text\n\n    ls\n", "an indented block"),
    ],
    ids=["none", "another comment", "no reason", "unknown option", "indented"],
)
def test_a_block_without_a_mark_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(Unmarked, match=said):
        blocks(page(tmp_path, text))


def test_shown_lines_come_in_order_and_leave_gaps() -> None:
    output = ["Proxy is listening on port 47011", "other", "Press Ctrl+C to close proxy."]
    assert missing("Proxy is listening on port …\nPress Ctrl+C", output) == ""
    assert missing("Press Ctrl+C\nProxy is listening on port …", output) == "Proxy is listening on port …"
    assert missing("port .*", output) == "port .*"
    assert missing("one two three", ["one", "  two", "  three", "four"]) == ""
    assert missing("three four", ["one", "  two", "  three", "four"]) == "three four"


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_what_is_not_run_names_what_stands_in(name: str) -> None:
    for block in blocks(ROOT / name):
        if block.kind == "not run":
            cited = [word.strip(",;") for word in block.reason.split() if word.startswith(("tests/", ".ci/"))]
            assert cited, f"{block.place}: the reason names no test"
            assert all((ROOT / path).exists() for path in cited), f"{block.place}: {cited}"


def test_v22_a_page_writes_a_join_token_for_its_reader_alone() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    writing = [
        line
        for page in pages
        for line in page.read_text().replace("\\\n", " ").splitlines()
        if " token create " in line and " > " in line
    ]
    assert len(writing) >= 4, "README, tutorial and transcript write one"
    assert [line for line in writing if "(umask 077 && " not in line] == []
