"""The pins of clusters: shown, and exchanged only by what the user has given or agreed to."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from arcbridge.client.commands.pins import known_pins, renew
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.errors import ArcbridgeError, ConfigError, PinMismatch, StateError
from arcbridge.pki.pins import PinStore
from arcbridge.pki.rotation import Rotation
from tests.client.far_side import CLUSTER, CLUSTER_CA, OTHER_CA, FarSide
from tests.client.session.test_session_manager import settings


class Machine:
    """A machine on which the cluster is known by a pin that it has no more."""

    def __init__(self, far: FarSide, directory: Path) -> None:
        self.config = settings(far, directory, cluster_ca_pin="")
        self.asked: list[str] = []
        self.answer = True
        self.store = PinStore(directory / "state" / "pins.toml", relay=self.context().relays.names[0])
        self.store.remember(CLUSTER, OTHER_CA.pin)

    async def ask(self, cluster: str, pin: str) -> bool:
        self.asked.append(pin)
        assert self.store.get(cluster) == OTHER_CA.pin  # also for other processes, however this one ends
        return self.answer

    def context(self, *, terminal: bool = True, **changes: object) -> ClientContext:
        shown = Terminal(ask_trust=self.ask if terminal else None)
        return ClientContext(replace(self.config, **changes), shown, environment={})


@pytest.fixture
def machine(far: FarSide, tmp_path: Path) -> Machine:
    return Machine(far, tmp_path)


async def test_the_user_is_asked_and_the_way_there_is_named(machine: Machine) -> None:
    with pytest.raises(PinMismatch, match=f"then run `arcbridge trust {CLUSTER} --renew`"):
        await machine.context().session(CLUSTER).connect_once()
    assert await renew(machine.context(), CLUSTER) == CLUSTER_CA.pin
    assert machine.asked == [CLUSTER_CA.pin]
    (one,) = known_pins(machine.context(), CLUSTER)
    assert (one["relay"], one["pin"], one["file"]) == (machine.store.relay, CLUSTER_CA.pin, str(machine.store.path))
    assert known_pins(machine.context(), "other") == []
    session = machine.context().session(CLUSTER)
    await session.connect_once()
    session.close()
    await session.wait_closed()


async def test_a_no_changes_nothing(machine: Machine) -> None:
    machine.answer = False
    with pytest.raises(PinMismatch, match="was not trusted"):
        await renew(machine.context(), CLUSTER)
    assert machine.store.get(CLUSTER) == OTHER_CA.pin


async def test_nor_does_a_relay_that_is_away(machine: Machine, far: FarSide) -> None:
    context = machine.context(relay="https://127.0.0.1:1")
    store = PinStore(machine.store.path, relay=context.relays.names[0])
    store.remember(CLUSTER, OTHER_CA.pin)
    with pytest.raises(ArcbridgeError):
        await renew(context, CLUSTER)
    assert store.get(CLUSTER) == OTHER_CA.pin


async def test_nor_does_a_full_disk(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StateError("No space left on device")

    monkeypatch.setattr("arcbridge.pki.pins.write_private", full)
    with pytest.raises(StateError, match="No space left"):
        await renew(machine.context(), CLUSTER)
    assert machine.asked == [CLUSTER_CA.pin]
    assert machine.store.get(CLUSTER) == OTHER_CA.pin


async def test_a_pin_kept_for_any_relay_goes_too(machine: Machine) -> None:
    PinStore(machine.store.path).replace(CLUSTER, OTHER_CA.pin, [machine.store.relay])
    assert await renew(machine.context(), CLUSTER) == CLUSTER_CA.pin
    (one,) = known_pins(machine.context(), CLUSTER)
    assert (one["relay"], one["pin"]) == (machine.store.relay, CLUSTER_CA.pin)


async def test_a_given_pin_needs_no_relay_and_no_user(machine: Machine, far: FarSide) -> None:
    context = machine.context(terminal=False, cluster_ca_pin=CLUSTER_CA.pin)
    assert await renew(context, CLUSTER) == CLUSTER_CA.pin
    assert machine.store.get(CLUSTER) == CLUSTER_CA.pin
    assert far.auths == []


async def test_without_a_user_nothing_is_given_up(machine: Machine) -> None:
    with pytest.raises(PinMismatch, match="give it with --cluster-ca-pin, or accept"):
        await renew(machine.context(terminal=False), CLUSTER)
    assert machine.store.get(CLUSTER) == OTHER_CA.pin


async def test_what_an_organisation_ships_is_changed_there(machine: Machine, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped.toml"
    shipped.write_text(f'[clusters]\n"{CLUSTER}" = "{OTHER_CA.pin}"\n')
    context = machine.context(pins_file=shipped)
    with pytest.raises(ConfigError, match=r"shipped\.toml has the pin of cluster .* change it there"):
        await renew(context, CLUSTER)
    with pytest.raises(PinMismatch, match=r"then change it in .*shipped\.toml"):
        await context.session(CLUSTER).connect_once()
    assert [one["relay"] for one in known_pins(context, "")] == ["any", machine.store.relay]


async def test_the_newest_ca_that_followed_is_shown_until_the_pin_is_renewed(machine: Machine) -> None:
    """Another next CA may have followed it here, as of a cluster that was restored and rotated again."""
    context, pin = machine.context(), CLUSTER_CA.pin
    assert [one["followed_by"] for one in known_pins(context, "")] == [""]
    followed = Rotation(CLUSTER_CA.certificate_pem, CLUSTER_CA.key_pem).take("next", time.time()).list
    for renewed in (context, machine.context(cluster_ca_pin=pin)):
        context.state.successions.keep(pin, followed)
        assert await renew(renewed, CLUSTER) == pin
        assert [one["followed_by"] for one in known_pins(context, "")] == [""]
    context.state.successions.keep(pin, followed)
    (one,) = known_pins(context, CLUSTER)
    assert (one["pin"], one["followed_by"]) == followed.pins
