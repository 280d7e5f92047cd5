"""One release of the committed tree for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from release import artifacts, lock
from tests.support.processes import require_or_skip


@pytest.fixture(scope="session")
def dist(index: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a release."""
    if not (lock.ROOT / ".git").exists():
        require_or_skip("git", "this is no clone, and a release is made of a commit")
    out = tmp_path_factory.mktemp("release") / "dist"
    artifacts.build(out)
    return out
