"""What `config check` finds around a relay's settings, in the words of a start."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from arcbridge.errors import ArcbridgeError
from arcbridge.relay import data_dir as data_dirs
from arcbridge.relay import surroundings as module
from arcbridge.relay.data_dir import instance_lock
from arcbridge.relay.listener import bind
from arcbridge.relay.settings import check
from arcbridge.relay.surroundings import look_around
from arcbridge.settings.config import ObserveConfig, RelayConfig

from .test_settings import ca as ca
from .test_settings import good as good


@pytest.fixture
def taken() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def found(config: RelayConfig, *, own: bool = False) -> list[str]:
    return [str(one) for one in look_around(check(config), lambda _: own)]


def settings(
    good: RelayConfig, listen: socket.socket | None = None, observe: socket.socket | None = None
) -> RelayConfig:
    listens, observes = (f"127.0.0.1:{0 if one is None else one.getsockname()[1]}" for one in (listen, observe))
    return replace(good, listen=listens, observe=ObserveConfig(listen=observes))


def test_ports_that_other_programs_have(good: RelayConfig, taken: socket.socket) -> None:
    assert found(settings(good)) == []
    with taken:
        with pytest.raises(ArcbridgeError) as caught:
            bind(check(settings(good, taken)).listen)
        assert found(settings(good, taken)) == [caught.value.message]
        (message,) = found(settings(good, observe=taken))
        assert message.startswith("observe.listen '127.0.0.1:")
        assert "the port is in use" in message


def test_one_port_for_both(good: RelayConfig) -> None:
    """Each is free before a start, which takes the one and then misses it for the other."""
    for host, observe in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", ""), ("", "127.0.0.1")):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        one = replace(good, listen=f"{host}:{port}", observe=ObserveConfig(listen=f"{observe}:{port}"))
        assert found(one) == [f"observe.listen '{observe}:{port}': that is the port of listen; choose another one"]


def test_another_relay_on_the_data_directory(
    good: RelayConfig, taken: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose settings are these is in the way of nothing; nor is one of which the system shows nothing, on this
    data and at this port."""
    good.data_dir.mkdir()
    with taken, socket.create_server(("127.0.0.1", 0)) as other, instance_lock(good.data_dir):
        (unknown,) = look_around(check(settings(good)), lambda _: False).warnings
        assert "this user may not look into it" in unknown.message, "its own `listen` may be another one by now"
        assert found(settings(good)) == [unknown.message]
        assert found(settings(good, taken, other)) == [], "of another user, as far as can be seen"
        for where in (module, data_dirs):
            monkeypatch.setattr(where, "holders", lambda _: frozenset({1}))
        monkeypatch.setattr(module, "listeners", lambda _: frozenset({1}))
        with pytest.raises(ArcbridgeError) as caught, instance_lock(good.data_dir):
            pass
        assert found(settings(good)) == [caught.value.message]
        assert found(settings(good, taken, other), own=True) == []
        assert found(settings(good), own=True) == [], "other ports, before a restart"
        monkeypatch.setattr(module, "listeners", lambda _: frozenset({2}))
        assert "the port is in use" in found(settings(good, taken), own=True)[0]
        assert len(found(settings(good, taken))) == 2
    assert found(settings(good)) == []


def test_a_full_disk_is_said_as_by_a_start(good: RelayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (module, data_dirs):
        monkeypatch.setattr(where, "is_full", lambda path: f"the disk of {path} is full")
    with pytest.raises(ArcbridgeError) as caught, instance_lock(good.data_dir):
        pass
    assert found(settings(good)) == [caught.value.message]
    assert not Path(good.data_dir).exists()
    monkeypatch.setattr(module, "is_full", lambda path: "full" if path == good.data_dir / "audit.jsonl" else "")
    assert found(settings(good)) == ["audit.file: full"]


def test_a_port_that_needs_a_capability_is_a_warning(good: RelayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> socket.socket:
        raise ArcbridgeError("no capability") from PermissionError()

    monkeypatch.setattr(module, "bind", refused)
    monkeypatch.setattr(module, "ConfigError", ArcbridgeError)
    problems = look_around(check(replace(good, listen="127.0.0.1:443")), lambda _: False)
    assert [one.message for one in problems.warnings] == ["listen: no capability"]
    assert problems.errors == []
