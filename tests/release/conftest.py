"""One release of the committed tree for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from release import artifacts


@pytest.fixture(scope="session")
def dist(index: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a release."""
    out = tmp_path_factory.mktemp("release") / "dist"
    artifacts.build(out)
    return out
