"""The one choice of registry and fleet."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from arcbridge.errors import ConfigError, StateError
from arcbridge.net.address import Address
from arcbridge.observe.metrics import Metrics
from arcbridge.relay import backend as module
from arcbridge.relay.backend import open_backend, registry_of, running_relays
from arcbridge.relay.backup import make_backup, restore_backup
from arcbridge.relay.data_dir import open_authority
from arcbridge.relay.fleet.base import Fleet
from arcbridge.relay.fleet.nats import NatsFleet
from arcbridge.relay.processes.worker import WorkerMembership
from arcbridge.relay.registry.base import RegistryUnavailable
from arcbridge.relay.registry.nats import NatsRegistry
from arcbridge.relay.registry.sqlite import SqliteRegistry
from arcbridge.relay.siblings.group import Siblings
from arcbridge.settings.config import RelayConfig, RelayFleetConfig
from tests.relay.conftest import settings
from tests.support.nats_server import NatsServer


def membership() -> WorkerMembership:
    async def together(_: object) -> None: ...

    return WorkerMembership(0, 2, Address("127.0.0.1", 1), Siblings(), together)


async def test_a_relay_alone_keeps_a_file(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        registry, fleet = await open_backend(RelayConfig(data_dir=tmp_path), Fleet(), stack)
        assert (type(registry), type(fleet), fleet.peers) == (SqliteRegistry, Fleet, None)
        async with registry_of(RelayConfig(data_dir=tmp_path), must_exist=True) as found:
            assert type(found) is SqliteRegistry


async def test_a_worker_keeps_the_same_file_and_shares_its_fleet(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        worker = membership()
        registry, fleet = await open_backend(RelayConfig(data_dir=tmp_path), worker.fleet, stack)
        assert type(registry) is SqliteRegistry
        assert fleet is worker.fleet
        assert fleet.peers is None
        fleet.add_metrics(metrics := Metrics("relay"))
        assert b"arcbridge_relay_worker_dials_total 0" in metrics.render("")[0]


async def test_with_nats_the_relays_share_both(tmp_path: Path, nats_server: NatsServer) -> None:
    config = RelayConfig(
        data_dir=tmp_path, public_address="relay.test:443", fleet=settings(nats_server, prefix="b1", bucket="b1")
    )
    async with AsyncExitStack() as stack:
        registry, fleet = await open_backend(config, Fleet(), stack)
        assert (type(registry), type(fleet)) == (NatsRegistry, NatsFleet)
        assert fleet.peers is not None
        fleet.add_metrics(metrics := Metrics("relay"))
        assert b"arcbridge_relay_fleet_connected 1" in metrics.render("")[0]
        async with registry_of(config) as found:
            assert type(found) is NatsRegistry
    assert not (tmp_path / "registry.db").exists()


async def test_without_an_answer_a_relay_starts_and_a_command_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NATS_PATIENCE", 0.01)
    fleet = RelayFleetConfig(servers=("nats://127.0.0.1:9",))
    config = RelayConfig(data_dir=tmp_path, public_address="relay.test:443", fleet=fleet)
    async with AsyncExitStack() as stack:
        assert (await open_backend(config, Fleet(), stack))[1].links() == []
    # A command says why after its first attempt; how long it waits for a silent NATS is not used up.
    monkeypatch.setattr(module, "NATS_PATIENCE", 3600)
    with pytest.raises(RegistryUnavailable, match=r"NATS cannot be reached at nats://127.0.0.1:9 \(.+\)"):
        async with registry_of(config):
            pass


async def test_mistakes_in_the_settings_are_told(tmp_path: Path) -> None:
    config = RelayConfig(data_dir=tmp_path, fleet=RelayFleetConfig(internal_address="a b"))
    with pytest.raises(ConfigError, match=r"fleet\.internal_address"):
        module._internal_address(config)
    with pytest.raises(StateError, match="data_dir"):
        async with registry_of(replace(config, data_dir=tmp_path / "none"), must_exist=True):
            pass


async def test_which_relays_of_a_fleet_run(tmp_path: Path, nats_server: NatsServer) -> None:
    assert await running_relays(RelayConfig(data_dir=tmp_path)) == [], "a relay alone has its lock"
    config = RelayConfig(
        data_dir=tmp_path, public_address="relay.test:443", fleet=settings(nats_server, prefix="b2", bucket="b2")
    )
    assert await running_relays(config) == []
    async with AsyncExitStack() as stack:
        _, fleet = await open_backend(config, Fleet(), stack)
        assert isinstance(fleet, NatsFleet)
        fleet.on_question = lambda question: [{"relay": "relay.test:443", "worker": n} for n in range(2)]
        await fleet.start()
        stack.push_async_callback(fleet.close)
        assert await running_relays(config) == ["relay.test:443"]
    assert await running_relays(config) == []


async def test_no_restore_into_the_registry_of_relays_that_run(tmp_path: Path, nats_server: NatsServer) -> None:
    config = RelayConfig(
        data_dir=tmp_path, public_address="relay.test:443", fleet=settings(nats_server, prefix="b3", bucket="b3")
    )
    open_authority(tmp_path)
    await make_backup(config, tmp_path / "backup")
    async with AsyncExitStack() as stack:
        _, fleet = await open_backend(config, Fleet(), stack)
        fleet.on_question = lambda question: [{"relay": "relay.test:443"}]
        await fleet.start()
        stack.push_async_callback(fleet.close)
        with pytest.raises(
            StateError, match=r"relays of this fleet run now \(relay.test:443\): stop every one of them"
        ):
            await restore_backup(config, tmp_path / "backup", overwrite=True)
        assert (await restore_backup(config, tmp_path / "backup", overwrite=True, beside_relays=True)).awaited == 0
    await restore_backup(config, tmp_path / "backup", overwrite=True)
