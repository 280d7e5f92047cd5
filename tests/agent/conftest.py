"""What the agent's tests share."""

from __future__ import annotations

import pytest

from arcbridge.agent.audit import writer


@pytest.fixture(autouse=True)
def _audit_is_written_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests read a log behind its `close`, which in production gives up after 2 s: then a busy machine loses records.
    No test closes a log whose disk takes nothing."""
    monkeypatch.setattr(writer, "CLOSE_WAIT", 60.0)
