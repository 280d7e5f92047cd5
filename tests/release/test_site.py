"""The documentation as a site: whole, of itself alone, and nothing of what marks blocks for tests is shown."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from release import lock, site

# Sphinx reads seventy pages.
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
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Building it raises for a warning of Sphinx, a link that leads nowhere, and a source on another host."""
    return site.build(lock.ROOT, tmp_path_factory.mktemp("site") / "site", Path(sys.executable)).parent


def test_the_site_is_whole(made: Path) -> None:
    pages = [path for path in (lock.ROOT / "docs").rglob("*.md")]
    assert len(pages) > 50
    for page in pages:
        assert (made / page.relative_to(lock.ROOT)).with_suffix(".html").is_file(), page
    assert (made / "index.html").read_bytes() == (made / "README.html").read_bytes()
    # A script, which a browser loads from a disk too; it has the words of every page.
    index = (made / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(")
    assert '"docs/broken"' in index


def test_blocks_are_shown_as_they_stand_without_their_marks(made: Path) -> None:
    source = (lock.ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    shown = Shown(made / "docs" / "tutorial.html").text
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
