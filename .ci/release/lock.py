"""The lock files: every distribution by version and hash, so that what is installed is what was looked at.

This module makes them and checks that each platform finds a wheel; installing is pip's, with `--require-hashes`. A lock
names no package index, so the same file serves behind a mirror.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
RUNTIME: Final = ROOT / "config" / "locks" / "runtime.txt"
"""Every dependency of the product with all its extras, for Python 3.11 and newer."""
BUILD: Final = ROOT / "config" / "locks" / "build.txt"
"""What builds wheels from source."""
BUILD_SOURCE: Final = ROOT / "config" / "locks" / "build.in"
CLIENT: Final = ROOT / "config" / "locks" / "client.txt"
"""What puts the client into one file; what goes into it is in RUNTIME."""
CLIENT_SOURCE: Final = ROOT / "config" / "locks" / "client.in"
SITE: Final = ROOT / "config" / "locks" / "site.txt"
"""What makes a site of docs/: the group `docs` of pyproject.toml."""

FROM_SOURCE: Final = ("nkeys",)
"""Dependencies that are published as source alone; everything else is taken as a wheel and runs no code when it is
installed."""
IMAGE_PYTHON: Final = "3.13"
PLATFORMS: Final = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28")


def renew(*, upgrade: bool) -> None:
    """Write the lock files anew. `upgrade`: to the newest versions, else only what pyproject.toml asks for changes."""
    options = ["--upgrade"] if upgrade else []
    _compile([str(ROOT / "pyproject.toml"), "--all-extras"], RUNTIME, options)
    _compile([str(BUILD_SOURCE)], BUILD, options)
    _compile([str(CLIENT_SOURCE)], CLIENT, options)
    # One version of each for every Python, and not the newest for the newest.
    _compile(["--group", "docs"], SITE, [*options, "--fork-strategy", "fewest"])


def check_platforms(lock: Path, *, python: str = IMAGE_PYTHON) -> None:
    """Ask the package index whether each platform has a file of each version in `lock`.

    Hashes are not compared here: pip does that when it installs. Raises subprocess.CalledProcessError, whose `stderr`
    names what is missing.
    """
    for platform in PLATFORMS:
        with tempfile.TemporaryDirectory() as nowhere:
            _uv(
                *("pip", "install", "--dry-run", "--no-config", "--no-deps", "--require-hashes"),
                *("--only-binary", ":all:", *(word for name in FROM_SOURCE for word in ("--no-binary", name))),
                *("--python-platform", platform, "--python-version", python, "--target", nowhere, "-r", str(lock)),
            )


def _compile(source: Sequence[str], lock: Path, options: Sequence[str]) -> None:
    _uv(
        *("pip", "compile", "--no-config", "--universal", "--python-version", "3.11", "--generate-hashes"),
        *("--custom-compile-command", "make lock", "--no-annotate", "--output-file", str(lock), *options, *source),
    )


def _uv(*arguments: str) -> None:
    uv = Path(sys.executable).parent / "uv"
    subprocess.run([uv, "--quiet", *arguments], check=True, cwd=ROOT, capture_output=True, text=True)
