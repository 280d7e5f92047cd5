"""Sphinx's settings for the documentation as a site; `release.site` builds it.

The pages are read where they lie, as hosts of Markdown show them: no page has a word for this tool. The order of pages
beside the text is here and nowhere else.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]

project = "arcbridge"
author = "The arcbridge authors"
extensions = ["myst_parser"]
# CommonMark with tables, and nothing that the pages' other readers would show as it stands.
myst_disable_syntax = [
    "myst_role",
    "myst_target",
    "myst_line_comment",
    "myst_block_break",
    "footnote_ref",
    "front_matter",
]
myst_heading_anchors = 6
# Anchors that a page writes as HTML are not known to it; `release.site` looks at every link in what was made.
suppress_warnings = ["myst.xref_missing"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "bench/README.md", "config/**.md"]
exclude_patterns = [".*", "arcbridge", "build", "dist", "tests"]
highlight_language = "none"
smartquotes = False

html_theme = "furo"
html_title = "arcbridge"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_use_index = False
html_theme_options = {"top_of_page_buttons": []}

PLACE = "\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n:glob:\n:caption: {}\n\n{}\n```\n"
ORDER = {
    "Begin": "docs/getting-started docs/tutorial docs/transcript docs/glossary",
    "Operate": "docs/run docs/change docs/broken docs/alerts docs/reference docs/audit docs/disaster-recovery",
    "How to": "docs/how-to/*",
    "Understand": "docs/architecture docs/security docs/authentication docs/protocol docs/threats docs/verify*",
    "Decide": "docs/performance docs/benchmark/* docs/out-of-scope docs/decisions/*",
    "Take part": "CONTRIBUTING SECURITY CHANGELOG bench/README",
}
"""The pages beside the text. Sphinx fails for one that stands nowhere."""


def prepare(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the first page the order of all others, and leave of a link to a folder its words: a site has no folders."""
    folder = (ROOT / page).parent
    source[0] = re.sub(
        r"\[([^\]]*)\]\(([\w./-]+)\)", lambda link: link[1] if (folder / link[2]).is_dir() else link[0], source[0]
    )
    if page == root_doc:
        source[0] += "".join(PLACE.format(title, names.replace(" ", "\n")) for title, names in ORDER.items())


def setup(app: Sphinx) -> None:
    app.connect("source-read", prepare)
