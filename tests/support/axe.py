"""axe-core, which judges the accessibility of a page in a browser; from npm, once, and kept in the tests' cache."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.support.browser import Tab
from tests.support.cluster import Unavailable, cache_directory
from tests.support.processes import run

VERSION = "4.14.1"
SHA256 = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
_RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")


@functools.cache
def axe_script() -> str:
    """Return the script. Raises Unavailable."""
    cache = cache_directory()
    found = cache / f"axe-{VERSION}.js"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "axe.lock"):
        if not found.exists():
            if shutil.which("npm") is None:
                raise Unavailable("axe-core comes from npm: install npm")
            with tempfile.TemporaryDirectory(dir=cache) as directory:
                _fetch(Path(directory)).rename(found)
    return found.read_text(encoding="utf-8")


def _fetch(directory: Path) -> Path:
    wanted = f"axe-core@{VERSION}"
    done = run(["npm", "pack", "--silent", wanted], cwd=directory, check=False, timeout=300)
    archives = list(directory.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise Unavailable(f"npm did not give {wanted}: {done.stderr.decode(errors='replace')[-300:]}")
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != SHA256:
        raise Unavailable(f"{wanted} is not the archive that was looked at")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(directory, filter="data")
    return directory / "package" / "axe.min.js"


async def judge(tab: Tab) -> list[dict[str, Any]]:
    """Return what axe finds wrong with the page in a tab: the rule, and where."""
    await tab.evaluate(f"{axe_script()}; 0")
    found = await tab.evaluate(
        f"axe.run(document, {{runOnly: {list(_RULES)}}}).then((one) => one.violations.map("
        "(rule) => ({rule: rule.id, where: rule.nodes.map((node) => [node.html, node.failureSummary])})))"
    )
    assert isinstance(found, list)
    return found
