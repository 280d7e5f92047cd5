from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from unittest import mock

import pytest

from arcbridge.errors import EnrolmentRefused
from arcbridge.relay import nats
from arcbridge.relay.registry import nats as registry_nats
from arcbridge.relay.registry import nats_bucket
from arcbridge.relay.registry.base import AccessChange, Recovery, Registry, RegistryUnavailable
from arcbridge.relay.registry.generations import RenewedTwice, ShownCertificate
from arcbridge.relay.registry.nats import NatsRegistry
from arcbridge.relay.registry.nats_bucket import Bucket, Faster, Value, Watch
from tests.relay.conftest import Connect, Connections
from tests.relay.registry.conformance import HOUR, KEY_A, KEY_B, Opener, RegistryConformance, cluster_ca, known
from tests.support.clock import Clock
from tests.support.eventually import until
from tests.support.long import long_form
from tests.support.nats_server import NatsServer


async def opened(connections: Connections, clock: Clock, stack: AsyncExitStack, **more: float) -> NatsRegistry:
    """A registry over a connection of its own, as another relay has it."""
    registry = NatsRegistry(await connections.make(), bucket=connections.config.bucket, clock=clock, **more)
    registry.start()
    stack.push_async_callback(registry.close)
    return registry


class TestNats(RegistryConformance):
    @pytest.fixture
    async def open_registry(self, connections: Connections, clock: Clock) -> AsyncIterator[Opener]:
        async with AsyncExitStack() as stack:

            async def open_one() -> Registry:
                return await opened(connections, clock, stack)

            yield open_one


class TestNatsFaults:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock(1_800_000_000.0)

    @pytest.fixture
    async def stack(self) -> AsyncIterator[AsyncExitStack]:
        async with AsyncExitStack() as stack:
            yield stack

    async def test_dying_between_the_two_writes(
        self, connections: Connections, clock: Clock, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The use is spent and the cluster not bound: the same key finishes the enrolment at another relay."""
        first, second = [await opened(connections, clock, stack) for _ in range(2)]
        token = await first.create_join_token("prod", expires_at=clock.now + HOUR)
        write = first._bucket.write

        async def dies(key: str, *arguments: object) -> int:
            if key.endswith(".binding"):
                raise RegistryUnavailable("gone")
            return await write(key, *arguments)

        monkeypatch.setattr(first._bucket, "write", dies)
        with pytest.raises(RegistryUnavailable):
            await first.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        assert await second.cluster("prod") is None
        with pytest.raises(EnrolmentRefused, match="used up"):
            await second.redeem_join_token(token, KEY_B, cluster_ca().certificate_pem)
        record = await second.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        assert record.name == "prod"

    @pytest.mark.parametrize("how", ["stop", "freeze"])
    async def test_known_clusters_while_nats_is_down(
        self, own_server: NatsServer, connect: Connect, clock: Clock, stack: AsyncExitStack, how: str
    ) -> None:
        """docs/threats.md#X14: reads go on from the copy, changes are refused, and a revocation still holds."""
        registry = await opened(connect(own_server), clock, stack)
        for name in ("prod", "bad"):
            token = await registry.create_join_token(name, expires_at=clock.now + HOUR)
            await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        await registry.revoke_cluster("bad")
        await registry.revoke_user("alice", int(clock.now), "left")
        await until(lambda: {"prod", "bad"} <= set(registry._bindings))
        assert set(await registry.user_revocations()) == {"alice"}, "a relay reads them before it serves"
        open_token = await registry.create_join_token("other", expires_at=clock.now + HOUR)
        await registry.revoke_user("carol", int(clock.now))
        await registry.restore_user("carol")
        changes, recovery = await registry.access_changes(), Recovery("restored", clock.now, awaited=("prod",))
        assert {(one.name, one.before > 0) for one in changes} == {("alice", True), ("bad", True), ("carol", False)}
        await registry.change_recovery(lambda known: recovery)
        assert await registry.recovery() == recovery
        getattr(own_server, how)()
        record, bad = await registry.cluster("prod"), await registry.cluster("bad")
        assert (record.ca_pin, record.revoked, bad.revoked) == (cluster_ca().pin, 0, clock.now)
        assert await registry.cluster("unknown") is None
        assert await registry.revocations() == {"bad"}
        assert set(await registry.user_revocations()) == {"alice"}
        assert await registry.access_changes() == changes
        assert await registry.recovery() == recovery
        for change in (
            registry.merge(changes),
            registry.change_recovery(lambda known: None),
            registry.redeem_join_token(open_token, KEY_A, cluster_ca().certificate_pem),
            registry.create_join_token("new", expires_at=clock.now + HOUR),
            registry.adopt("new", cluster_ca().certificate_pem, clock.now),
            registry.revoke_cluster("prod"),
            registry.revoke_user("bob", int(clock.now)),
            registry.restore_user("alice"),
            registry.seen("prod", clock.now),
            registry.clusters(),
        ):
            with pytest.raises(RegistryUnavailable):
                await change
        if how == "stop":
            own_server.start()
        else:
            own_server.thaw()

        async def back() -> bool:
            try:
                return (await registry.redeem_join_token(open_token, KEY_A, cluster_ca().certificate_pem)) is not None
            except RegistryUnavailable:
                return False

        await until(back)
        assert {record.name for record in await registry.clusters()} == {"prod", "bad", "other"}
        assert await registry.revocations() == {"bad"}
        assert set(await registry.user_revocations()) == {"alice"}

    async def test_users_that_were_never_read_are_not_taken_for_none(
        self, connections: Connections, clock: Clock, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The copy of the clusters may be whole while JetStream does not answer for the users."""
        first = await opened(connections, clock, stack)
        await first.revoke_user("alice", int(clock.now))
        registry = await opened(connections, clock, stack)
        await until(lambda: registry._complete)
        whole = registry._bucket.read_all

        async def without_users(keys: str, *rest: float) -> Any:
            if keys == "user.>":
                raise RegistryUnavailable("no answer in time")
            return await whole(keys, *rest)

        monkeypatch.setattr(registry._bucket, "read_all", without_users)
        with pytest.raises(RegistryUnavailable):
            await registry.user_revocations()
        monkeypatch.undo()
        assert set(await registry.user_revocations()) == {"alice"}
        monkeypatch.setattr(registry._bucket, "read_all", without_users)
        assert set(await registry.user_revocations()) == {"alice"}, "what is known stays in force"

    async def test_a_copy_is_said_also_where_its_cluster_cannot_be_revoked(
        self, connections: Connections, clock: Clock, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """docs/threats.md#E11: the certificates are void then, so no later renewal raises the alarm."""
        registry = await opened(connections, clock, stack)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        shown = ShownCertificate(KEY_A, 1, clock.now)
        assert await registry.renew("prod", shown, "a" * 64) == 2
        monkeypatch.setattr(registry, "revoke_cluster", mock.AsyncMock(side_effect=RegistryUnavailable("no leader")))
        with pytest.raises(RenewedTwice):
            await registry.renew("prod", shown, "b" * 64)
        with pytest.raises(EnrolmentRefused, match="void"):
            await registry.renew("prod", shown, "b" * 64)

    async def test_of_a_deleted_cluster_nothing_is_noted(
        self, connections: Connections, clock: Clock, stack: AsyncExitStack
    ) -> None:
        """Its agent may leave later; a cluster that takes the name would be shown as seen before it came."""
        registry = await opened(connections, clock, stack)
        await registry.adopt("prod", cluster_ca().certificate_pem, clock.now)
        await registry.delete_cluster("prod")
        await until(lambda: registry._bindings.get("prod", Value({}, 0)).data is None)
        await registry.seen("prod", clock.now, version="1")
        await registry.adopt("prod", cluster_ca().certificate_pem, clock.now)
        record = await known(registry)
        assert (record.last_seen, record.version) == (0, "")

    async def test_a_write_of_another_relay_at_the_same_moment(
        self, connections: Connections, clock: Clock, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Restoring a user begins anew; restoring a backup says that no relay may run meanwhile."""
        registry = await opened(connections, clock, stack)
        await registry.revoke_user("alice", int(clock.now))
        snapshot, write = await registry.snapshot(), registry._bucket.write
        faster = [True]

        async def late(*arguments: Any) -> int:
            if faster:
                faster.pop()
                raise Faster
            return await write(*arguments)

        monkeypatch.setattr(registry._bucket, "write", late)
        assert await registry.restore_user("alice")
        assert await registry.user_revocations() == {}
        faster.append(True)
        with pytest.raises(RegistryUnavailable, match="stop every relay"):
            await registry.replace(snapshot.data, Recovery("restored", clock.now))
        await registry.replace(snapshot.data, Recovery("restored", clock.now))
        assert set(await registry.user_revocations()) == {"alice"}

    async def test_a_revocation_that_is_tried_again_is_later_than_what_was_taken_back(
        self, connections: Connections, clock: Clock, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else an agent that gives that back would undo it."""
        registry = await opened(connections, clock, stack)
        await registry.revoke_user("alice", int(clock.now))
        await registry.revoke_cluster("gone")
        await registry.restore_user("alice")
        await registry.unrevoke_cluster("gone")
        taken_back, write, tried = await registry.access_changes(), registry._bucket.write, set[str]()
        assert [one.before for one in taken_back] == [0, 0]

        async def late(key: str, *rest: Any) -> int:
            if key not in tried:
                tried.add(key)
                raise Faster
            return await write(key, *rest)

        monkeypatch.setattr(registry._bucket, "write", late)
        clock.now -= 60  # another relay's clock
        await registry.revoke_user("alice", int(clock.now))
        await registry.revoke_cluster("gone")
        assert len(tried) == 2
        assert await registry.merge(taken_back) == []
        assert set(await registry.user_revocations()) == {"alice"}
        assert await registry.revocations() == {"gone"}
        assert not any(one.data for one in (await registry._bucket.read_all("back.>")).values())

    async def test_a_merge_reads_what_was_taken_back_a_few_times_however_much_there_is(
        self, connections: Connections, clock: Clock, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry, reads = await opened(connections, clock, stack), []
        whole = registry._bucket.read_all

        async def counted(keys: str, *rest: float) -> Any:
            reads.append(keys)
            return await whole(keys, *rest)

        monkeypatch.setattr(registry._bucket, "read_all", counted)
        await registry.merge([AccessChange("user", f"user {number}", clock.now) for number in range(20)])
        assert reads.count("back.>") == 2
        assert len(await registry.access_changes()) == 20

    @pytest.mark.timeout(900)
    async def test_reconnects_leave_no_consumers(
        self, connections: Connections, clock: Clock, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of each relay one is left within a minute, however often it has reconnected: 200 times in the long form."""
        rounds, within = (67, 60.0) if long_form() else (3, 20.0)
        assert nats_bucket.UNREAD <= 50
        monkeypatch.setattr(nats, "PAUSES", (0.0, 0.01))
        monkeypatch.setattr(registry_nats, "FOLLOW_AGAIN", (0.0, 0.01))
        if not long_form():
            monkeypatch.setattr(nats_bucket, "UNREAD", 3.0)
        watch, watches = Bucket.watch, Counter[Bucket]()

        async def counted(bucket: Bucket, store: Any, keys: str) -> Watch:
            found = await watch(bucket, store, keys)
            watches[bucket] += 1
            return found

        monkeypatch.setattr(Bucket, "watch", counted)
        buckets = [(await opened(connections, clock, stack))._bucket for _ in range(3)]
        for done in range(rounds):
            await until(lambda done=done: all(watches[one] > done for one in buckets))
            for bucket in buckets:
                bucket.connection.client._transport.close()
        await until(lambda: all(watches[one] > rounds for one in buckets))
        jetstream = (await connections.make()).client.jetstream()

        async def one_each() -> bool:
            return len(await jetstream.consumers_info(f"KV_{connections.config.bucket}")) <= len(buckets)

        await until(one_each, within)

    async def test_the_copy_is_not_believed_for_ever(
        self, own_server: NatsServer, connect: Connect, clock: Clock, stack: AsyncExitStack
    ) -> None:
        registry = await opened(connect(own_server), clock, stack, outage=0.0)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        own_server.stop()
        for call in (registry.cluster("prod"), registry.revocations(), registry.user_revocations()):
            with pytest.raises(RegistryUnavailable):
                await call

    async def test_nothing_is_known_before_the_first_contact(
        self, own_server: NatsServer, connect: Connect, clock: Clock, stack: AsyncExitStack
    ) -> None:
        own_server.stop()
        connections = connect(own_server)
        from arcbridge.relay.nats import NatsConnection

        connection = NatsConnection(connections.config)
        stack.push_async_callback(connection.close)
        assert not await connection.start()
        registry = NatsRegistry(connection, clock=clock)
        registry.start()
        stack.push_async_callback(registry.close)
        for call in (
            registry.cluster("prod"),
            registry.revocations(),
            registry.clusters(),
            registry.user_revocations(),
        ):
            with pytest.raises(RegistryUnavailable):
                await call
        own_server.start()
        await until(lambda: connection.connected)

        async def answers() -> bool:
            try:
                return await registry.revocations() == frozenset()
            except RegistryUnavailable:
                return False

        await until(answers)

    @pytest.mark.parametrize("how", ["purge", "delete"])
    async def test_revocations_outlive_the_bucket(
        self, own_server: NatsServer, connect: Connect, clock: Clock, stack: AsyncExitStack, how: str
    ) -> None:
        """docs/threats.md#X14: an emptied bucket forgets clusters, not that one was revoked; restoring works all the
        same.
        """
        connections = connect(own_server)
        registry, other = [await opened(connections, clock, stack) for _ in range(2)]
        token = await registry.create_join_token("prod", uses=2, expires_at=clock.now + HOUR)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        await registry.revoke_cluster("prod")
        await registry.revoke_user("alice", int(clock.now), "left")
        assert await other.revocations() == {"prod"}
        assert set(await other.user_revocations()) == {"alice"}
        jetstream = registry._bucket.connection.client.jetstream()
        if how == "purge":
            await jetstream.purge_stream("KV_arcbridge")
        else:
            await jetstream.delete_key_value("arcbridge")
            # The next connection finds that the bucket is gone.
            for one in (registry, other):
                one._bucket._store = None
                await one._bucket.opened()
        for one in (registry, other):
            assert await one.revocations() == {"prod"}
            assert set(await one.user_revocations()) == {"alice"}
            assert not await one.adopt("prod", cluster_ca().certificate_pem, clock.now)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        with pytest.raises(EnrolmentRefused, match="revoked"):
            await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        if how == "purge":
            # An operator's command, which never saw what was there, restores a user all the same. (In a bucket that was
            # made anew the relays believe it once they have begun to follow that bucket.)
            await (await opened(connections, clock, stack)).restore_user("alice")
            for one in (registry, other):
                assert await one.user_revocations() == {}

    @pytest.mark.parametrize(
        "junk", [b'{"honest": [["i1", "v", 1]]}', b"", b'["nothing"]', b'{"from": "x", "last": true}\n[]']
    )
    async def test_f22_a_malformed_entry_is_no_answer_and_hides_no_other(
        self, connections: Connections, clock: Clock, stack: AsyncExitStack, junk: bytes
    ) -> None:
        registry = await opened(connections, clock, stack)
        for name in ("prod", "test", "held"):
            assert await registry.adopt(name, cluster_ca().certificate_pem, clock.now)
        await until(lambda: set(registry._bindings) == {"prod", "test", "held"})
        _, store = await registry._bucket.opened()
        for key in ("cluster.prod.binding", "cluster.held.revoked", "token.x", "user.x"):
            await store.put(key, junk)
        # Who knew the cluster goes on with that; who did not says that it cannot tell.
        assert (await known(registry)).ca_pem == cluster_ca().certificate_pem
        fresh = await opened(connections, clock, stack)
        await until(lambda: fresh._complete)
        for name in ("prod", "held"):
            with pytest.raises(RegistryUnavailable, match="no relay wrote"):
                await fresh.cluster(name)
        for one in (registry, fresh):
            assert [record.name for record in await one.clusters()] == ["held", "test"]
            assert await one.list_join_tokens() == []
            assert await one.user_revocations() == {}
        assert await fresh.revoke_cluster("prod")
        assert await registry.revocations() == {"prod"}
        assert await fresh.delete_cluster("prod")
        assert await fresh.cluster("prod") is None
