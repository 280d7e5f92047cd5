"""The interface itself; what an engine does is in conformance.py."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from arcbridge.relay.control import ControlConnection
from arcbridge.relay.fleet.base import AgentInfo, AgentLink, Fleet
from arcbridge.relay.fleet.local import LocalFleet
from tests.relay.fleet.conformance import Link


def test_an_engine_has_to_do_everything() -> None:
    class Half(Fleet):
        async def start(self) -> None: ...

    with pytest.raises(TypeError, match="register"):
        Half()


@pytest.mark.parametrize("name", sorted(Fleet.__abstractmethods__))
def test_an_engine_takes_the_same_arguments(name: str) -> None:
    expected = inspect.signature(getattr(Fleet, name))
    assert list(inspect.signature(getattr(LocalFleet, name)).parameters) == list(expected.parameters)


@pytest.mark.parametrize("link", [ControlConnection, Link])
def test_a_link_has_what_the_fleet_uses(link: type) -> None:
    """The relay's own connection, and the one of the conformance tests."""
    words = {name for name in vars(AgentLink) if not name.startswith("_")}
    assert words == {"cluster", "instance", "info", "pending", "draining", "dial", "replaced"}
    there = set(dir(link)) | set(inspect.getsource(link).replace("self.", " ").split())
    assert words <= {word.strip(":,()") for word in there}


def test_what_people_see_of_an_agent_does_not_change() -> None:
    info = AgentInfo("i1", "1.0", 5.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.version = "2.0"
    assert info == AgentInfo("i1", "1.0", 5.0)
