"""Which values a relay believes: what relays write, and no member less."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from arcbridge.relay.registry import generations
from arcbridge.relay.registry.base import UserRevocation
from arcbridge.relay.registry.nats_entries import is_entry

KEYS = generations.to_json(generations.enrolled({}, "k", 5.0, repeated=False))
WRITTEN: dict[str, dict[str, Any]] = {
    "cluster.eu_prod.binding": {
        "name": "eu.prod", "ca_pem": "PEM", "ca_pin": "pin", "created": 1.5, "valid_since": 0.0, "keys": KEYS,
    },
    "cluster.prod.revoked": {"at": 1e9},
    "seen.prod": {"last_seen": 1, "version": "1", "certificate_expires": 2.0},
    "token.a": {
        "secret_hash": "0", "cluster": "prod", "uses": 1, "used": 0, "created": 1, "expires_at": 2, "rebind": False,
        "redemptions": {"k": 1.0},
    },
    "user.a": asdict(UserRevocation("alice", 5, "left", 6.0)),
}  # fmt: skip
OPTIONAL = {"keys", "last_seen", "version", "certificate_expires"}


@pytest.mark.parametrize("key", WRITTEN)
def test_f22_each_member_is_there_and_of_its_type(key: str) -> None:
    data = WRITTEN[key]
    assert is_entry(key, data)
    for member in data:
        less = {name: value for name, value in data.items() if name != member}
        assert is_entry(key, less) == (member in OPTIONAL)
        for wrong in ([], [1], float("inf"), 10**400, -1, object(), {"a": [object()]}):
            assert not is_entry(key, {**data, member: wrong}), (member, wrong)


def test_a_binding_is_that_of_its_key() -> None:
    assert not is_entry("cluster.prod.binding", WRITTEN["cluster.eu_prod.binding"])


def test_a_revocation_has_a_date() -> None:
    """0 would read as "not revoked"."""
    assert not is_entry("cluster.prod.revoked", {"at": 0})


@pytest.mark.parametrize("state", [[], ["1"], [1, 2], [1, "", "now"], [1, "", 0.0, 0, 0], 1, None])
def test_states_of_keys_have_the_types_of_their_fields(state: object) -> None:
    assert not is_entry("cluster.eu_prod.binding", {**WRITTEN["cluster.eu_prod.binding"], "keys": {"k": state}})


def test_what_a_newer_relay_writes_beside_it_is_left_to_it() -> None:
    assert is_entry("later.a", {"anything": [1]})
    assert is_entry("cluster.prod.later", {})
    assert is_entry("cluster.prod.revoked", {"at": 5, "later": []})
