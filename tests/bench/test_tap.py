"""The recording relay tells what is readable from what is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.address import Address
from bench.load.build import NoCompiler
from bench.load.generator import Generator
from bench.tap import CANARY, Readable, Tap, send_canary
from tests.support.processes import require_or_skip


@pytest.fixture
def target() -> Iterator[Address]:
    try:
        load = Generator()
    except NoCompiler as error:
        require_or_skip("compiler", str(error))
    with load.target() as target:
        yield target.address


def test_clear_text_is_found(target: Address) -> None:
    with Tap(target) as tap:
        send_canary(tap.address)
        assert CANARY in tap.seen
        with pytest.raises(Readable, match="in clear"):
            tap.require_unreadable()


def test_what_saw_nothing_proves_nothing(target: Address) -> None:
    with Tap(target) as tap, pytest.raises(Readable, match="nothing passed"):
        tap.require_unreadable()
