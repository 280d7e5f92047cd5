"""The recording relay tells what is readable from what is not."""

from __future__ import annotations

import pytest

from bench.load.generator import Target
from bench.tap import CANARY, Readable, Tap, send_canary


def test_clear_text_is_found_and_what_saw_nothing_proves_nothing(target: Target) -> None:
    with Tap(target.address) as tap:
        with pytest.raises(Readable, match="nothing passed"):
            tap.require_unreadable()
        send_canary(tap.address)
        assert CANARY in tap.seen
        with pytest.raises(Readable, match="in clear"):
            tap.require_unreadable()
