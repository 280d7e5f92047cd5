"""axe-core, which judges the accessibility of a page in a browser; from npm, once, and kept in the tests' cache."""

from __future__ import annotations

import functools
from typing import Any

from tests.support.browser import Tab
from tests.support.npm import npm_file

VERSION = "4.14.1"
SHA256 = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
_RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")


@functools.cache
def axe_script() -> str:
    """Return the script. Raises Unavailable."""
    return npm_file(f"axe-{VERSION}.js", f"axe-core@{VERSION}", SHA256, "axe.min.js").read_text(encoding="utf-8")


async def judge(tab: Tab) -> list[dict[str, Any]]:
    """Return what axe finds wrong with the page in a tab: the rule, and where."""
    await tab.evaluate(f"{axe_script()}; 0")
    found = await tab.evaluate(
        f"axe.run(document, {{runOnly: {list(_RULES)}}}).then((one) => one.violations.map("
        "(rule) => ({rule: rule.id, where: rule.nodes.map((node) => [node.html, node.failureSummary])})))"
    )
    assert isinstance(found, list)
    return found
