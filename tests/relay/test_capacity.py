"""How many sessions and agents fit into so many descriptors; and what is said where they do not."""

from __future__ import annotations

import pytest
import structlog.testing

from arcbridge.net.descriptors import UNLIMITED
from arcbridge.relay.capacity import LEAST_AGENTS, LEAST_SESSIONS, RESERVED, capacity, warn
from arcbridge.relay.pipes import POOL
from arcbridge.settings.config import RelayLimitsConfig

LIMITS = RelayLimitsConfig(sessions=10_000, agents=5_000, unauthenticated=1_000)
NEEDED = 2 * 10_000 + 5_000 + 1_000 + 2 * POOL + RESERVED


@pytest.mark.parametrize("available", [NEEDED, NEEDED + 1, UNLIMITED])
def test_all_fits(available: int) -> None:
    found = capacity(LIMITS, available)
    assert (found.sessions, found.agents, found.needed) == (10_000, 5_000, NEEDED)
    with structlog.testing.capture_logs() as logs:
        warn(found, LIMITS)
    assert not logs


def test_one_less_is_too_few_and_is_told_with_numbers() -> None:
    found = capacity(LIMITS, NEEDED - 1)
    assert 9_990 < found.sessions < 10_000
    assert 4_990 < found.agents < 5_000
    with structlog.testing.capture_logs() as logs:
        warn(found, LIMITS)
    assert len(logs) == 1
    assert logs[0]["log_level"] == "warning"
    assert logs[0]["needed"] == NEEDED
    assert logs[0]["available"] == NEEDED - 1
    assert logs[0]["sessions"] == f"{found.sessions} instead of 10000"
    assert f"LimitNOFILE={NEEDED}" in logs[0]["advice"]
    assert "limits.sessions" in logs[0]["advice"]


@pytest.mark.parametrize("available", [256, 1024, 4096, 20_000, 26_000])
def test_what_is_allowed_fits_with_room_for_strangers(available: int) -> None:
    found = capacity(LIMITS, available)
    assert 2 * found.sessions + found.agents + RESERVED < available
    assert found.sessions >= LEAST_SESSIONS
    assert found.agents >= LEAST_AGENTS
    assert abs(found.sessions / found.agents - 2) < 0.3, "both by the same proportion"


def test_hardly_any_descriptors_still_leave_a_few() -> None:
    found = capacity(LIMITS, 64)
    assert (found.sessions, found.agents) == (LEAST_SESSIONS, LEAST_AGENTS)


def test_never_more_than_the_settings_allow() -> None:
    limits = RelayLimitsConfig(sessions=2, agents=1)
    found = capacity(limits, 100)
    assert (found.sessions, found.agents) == (2, 1)
