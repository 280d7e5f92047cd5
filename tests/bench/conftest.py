"""The load generator and its target, for the tests that send real bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.load.build import NoCompiler
from bench.load.generator import Generator, Target
from tests.support.processes import require_or_skip


@pytest.fixture(scope="session")
def load() -> Generator:
    """The generator; where no compiler is, the test is skipped."""
    try:
        return Generator()
    except NoCompiler as error:
        require_or_skip("compiler", str(error))


@pytest.fixture(scope="session")
def target(load: Generator) -> Iterator[Target]:
    """What the generator sends to and reads from."""
    with load.target() as target:
        yield target
