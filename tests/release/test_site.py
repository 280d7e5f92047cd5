"""The site of a release: whole, of itself alone, and nothing of what marks blocks for tests is shown."""

from __future__ import annotations

import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from release import site

# The release is built first.
pytestmark = pytest.mark.timeout(600)


class Shown(HTMLParser):
    """What a reader sees of a page: no comment, no tag."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The site, and the files that it was made of.

    Building it raised for a warning of Sphinx, a link that leads nowhere, and a source on another host.
    """
    found = []
    for pattern in ("arcbridge-docs-*.tgz", "arcbridge-*.tar.gz"):
        directory = tmp_path_factory.mktemp("unpacked")
        (archive,) = dist.glob(pattern)
        with tarfile.open(archive) as files:
            files.extractall(directory, filter="data")
        found.append(next(directory.iterdir()))
    return found[0], found[1]


def test_the_site_is_whole(made: tuple[Path, Path]) -> None:
    shown, source = made
    pages = list((source / "docs").rglob("*.md"))
    assert len(pages) > 50
    for page in pages:
        assert (shown / page.relative_to(source)).with_suffix(".html").is_file(), page
    assert (shown / "index.html").read_bytes() == (shown / "README.html").read_bytes()
    # A script, which a browser loads from a disk too; it has the words of every page.
    index = (shown / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(")
    assert '"docs/broken"' in index


def test_blocks_are_shown_as_they_stand_without_their_marks(made: tuple[Path, Path]) -> None:
    source = (made[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
    shown = Shown(made[0] / "docs" / "tutorial.html").text
    blocks = re.findall(r"^<!-- [^\n]*-->\n```\w*\n(.*?)```$", source, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        assert block in shown
    assert "<!-- run" in source
    assert not re.search(r"<!--|not run: ", shown)


def test_what_is_wrong_with_a_site_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<link href="https://fonts.example/x.css"><script src="//cdn.example/x.js"></script><img src="b.png">'
        '<a href="b.html">b</a> <a href="#c">c</a> <a href="a.html#d">d</a> <a href="https://e.example">e</a><p id="d">'
    )
    (tmp_path / "x.css").write_text("p { background: url('https://elsewhere.example/x.png') }")
    (tmp_path / "x.js").write_text("// https://elsewhere.example/licence\nfetch(here)")
    assert list(site.faults(tmp_path)) == [
        "a.html loads https://fonts.example/x.css, which is not there",
        "a.html loads //cdn.example/x.js, which is not there",
        "a.html loads b.png, which is not there",
        "a.html links to b.html, which is not there",
        "a.html links to #c, and there is no such place in it",
        "x.css loads from another host: url('https://",
    ]
