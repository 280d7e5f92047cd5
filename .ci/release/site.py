"""The documentation as a site: a folder of pages that needs no server and asks no other host for anything.

Sphinx makes the pages (`.ci/site/conf.py`), and every warning of its ends the build. What it does not look at is looked
at here, in what it has made: links into pages, and what a page would load from elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

SETTINGS: Final = Path(".ci") / "site"
_FOREIGN: Final = re.compile(r"""(?:url\(|@import|import\(|fetch\(|importScripts\()\s*["']?(?:https?:)?//""")
"""What has a style or a script load something from another host."""


def build(root: Path, out: Path, python: Path, *, epoch: int | None = None) -> Path:
    """Build the site of the tree `root` into `out` anew, with the Sphinx of `python`. Return its first page.

    Raises `subprocess.CalledProcessError` with Sphinx's own words, and `ValueError` for what `faults` finds.
    """
    shutil.rmtree(out, ignore_errors=True)
    times = {} if epoch is None else {"SOURCE_DATE_EPOCH": str(epoch)}
    with tempfile.TemporaryDirectory(prefix="arcbridge-site-") as work:
        subprocess.run(
            [python, "-m", "sphinx", "-q", "--fail-on-warning", "--keep-going", "--builder", "html",
             "--doctree-dir", work, "--conf-dir", SETTINGS, ".", out.resolve()],
            check=True, cwd=root, env={**os.environ, **times}, capture_output=True, text=True,
        )  # fmt: skip
    # Pictures that a page names in HTML; Sphinx brings those that it names in Markdown.
    shutil.copytree(root / "docs" / "images", out / "docs" / "images", dirs_exist_ok=True)
    # What the next build would begin with.
    (out / ".buildinfo").unlink(missing_ok=True)
    first = Path(shutil.copy(out / "README.html", out / "index.html"))
    if found := list(faults(out)):
        raise ValueError("\n".join(found))
    return first


def faults(site: Path) -> Iterator[str]:
    """Find links of a site that lead nowhere, and what it would load from another host."""
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for source in page.sources:
            parts = urlsplit(source)
            if parts.netloc or not (parts.scheme or (path.parent / unquote(parts.path)).exists()):
                yield f"{name} loads {source}, which is not there"
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                yield f"{name} links to {link}, which is not there"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{name} links to {link}, and there is no such place in it"
    for path in sorted(site.rglob("*")):
        if path.suffix in (".css", ".js", ".html", ".svg") and (found := _FOREIGN.search(path.read_text("utf-8"))):
            yield f"{path.relative_to(site)} loads from another host: {found[0]}"


class _Page(HTMLParser):
    """What a page has to do with others."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = {name: value for name, value in attributes if value is not None}
        self.ids.update(filter(None, (known.get("id"), known.get("name"))))
        if tag == "a" and "href" in known:
            self.links.append(known["href"])
        self.sources += [known[name] for name in ("src", "srcset", "data", "poster") if name in known]
        if tag == "link" and "href" in known:
            self.sources.append(known["href"])
