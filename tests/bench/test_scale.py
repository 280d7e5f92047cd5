"""The study of idle scale: what fits into the descriptors, and a small one of it all."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.relay.capacity import capacity
from arcbridge.settings.config import RelayLimitsConfig
from bench.herd.sessions import PING, PONG, RECORD
from bench.studies.scale import AGENTS, SESSIONS, UNAUTHENTICATED, WARM_AGENTS, WARM_SESSIONS, Scale, Size, fitting


def test_all_of_it_where_descriptors_suffice() -> None:
    assert fitting(SESSIONS, AGENTS, 1 << 20) == Size(SESSIONS, AGENTS)


@pytest.mark.parametrize("descriptors", [4_096, 20_000, 25_000])
def test_otherwise_all_agents_that_fit_and_sessions_for_the_rest(descriptors: int) -> None:
    size = fitting(SESSIONS, AGENTS, descriptors)
    assert size.agents == min(AGENTS, descriptors // 2)
    assert 0 < size.sessions < SESSIONS
    # As the study configures it, the relay has nothing to take back.
    limits = RelayLimitsConfig(
        sessions=size.sessions + WARM_SESSIONS + 50,
        agents=size.agents + WARM_AGENTS + 10,
        unauthenticated=UNAUTHENTICATED,
    )
    assert capacity(limits, descriptors).needed <= descriptors


def test_a_light_ping_is_as_long_as_a_real_one() -> None:
    assert len(PING) == len(PONG) == RECORD == 46
    assert PING[:1] != PONG[:1]


def test_a_small_one(tmp_path: Path) -> None:
    found = Scale(sessions=12, agents=5, idle=1.0).run(tmp_path, rounds=1, seconds=0.0)
    values = found["values"]
    assert (values["sessions"], values["agents"], values["sessions_lost"]) == (12, 5, 0)
    assert values["idle_percent_of_a_core"] >= 0
    assert values["pairing_per_s"] > 0
    assert any("blind" in note for note in found["notes"])
