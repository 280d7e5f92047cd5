"""Builds the programs of a Go module beside this file into the benchmark's cache, once for what they are made of."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from bench.load.build import cache_directory
from bench.peers.base import Unavailable
from tests.support import go_build

MODULES = Path(__file__).parent
GO = "Go 1.26 or later (https://go.dev/dl), and a Go module proxy the first time"
_BUILD_TIMEOUT = 900.0
"""Seconds. The largest, frp, takes half a minute on two cores."""


def required_version(module: str, path: str) -> str:
    """The version of `path` that the module is built with, from its go.mod, such as `v1.11.3`."""
    for line in (MODULES / module / "go.mod").read_text().splitlines():
        words = line.removeprefix("require").split("//")[0].split()
        if len(words) == 2 and words[0] == path:
            return words[1]
    raise LookupError(f"{module}/go.mod does not require {path}")


def key(module: str, packages: Sequence[str], ldflags: str, toolchain: str) -> str:
    """What the programs depend on, as a name: sources, versions and checksums, what is built, how, and with what."""
    directory = MODULES / module
    digest = hashlib.sha256()
    for source in (directory / "go.mod", directory / "go.sum", *sorted(directory.glob("*/*.go"))):
        digest.update(f"{source.relative_to(directory)}\0".encode() + source.read_bytes() + b"\0")
    digest.update(repr((tuple(packages), ldflags, toolchain, sys.platform, platform.machine())).encode())
    return digest.hexdigest()[:16]


def programs(module: str, names: Sequence[str], *, packages: Sequence[str] = ("tool",), ldflags: str = "") -> Path:
    """The directory that has the programs `names`; seconds to minutes the first time, at once afterwards.

    Versions are those of go.mod, and what is downloaded must have the checksum in go.sum. Raises Unavailable.
    """
    go = shutil.which("go")
    if go is None:
        raise Unavailable(f"needs {', '.join(names)}, which are built with {GO}: there is no `go` in PATH")
    directory = MODULES / module
    ldflags = f"-s -w {ldflags}".strip()
    toolchain = subprocess.run([go, "env", "GOVERSION"], cwd=directory, capture_output=True, text=True, check=False)
    if toolchain.returncode:
        raise Unavailable(f"needs {GO}: {toolchain.stderr.strip()}")
    cache = cache_directory()
    built = cache / f"{module}-{key(module, packages, ldflags, toolchain.stdout.strip())}"
    if _complete(built, names):
        return built
    cache.mkdir(parents=True, exist_ok=True)
    # Of two runs at once, the second waits and finds what the first has built.
    with FileLock(cache / f"{module}.lock"):
        if _complete(built, names):
            return built
        title = f"building {module} with {toolchain.stdout.strip()}"
        flags = ["-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", ldflags]
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            fresh = Path(scratch) / "programs"
            try:
                go_build.build(go, directory, packages, fresh, title=title, flags=flags, timeout=_BUILD_TIMEOUT)
            except go_build.BuildFailed as error:
                last = "\n".join(str(error).splitlines()[-5:])
                raise Unavailable(f"{module} could not be built; it needs {GO}:\n{last}") from error
            if not _complete(fresh, names):
                raise Unavailable(f"{module} was built, but without {', '.join(names)}")
            fresh.replace(built)
    return built


def _complete(directory: Path, names: Sequence[str]) -> bool:
    return all((directory / name).exists() for name in names)
