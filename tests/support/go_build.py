"""Build the programs of a Go module, and show how far it is: packages compiled of how many.

What is compiled is what `go list` calls stale; packages that Go's own cache has are not counted. Where the programs go
is the caller's business, and so is whether they are there already.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.processes import start_piped
from tests.support.progress import Progress, follow

_CACHED = "not installed but available in build cache"
"""What `go list` says of a package that needs no compiling; it calls it stale all the same."""


class BuildFailed(RuntimeError):
    """Go could not build; the text is the end of what it said."""


def build(
    go: str, module: Path, packages: Sequence[str], target: Path, *, title: str, flags: Sequence[str], timeout: float
) -> None:
    """Build `packages` of the module in the directory `module` into the directory `target`.

    `title` is what the progress begins with, such as `building helm with go1.26.8`.
    `timeout` holds for fetching the modules and for compiling, seconds each. Raises BuildFailed, also at a deadline.
    """
    modules = to_compile = compiled = 0

    def listed(line: str) -> None:
        nonlocal modules, to_compile
        modules += line.startswith("go: downloading ")
        to_compile += line.startswith("true ") and not line.endswith(_CACHED)
        progress.show(detail=f"{modules} fetched" if modules else "")

    with Progress("looking for the Go modules") as progress:
        run_go([go, "list", "-deps", *flags, "-f", "{{.Stale}} {{.StaleReason}}", *packages], module, listed, timeout)

    def built(line: str) -> None:
        nonlocal compiled
        # `go build -v` writes the path of each package; other lines (downloads, errors) have spaces or begin with `#`.
        compiled += bool(line) and " " not in line and not line.startswith("#")
        progress.show(min(compiled, to_compile))

    with Progress(title, total=to_compile, unit="packages") as progress:
        run_go([go, "build", "-v", *flags, "-o", f"{target}/", *packages], module, built, timeout)


def run_go(argv: list[str], module: Path, heard: Callable[[str], None], timeout: float) -> None:
    """Run a command of Go in a module; `heard` gets each line. Raises BuildFailed, also at a deadline (seconds)."""
    process = start_piped(argv, cwd=module)
    try:
        output = follow(process, heard, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{' '.join(argv[:2])} took longer than {timeout:.0f} s: try again") from error
    if process.returncode:
        said = [line for line in output.splitlines() if line.startswith(("#", "go: ", "error")) or " " in line]
        last = "\n".join(line for line in said if not line.startswith(("go: downloading", "true ", "false ")))
        raise BuildFailed(f"{' '.join(argv[:2])}: exit status {process.returncode}\n{last[-2000:]}")
