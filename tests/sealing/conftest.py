"""What the tests of sealed files share: age's own programs, and the keys of its specification."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kube_programs import Unavailable, age
from tests.support.processes import require_or_skip


@pytest.fixture(scope="session")
def programs() -> Path:
    """The directory of age, age-keygen and `vectors`."""
    try:
        return age()
    except Unavailable as error:
        require_or_skip("age", str(error))
