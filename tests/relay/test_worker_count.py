"""How many processes a relay has."""

from __future__ import annotations

from dataclasses import replace

import pytest

import arcbridge.relay.worker_count as module
from arcbridge.errors import ConfigError
from arcbridge.relay.worker_count import worker_count
from arcbridge.settings.config import RelayConfig, RelayFleetConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 65}, "1 to 64"),
        ({"workers": -1}, "1 to 64"),
        ({"workers": 2, "fleet": RelayFleetConfig(servers=("nats://127.0.0.1:1",))}, "together with fleet.servers"),
    ],
)
def test_counts_that_cannot_be(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        worker_count(replace(RelayConfig(), **settings))


def test_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_count(RelayConfig()) == 1
    assert worker_count(RelayConfig(workers=3)) == 3
    monkeypatch.setattr(module, "_cores", lambda: 100)
    assert worker_count(RelayConfig(workers=0)) == 64
    monkeypatch.setattr(module, "_cores", lambda: 1)
    assert worker_count(RelayConfig(workers=0, fleet=RelayFleetConfig(servers=("nats://h:1",)))) == 1
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        worker_count(RelayConfig(workers=2))
