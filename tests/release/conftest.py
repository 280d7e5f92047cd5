"""One release of the committed tree for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.release import shared_release


@pytest.fixture(scope="session")
def dist(index: None, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory with a release."""
    return shared_release(tmp_path_factory, worker_id)
