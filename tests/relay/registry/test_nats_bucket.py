"""The bucket alone, over a real NATS server: reading, writing at a revision, and what is refused."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

import pytest
from nats.js import JetStreamContext
from nats.js.errors import ServerError

from arcbridge.relay.registry import generations
from arcbridge.relay.registry.base import RegistryUnavailable, UserRevocation
from arcbridge.relay.registry.nats_bucket import NOTHING, Bucket, Faster, is_entry
from tests.relay.conftest import Connections


async def opened(connections: Connections) -> Bucket:
    """The bucket over a connection of its own, as another relay has it."""
    name = connections.config.bucket
    return Bucket(await connections.make(), name=name, replicas=1, monotonic=time.monotonic)


async def test_a_write_counts_at_the_revision_that_was_read_and_no_other(connections: Connections) -> None:
    first, second = await opened(connections), await opened(connections)
    assert await first.read("other.a") == NOTHING
    written = await first.write("other.a", {"used": 0}, 0)
    assert await second.read("other.a") == ({"used": 0}, written)
    with pytest.raises(Faster):
        await second.write("other.a", {"used": 9}, 0)
    await second.write("other.a", {"used": 1}, written)
    assert (await first.read("other.a")).data == {"used": 1}


async def test_what_was_removed_has_a_revision_and_nothing_in_it(connections: Connections) -> None:
    bucket = await opened(connections)
    written = await bucket.write("other.a", {"user": "alice"}, 0)
    await bucket.remove("other.a")
    found = await bucket.read("other.a")
    assert found.data is None
    assert found.revision > written
    assert await bucket.read_all("other.>") == {"other.a": found}


async def test_a_mark_of_the_end_before_the_first_entry(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py tells of the end first where entries wait for their turn of the loop: none is left out."""
    bucket = await opened(connections)
    _, store = await bucket.opened()
    watch = store.watch

    async def early(*arguments: Any, **options: Any) -> Any:
        watcher = await watch(*arguments, **options)
        entries = []
        while (entry := await asyncio.wait_for(watcher._updates.get(), 10)) is not None:
            entries.append(entry)
        for one in (None, *entries):
            watcher._updates.put_nowait(one)
        return watcher

    monkeypatch.setattr(store, "watch", early)

    async def same() -> tuple[object, object]:
        return None, store

    monkeypatch.setattr(bucket, "opened", same)
    assert await bucket.read_all("other.>") == {}, "none is there: the mark is right"
    for n in range(3):
        await bucket.write(f"other.{n}", {}, 0)
    assert len(await bucket.read_all("other.>")) == 3


async def test_what_jetstream_refuses_while_the_bucket_is_opened(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of its own kind would end the look at the registry, and the relay would stay ready."""
    bucket = await opened(connections)

    async def refuses(self: object, name: str) -> None:
        raise ServerError(code=500, description="insufficient resources")

    monkeypatch.setattr(JetStreamContext, "key_value", refuses)
    with pytest.raises(RegistryUnavailable, match="JetStream refused: insufficient resources"):
        await bucket.read("other.a")


async def test_what_is_not_ours(connections: Connections) -> None:
    bucket = await opened(connections)
    _, store = await bucket.opened()
    await store.put("cluster.prod.binding", b"\xff not ours")
    with pytest.raises(RegistryUnavailable):
        await bucket.read("cluster.prod.binding")


async def test_a_bucket_that_is_closed_refuses(connections: Connections) -> None:
    bucket = await opened(connections)
    bucket.closed = True
    with pytest.raises(RegistryUnavailable, match="stopping"):
        await bucket.read("cluster.prod.binding")


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
