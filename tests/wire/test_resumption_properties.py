"""Two sessions over a link that loses connections, as a state machine (docs/protocol.md §3.5)."""

from __future__ import annotations

from hypothesis import settings

from tests.wire.lossy_link import LossyLink

LossyLink.TestCase.settings = settings(stateful_step_count=60)
TestLossyLink = LossyLink.TestCase
