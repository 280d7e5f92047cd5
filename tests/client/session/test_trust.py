"""The order in which a pin is looked for. (What is sent before: test_session_manager.)"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from arcbridge.client.session.trust import ClusterTrust, stated_cas
from arcbridge.errors import ConfigError, PinMismatch, StateError
from arcbridge.pki.pins import PinStore
from arcbridge.pki.rotation import Rotation
from arcbridge.pki.succession import Succession, SuccessionStore
from arcbridge.wire.records import JoinReply
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
    known, other = Succession.of_ca(CLUSTER_CA.certificate_pem), Succession.of_ca(OTHER_CA.certificate_pem)
    assert trust.check("prod", known) == known
    assert trust.check("unknown", known) is None
    with pytest.raises(PinMismatch):
        trust.check("prod", other)


def test_a_pin_that_was_given_is_followed_and_never_changed(tmp_path: Path) -> None:
    """docs/threats.md#E14: what a relay passes on of a cluster's CAs counts as far as they have signed it."""
    shipped, store = pins(tmp_path / "org.toml", CLUSTER_CA.pin), SuccessionStore(tmp_path / "successions")
    trust = ClusterTrust(pins_file=shipped, successions=store)
    state = Rotation(CLUSTER_CA.certificate_pem, CLUSTER_CA.key_pem).take("next", time.time())
    announced = JoinReply(cluster_ca=CLUSTER_CA.certificate_pem, cluster_cas=state.list.text)
    followed = trust.check("prod", stated_cas(announced))
    assert followed is not None
    assert followed.pins == state.list.pins
    assert trust.contradiction("prod", state.list.pins[1]) == ""
    # The former CA counts until the agent says that it does not; then no relay brings it back.
    state = state.take("activate", time.time()).take("retire", time.time())
    hostile = JoinReply(cluster_ca=state.certificate, cluster_cas=state.list.text)
    followed = trust.check("prod", stated_cas(hostile))
    assert followed is not None
    assert followed.since == 0
    trust.keep("prod", followed.from_pin(state.list.pins[1]))
    for later in (
        ClusterTrust(pins_file=shipped, successions=store),
        ClusterTrust(pin=CLUSTER_CA.pin, successions=store),
    ):
        kept = later.check("prod", stated_cas(announced))
        assert kept is not None
        assert kept.trusted == state.list.cas[1]
        with pytest.raises(PinMismatch):
            later.check("prod", Succession.of_ca(OTHER_CA.certificate_pem))
    # What is no succession is passed over, and the join goes on with what is known.
    for text in ("x" * 70_000, state.list.text.replace(state.list.cas[1], OTHER_CA.certificate_pem)):
        assert stated_cas(JoinReply(cluster_ca=CLUSTER_CA.certificate_pem, cluster_cas=text)).pins == (CLUSTER_CA.pin,)


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
