"""`python -m bench.budget`: what an open, an echo, a GET, an exec and a join cost each role, beside the file.

Says what changed and which functions explain it; the exit code is 1 when a total is beyond the margin. `--write` keeps
what was counted, there and in the table of docs/benchmark/budget.md. What is counted does not depend on the machine,
nor on what else runs there.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from bench.budget.comparison import MARGIN, Budget, compare
from bench.budget.counting import count
from bench.budget.paths import Broken, operations
from bench.budget.system_calls import NoStrace
from bench.load.build import NoCompiler
from tests.support.cluster import Cluster, Unavailable
from tests.support.processes import ProcessFailed
from tests.support.world import ALICE, ApiServer

FILE = Path(__file__).parents[1] / "budget.json"
PAGE = Path(__file__).parents[2] / "docs" / "benchmark" / "budget.md"
"""Has the table of what the file says."""
LIBRARIES = ("aiofastnet", "aiohttp", "cryptography", "pyjwt", "structlog", "uvloop")
"""What runs in an operation besides Python's own library."""


def versions() -> dict[str, str]:
    """Return what the counts depend on, as it is here."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **{library: version(library) for library in LIBRARIES}}


def with_table(page: str, table: str) -> str:
    """Return a page with this table in the place of the one that begins as it does."""
    begin = page.index(table.partition("\n")[0])
    return page[:begin] + table + page[page.index("\n\n", begin) :]


def counted() -> Budget:
    """Count with a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="arcbridge-budget-") as name:
        directory = Path(name)
        with Cluster(directory=directory / "cluster") as cluster:
            cluster.install_agent()
            cluster.grant("cluster-admin", group=ALICE.groups[0])
            token = directory / "agent-token"
            token.touch(mode=0o600)
            token.write_text(cluster.service_account_token("arcbridge", "arcbridge-agent"))
            api = ApiServer(cluster.api_url, cluster.ca_file, token)
            with operations(cluster, api, directory / "paths") as paths:
                return Budget(versions(), count(paths, directory / "paths"))


def verdict(kept: Budget, now: Budget) -> tuple[str, bool]:
    """Return what changed, those beyond the margin first, and whether any is beyond it."""
    changes = sorted(compare(kept.costs, now.costs), key=lambda change: not change.beyond)
    beyond = sum(change.beyond for change in changes)
    lines = [f"{'BEYOND' if change.beyond else 'within'}  {change}" for change in changes]
    others = [
        f"{name} {kept.versions.get(name)} -> {found}"
        for name, found in now.versions.items()
        if kept.versions.get(name) != found
    ]
    if others:
        lines.append(f"versions differ from the file's: {', '.join(others)}")
    lines.append(
        f"{beyond} totals are beyond {MARGIN:.0%} of {FILE.name}: take the cost away, or write the file anew "
        "(make budget WRITE=1) and say in the commit why"
        if beyond
        else f"every total is within {MARGIN:.0%} of {FILE.name}"
    )
    return "\n".join(lines), beyond > 0


def main(argv: list[str]) -> int:
    """Count, compare, print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description="What an operation costs each role.")
    parser.add_argument("--write", action="store_true", help="write what was counted to the file")
    parser.add_argument("--file", type=Path, default=FILE, help="the file (default: bench/budget.json)")
    options = parser.parse_args(argv)
    try:
        now = counted()
    except (Broken, NoCompiler, NoStrace, ProcessFailed, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(now.table())
    text, beyond = verdict(Budget.read(options.file.read_text()), now) if options.file.exists() else ("no file", True)
    print(text)
    if options.write:
        options.file.write_text(now.text())
        if options.file == FILE:
            PAGE.write_text(with_table(PAGE.read_text(), now.table()))
        return 0
    return int(beyond)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
