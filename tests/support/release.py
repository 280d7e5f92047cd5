"""One release of the committed tree, shared by all processes of a test run: it takes a minute to build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from release import artifacts, lock
from tests.support.processes import require_or_skip


def shared_release(tmp_path_factory: pytest.TempPathFactory, worker: str) -> Path:
    """Return a directory with a release. `worker`: the name of this process as pytest-xdist gives it, or `master`."""
    if not (lock.ROOT / ".git").exists():
        require_or_skip("git", "this is no clone, and a release is made of a commit")
    base = tmp_path_factory.getbasetemp()
    # Each process of pytest-xdist has a directory of its own in that of the run.
    common = base if worker == "master" else base.parent
    out = common / "release"
    with FileLock(common / "release.lock"):
        if not out.exists():
            made = common / "release.new"
            shutil.rmtree(made, ignore_errors=True)
            artifacts.build(made)
            made.rename(out)
    return out
