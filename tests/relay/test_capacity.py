"""How many sessions and agents fit into so many descriptors; and what is said where they do not."""

from __future__ import annotations

import pytest
import structlog.testing

from arcbridge.net.descriptors import UNLIMITED
from arcbridge.relay.capacity import LEAST_AGENTS, LEAST_SESSIONS, RESERVED, fitted
from arcbridge.relay.pipes import POOL
from arcbridge.settings.config import RelayLimitsConfig

LIMITS = RelayLimitsConfig(sessions=10_000, agents=5_000, unauthenticated=1_000)
NEEDED = 2 * 10_000 + 5_000 + 1_000 + 2 * POOL + RESERVED


@pytest.mark.parametrize("available", [NEEDED, NEEDED + 1, UNLIMITED])
def test_all_fits(available: int) -> None:
    with structlog.testing.capture_logs() as logs:
        assert fitted(LIMITS, available) is LIMITS
    assert not logs


def test_one_less_is_too_few_and_is_told_with_numbers() -> None:
    with structlog.testing.capture_logs() as logs:
        found = fitted(LIMITS, NEEDED - 1)
    assert 9_990 < found.sessions < 10_000
    assert 4_990 < found.agents < 5_000
    (line,) = logs
    assert line["log_level"] == "warning"
    assert (line["needed"], line["available"]) == (NEEDED, NEEDED - 1)
    assert line["sessions"] == f"{found.sessions} instead of 10000"
    assert f"LimitNOFILE={NEEDED}" in line["advice"]
    assert "limits.sessions" in line["advice"]


@pytest.mark.parametrize("available", [64, 256, 1024, 4096, 20_000, 26_000])
def test_what_is_allowed_fits_with_room_for_strangers(available: int) -> None:
    found = fitted(LIMITS, available)
    if available == 64:
        assert (found.sessions, found.agents) == (LEAST_SESSIONS, LEAST_AGENTS)
        return
    assert 2 * found.sessions + found.agents + RESERVED < available
    assert found.sessions >= LEAST_SESSIONS
    assert found.agents >= LEAST_AGENTS
    assert abs(found.sessions / found.agents - 2) < 0.3, "both by the same proportion"


def test_never_more_than_the_settings_allow() -> None:
    found = fitted(RelayLimitsConfig(sessions=2, agents=1), 100)
    assert (found.sessions, found.agents) == (2, 1)
