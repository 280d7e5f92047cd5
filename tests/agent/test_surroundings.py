"""What `config check` finds around an agent's settings."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from arcbridge.agent import surroundings as module
from arcbridge.agent.settings import check
from arcbridge.agent.surroundings import look_around
from arcbridge.settings.config import AgentConfig, ObserveConfig


async def test_ports_and_disks(config: AgentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(config: AgentConfig, *, own: bool = False) -> list[tuple[str, str]]:
        return [(one.setting, str(one.severity)) for one in look_around(check(config), lambda _: own)]

    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = replace(config, observe=ObserveConfig(listen=f"127.0.0.1:{taken.getsockname()[1]}"))
        assert found(at) == [("observe.listen", "error")]
        monkeypatch.setattr(module, "listeners", lambda _: frozenset({1}))
        assert found(at, own=True) == []
    assert found(at) == found(config) == []
    monkeypatch.setattr(module, "is_full", lambda path: f"the disk of {path} is full")
    assert found(config) == [("state.directory", "error"), ("audit.file", "warning")]
