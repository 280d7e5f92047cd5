"""What a world is made of: ports that no other test process has."""

from __future__ import annotations

import random

import pytest

from arcbridge.client.credentials.login import REDIRECT_PORTS
from tests.support.world import LOGIN_PORTS, fixed_port


def test_no_server_of_a_test_takes_a_port_of_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """A login has these two alone, and a server would hold one of them for as long as its test process lives."""
    assert LOGIN_PORTS == REDIRECT_PORTS
    drawn = random.sample

    def sample(population: range, count: int) -> list[int]:
        return [18_000, *drawn(population, count)]

    monkeypatch.setattr(random, "sample", sample)
    assert fixed_port() not in LOGIN_PORTS
