"""The order in which a pin is looked for. (What is sent before: test_session_manager.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.client.session.trust import ClusterTrust
from arcbridge.errors import ConfigError, PinMismatch, StateError
from arcbridge.pki.pins import PinStore
from tests.client.far_side import CLUSTER_CA, OTHER_CA


def pins(path: Path, pin: str) -> Path:
    path.write_text(f'[clusters]\nprod = "{pin}"\n')
    return path


def test_given_then_shipped_then_remembered(tmp_path: Path) -> None:
    store = PinStore(tmp_path / "own.toml", relay="r:443")
    store.remember("prod", OTHER_CA.pin)
    shipped = pins(tmp_path / "org.toml", CLUSTER_CA.pin)
    assert ClusterTrust(remembered=store).known("prod") == OTHER_CA.pin
    assert ClusterTrust(remembered=store, pins_file=shipped).known("prod") == CLUSTER_CA.pin
    assert ClusterTrust(remembered=store, pins_file=shipped, pin=OTHER_CA.pin).known("prod") == OTHER_CA.pin
    assert ClusterTrust(remembered=store).known("unknown") == ""


def test_relays_that_came_later_know_what_was_remembered(tmp_path: Path) -> None:
    PinStore(tmp_path / "own.toml", relay="old:443").remember("prod", CLUSTER_CA.pin)
    store = PinStore(tmp_path / "own.toml", relay="new:443")
    assert ClusterTrust(remembered=store, relays=("new:443",)).known("prod") == ""
    assert ClusterTrust(remembered=store, relays=("new:443", "old:443")).known("prod") == CLUSTER_CA.pin


def test_a_shipped_pin_may_be_of_any_relay(tmp_path: Path) -> None:
    shipped = tmp_path / "org.toml"
    shipped.write_text(f'[relays."b:443"]\nprod = "{CLUSTER_CA.pin}"\n')
    assert ClusterTrust(pins_file=shipped, relays=("a:443", "b:443")).known("prod") == CLUSTER_CA.pin


def test_check(tmp_path: Path) -> None:
    trust = ClusterTrust(pins_file=pins(tmp_path / "org.toml", CLUSTER_CA.pin))
    assert trust.check("prod", CLUSTER_CA.certificate_pem)
    assert not trust.check("unknown", CLUSTER_CA.certificate_pem)
    with pytest.raises(PinMismatch):
        trust.check("prod", OTHER_CA.certificate_pem)


def test_mistakes_are_not_taken_for_no_pin(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="does not exist"):
        ClusterTrust(pins_file=tmp_path / "none")
    with pytest.raises(ConfigError, match="cluster_ca_pin"):
        ClusterTrust(pin="sha256:zz")


def test_b3_a_pin_that_a_relay_states_is_held_against_those_that_are_kept(tmp_path: Path) -> None:
    trust = ClusterTrust(pin=OTHER_CA.pin, pins_file=pins(tmp_path / "org.toml", CLUSTER_CA.pin))
    assert trust.contradiction("prod", CLUSTER_CA.pin) == ""
    assert trust.contradiction("unknown", OTHER_CA.pin) == "", "that of the settings is for one cluster"
    found = trust.contradiction("prod", OTHER_CA.pin)
    assert found.startswith("the relay states another pin: the CA of cluster 'prod' is not the one that is trusted")
    assert CLUSTER_CA.pin in found
    assert OTHER_CA.pin in found
    assert trust.contradiction("prod", "sha256:zz\x1b") == (
        "the relay states a pin of cluster 'prod' that is none; do not use it"
    )
