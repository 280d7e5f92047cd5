"""What `config check` finds around an agent's settings."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from arcbridge.agent import surroundings as module
from arcbridge.agent.service import enroll
from arcbridge.agent.settings import check
from arcbridge.agent.surroundings import look_around
from arcbridge.settings.config import AgentConfig, ObserveConfig
from tests.support.second_user import OWNER, as_user, require_users

from .fake_relay import FakeRelay

HIDDEN = """
import socket, sys
from arcbridge.cli.core_dumps import forbid_core_dumps
forbid_core_dumps()
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""
LOOK = """
import json, sys
from types import SimpleNamespace as Some
from arcbridge.agent.surroundings import look_around
config = Some(
    observe=Some(listen=f"127.0.0.1:{sys.argv[1]}"), state=Some(directory=None), audit=Some(file="-")
)
found = look_around(Some(config=config), lambda _: False)
print(json.dumps([(str(one.severity), one.message) for one in found]))
"""


async def test_ports_and_disks(config: AgentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(config: AgentConfig, *, own: bool = False) -> list[tuple[str, str]]:
        return [(one.setting, str(one.severity)) for one in look_around(check(config), lambda _: own)]

    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = replace(config, observe=ObserveConfig(listen=f"127.0.0.1:{taken.getsockname()[1]}"))
        assert found(at) == [("observe.listen", "warning")], "by whom is unknown: this process looks at others alone"
        monkeypatch.setattr(module, "listeners", lambda _: frozenset({1}))
        assert found(at) == [("observe.listen", "error")]
        assert found(at, own=True) == []
    assert found(at) == found(config) == []
    monkeypatch.setattr(module, "is_full", lambda path: f"the disk of {path} is full")
    assert found(config) == [("state.directory", "error"), ("audit.file", "warning")]
    async with FakeRelay.serving() as relay:
        relay.tokens["id.secret"] = "one"
        await enroll(replace(config, relays=(relay.address,), relay_ca_pin=relay.pin))
    assert found(config) == [("state.directory", "warning"), ("audit.file", "warning")], "a start only reads it"
    monkeypatch.setattr(time, "time", lambda: 1e11)
    assert found(config)[0] == ("state.directory", "error"), "a lapsed certificate: it would enrol again"


@pytest.mark.skipif(sys.platform != "linux", reason="LEFT OUT: reads /proc")
def test_the_agent_that_runs_is_no_mistake_for_its_own_user() -> None:
    """No user but root sees who has a port of a role: `kubectl exec POD -- arcbridge --role agent config check`."""
    require_users()
    python = [*as_user(OWNER), sys.executable, "-c"]
    root = Path(__file__).parents[2]
    with subprocess.Popen([*python, HIDDEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as agent:
        port = agent.stdout.readline().decode().strip()
        command = [*python, LOOK, port]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
        agent.communicate()
    ((severity, message),) = json.loads(done.stdout)
    assert severity == "warning"
    assert "in use by a process that this user may not look into" in message
