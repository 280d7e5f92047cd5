"""Names what is installed more exactly than its version: by a digest of the package's own source files, and a commit.

Two commits of one version differ in the digest, in a wheel, an image or a clone, with no tool of a release. It says
which sources those are to the one who has them, proves nothing, and is empty where no sources are installed. The commit
is what `git archive` writes into `commit.txt`; a clone has none there.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from arcbridge import __version__

_DIGITS = 8
_COMMIT_DIGITS = 12


@functools.cache
def build() -> str:
    """Return the version, with the digest as its local part (PEP 440): `0.1.0+1f2e3d4c`. Takes some milliseconds."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    files = sorted(package.rglob("*.py"))
    for file in files:
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return f"{__version__}+{digest.hexdigest()[:_DIGITS]}" if files else __version__


def version_line() -> str:
    """Return what `version` prints: `arcbridge 0.1.0+1f2e3d4c (commit 1f2e3d4c5b6a, 2026-11-29)`.

    A clone has no commit to name: its files may be of none.
    """
    line = f"arcbridge {build()}"
    try:
        commit, date = (Path(__file__).resolve().parent / "commit.txt").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return line
    return line if commit.startswith("$") else f"{line} (commit {commit[:_COMMIT_DIGITS]}, {date})"
