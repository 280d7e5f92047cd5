"""Ports: kept after success, moved aside when another program has one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.client.listening import PortInUse
from arcbridge.client.served_cluster import ServedCluster
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.config import ClientConfig
from tests.client.test_session_manager import login


@pytest.fixture
def squatter() -> Iterator[socket.socket]:
    """A program that listens on a port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


def served(tmp_path: Path, port: int | None = None) -> ServedCluster:
    config = ClientConfig(
        relay="https://127.0.0.1:1", cluster="prod", port=port, state_dir=tmp_path / "state", login=login(tmp_path)
    )
    return ClientContext(config, Terminal(), environment={}).served("prod")


async def test_a_kept_port_that_was_taken_is_left_to_who_has_it(tmp_path: Path, squatter: socket.socket) -> None:
    port = squatter.getsockname()[1]
    one = served(tmp_path)
    one.state.remember_port(one.relays, "prod", port)
    line = one.bind()
    assert line.startswith(f"Port {port} was taken")
    assert line.endswith(f'; cluster "prod" has port {one.port} now')
    assert one.port != port
    one.keep_port()
    await one.close()
    again = served(tmp_path)
    assert again.bind() == ""
    assert again.port == one.port
    await again.close()


async def test_a_port_that_no_cluster_had_is_passed_over_silently(
    tmp_path: Path, squatter: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.client.state.FIRST_PORT", squatter.getsockname()[1])
    one = served(tmp_path)
    assert one.bind() == ""
    assert one.port > squatter.getsockname()[1]
    assert not one.state.has_port(one.relays, "prod")
    await one.close()


async def test_a_port_that_was_asked_for_is_that_port_or_an_error(tmp_path: Path, squatter: socket.socket) -> None:
    with pytest.raises(PortInUse):
        served(tmp_path, port=squatter.getsockname()[1]).bind()


async def test_a_port_of_the_system_is_not_kept(tmp_path: Path) -> None:
    one = served(tmp_path, port=0)
    one.bind()
    one.keep_port()
    assert not one.state.has_port(one.relays, "prod")
    entry = one.entry("mine", process="me", arguments=("--cluster", "prod"), plugin=True)
    assert (entry.name, entry.server, entry.plugin) == ("mine", f"https://127.0.0.1:{one.port}", True)
    await one.close()
