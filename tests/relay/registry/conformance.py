"""What every engine of the registry must do; an engine's test file subclasses this and says how to open it.

The subclass defines the fixture `open_registry`, an `Opener`, which closes what was opened. It may be called again
while the first is open: the second stands for another relay, or for an operator's command, on the same data.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache
from itertools import permutations

import pytest

from arcbridge.errors import ConfigError, EnrolmentRefused, PinMismatch, StateError
from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import JoinToken
from arcbridge.pki.rotation import Rotation
from arcbridge.relay.registry.base import (
    KEEP_EXPIRED,
    KEEP_REVOKED,
    MAX_REASON,
    MAX_USER,
    MAX_USES,
    AccessChange,
    ClusterRecord,
    Recovery,
    Registry,
    RegistryUnavailable,
    UserRevocation,
    follow_cluster_ca,
)
from arcbridge.relay.registry.generations import RenewedTwice, ShownCertificate
from arcbridge.wire.records import CaSuccession
from tests.support.clock import Clock

HOUR = 3600.0
KEY_A, KEY_B = "a" * 64, "b" * 64
REQUEST = "c" * 64

BAD_NAMES = ["", "A", "a..b", "../x", "a>b", "a*", "a" * 64, "ä"]


def cluster_ca(name: str = "one") -> Authority:
    return _made(name)


@cache
def _made(name: str) -> Authority:
    return Authority.create(name)


async def known(registry: Registry, name: str = "prod") -> ClusterRecord:
    """Return the record of a cluster that is there."""
    record = await registry.cluster(name)
    assert record is not None
    return record


Opener = Callable[[], Awaitable[Registry]]


class RegistryConformance:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock(1_800_000_000.0)

    @pytest.fixture
    async def registry(self, open_registry: Opener) -> Registry:
        return await open_registry()

    async def enrolled(self, registry: Registry, name: str = "prod") -> None:
        token = await registry.create_join_token(name, expires_at=1_800_000_000.0 + 1e9)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)

    # Join tokens: uses.

    async def test_a_token_enrols_a_cluster_once(self, registry: Registry, clock: Clock) -> None:
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        record = await registry.redeem_join_token(f" {token}\n", KEY_A, cluster_ca().certificate_pem)
        assert (record.name, record.ca_pem, record.ca_pin) == ("prod", cluster_ca().certificate_pem, cluster_ca().pin)
        assert (record.created, record.last_seen, record.certificate_expires) == (clock.now, 0, 0)
        assert (record.version, record.revoked) == ("", 0)
        with pytest.raises(EnrolmentRefused, match="used up"):
            await registry.redeem_join_token(token, KEY_B, cluster_ca().certificate_pem)
        assert await registry.cluster("prod") == record

    @pytest.mark.parametrize("uses", [1, 3, 20])
    async def test_n_uses_are_exactly_n_under_parallel_redeems(
        self, open_registry: Opener, clock: Clock, uses: int
    ) -> None:
        """docs/threats.md#E1: 50 keys at once, over two open registries."""
        first, second = await open_registry(), await open_registry()
        token = await first.create_join_token("prod", uses=uses, expires_at=clock.now + HOUR)
        pem = cluster_ca().certificate_pem
        attempts = [(first, second)[n % 2].redeem_join_token(token, f"{n:064x}", pem) for n in range(50)]
        results = await asyncio.gather(*attempts, return_exceptions=True)
        refused = [result for result in results if isinstance(result, EnrolmentRefused)]
        assert len(refused) == 50 - uses, results
        assert all("used up" in error.message for error in refused)
        (listed,) = await second.list_join_tokens()
        assert (listed.used, listed.uses) == (uses, uses)

    async def test_the_same_key_may_redeem_again_for_ten_minutes(self, registry: Registry, clock: Clock) -> None:
        """docs/threats.md#E2: the answer was lost, the token is used up and even expired meanwhile."""
        token = await registry.create_join_token("prod", expires_at=clock.now + 60)
        first = await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        clock.now += 599
        assert await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem) == first
        with pytest.raises(EnrolmentRefused):
            await registry.redeem_join_token(token, KEY_B, cluster_ca().certificate_pem)
        clock.now += 2
        with pytest.raises(EnrolmentRefused, match="expired"):
            await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)

    async def test_redeeming_again_costs_no_use(self, registry: Registry, clock: Clock) -> None:
        token = await registry.create_join_token("prod", uses=2, expires_at=clock.now + HOUR)
        pem = cluster_ca().certificate_pem
        for _ in range(5):
            await registry.redeem_join_token(token, KEY_A, pem)
        await registry.redeem_join_token(token, KEY_B, pem)
        assert (await registry.list_join_tokens())[0].used == 2

    async def test_a_wall_clock_set_back_does_not_prolong_it(self, registry: Registry, clock: Clock) -> None:
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        clock.now -= 2 * HOUR
        with pytest.raises(EnrolmentRefused, match="used up"):
            await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)

    async def test_expiry(self, registry: Registry, clock: Clock) -> None:
        token = await registry.create_join_token("prod", expires_at=clock.now + 60)
        clock.now += 60
        with pytest.raises(EnrolmentRefused, match="expired"):
            await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        assert await registry.cluster("prod") is None

    async def test_unknown_ids_and_wrong_secrets_get_one_answer(self, registry: Registry, clock: Clock) -> None:
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        stranger = JoinToken.create().text
        forged = f"{token.partition('.')[0]}.{stranger.partition('.')[2]}"
        messages = set()
        for text in (stranger, forged):
            with pytest.raises(EnrolmentRefused) as caught:
                await registry.redeem_join_token(text, KEY_A, cluster_ca().certificate_pem)
            messages.add(caught.value.message)
        assert len(messages) == 1
        assert (await registry.list_join_tokens())[0].used == 0

    async def test_a_wrong_secret_learns_nothing_about_a_spent_token(self, registry: Registry, clock: Clock) -> None:
        token = await registry.create_join_token("prod", expires_at=clock.now + 60)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        clock.now += HOUR
        forged = f"{token.partition('.')[0]}.{JoinToken.create().text.partition('.')[2]}"
        with pytest.raises(EnrolmentRefused, match="not known"):
            await registry.redeem_join_token(forged, KEY_A, cluster_ca().certificate_pem)

    @pytest.mark.parametrize("text", ["", "x", "a.b", "0" * 16 + ".", "x" * 10_000])
    async def test_malformed_tokens(self, registry: Registry, text: str) -> None:
        with pytest.raises(EnrolmentRefused, match="not a join token"):
            await registry.redeem_join_token(text, KEY_A, cluster_ca().certificate_pem)

    async def test_deleting_voids_a_token_and_keeps_its_cluster(self, registry: Registry, clock: Clock) -> None:
        token = await registry.create_join_token("prod", uses=5, expires_at=clock.now + HOUR)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        token_id = token.partition(".")[0]
        assert await registry.delete_join_token(token_id)
        assert not await registry.delete_join_token(token_id)
        for key in (KEY_A, KEY_B):
            with pytest.raises(EnrolmentRefused):
                await registry.redeem_join_token(token, key, cluster_ca().certificate_pem)
        assert await registry.cluster("prod") is not None
        assert await registry.list_join_tokens() == []

    async def test_the_list_shows_everything_but_the_secret(self, registry: Registry, clock: Clock) -> None:
        start = clock.now
        first = await registry.create_join_token("prod", uses=3, expires_at=start + HOUR)
        clock.now += 1
        second = await registry.create_join_token("test", expires_at=start + 60, rebind=True)
        await registry.redeem_join_token(first, KEY_A, cluster_ca().certificate_pem)
        one, two = await registry.list_join_tokens()
        assert (one.id, one.cluster, one.uses, one.used, one.created) == (first[:16], "prod", 3, 1, start)
        assert (one.expires_at, one.rebind) == (start + HOUR, False)
        assert (two.id, two.cluster, two.uses, two.used, two.rebind) == (second[:16], "test", 1, 0, True)
        for token in (first, second):
            assert token.partition(".")[2] not in repr([one, two])

    async def test_long_expired_tokens_are_dropped(self, registry: Registry, clock: Clock) -> None:
        await registry.create_join_token("old", expires_at=clock.now + 60)
        clock.now += KEEP_EXPIRED
        await registry.create_join_token("new", expires_at=clock.now + 60)
        assert [token.cluster for token in await registry.list_join_tokens()] == ["old", "new"]
        clock.now += 61
        await registry.create_join_token("newer", expires_at=clock.now + 60)
        assert [token.cluster for token in await registry.list_join_tokens()] == ["new", "newer"]

    async def test_tokens_that_are_not_made(self, registry: Registry, clock: Clock) -> None:
        later = clock.now + HOUR
        for uses in (0, -1, MAX_USES + 1):
            with pytest.raises(ConfigError):
                await registry.create_join_token("prod", uses=uses, expires_at=later)
        for expires_at in (clock.now, 0.0, float("inf"), float("nan")):
            with pytest.raises(ConfigError):
                await registry.create_join_token("prod", expires_at=expires_at)
        with pytest.raises(ConfigError):
            await registry.create_join_token("prod", uses=2, expires_at=later, rebind=True)
        for name in BAD_NAMES:
            with pytest.raises(ConfigError):
                await registry.create_join_token(name, expires_at=later)
        assert await registry.list_join_tokens() == []

    # The name and its CA.

    async def test_the_first_enrolment_binds_the_name(self, registry: Registry, clock: Clock) -> None:
        """docs/threats.md#E5: a token for a taken name does not take the name, and is not consumed by the attempt."""
        await self.enrolled(registry)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        with pytest.raises(EnrolmentRefused) as caught:
            await registry.redeem_join_token(token, KEY_B, cluster_ca("two").certificate_pem)
        assert cluster_ca("one").pin in caught.value.message
        assert cluster_ca("two").pin in caught.value.message
        record = await known(registry)
        assert record.ca_pin == cluster_ca("one").pin
        await registry.redeem_join_token(token, KEY_B, cluster_ca("one").certificate_pem)

    async def test_two_clusters_race_for_one_name(self, open_registry: Opener, clock: Clock) -> None:
        first, second = await open_registry(), await open_registry()
        for n in range(20):
            name = f"prod-{n}"
            tokens = [await first.create_join_token(name, expires_at=clock.now + HOUR) for _ in range(2)]
            results = await asyncio.gather(
                first.redeem_join_token(tokens[0], KEY_A, cluster_ca("one").certificate_pem),
                second.redeem_join_token(tokens[1], KEY_B, cluster_ca("two").certificate_pem),
                return_exceptions=True,
            )
            won = [result for result in results if not isinstance(result, BaseException)]
            assert len(won) == 1
            assert await first.cluster(name) == won[0]

    async def test_a_lapsed_cluster_comes_back_as_itself(self, registry: Registry, clock: Clock) -> None:
        """docs/threats.md#E7: with a new join token, without being deleted."""
        await self.enrolled(registry)
        await registry.certificate_issued("prod", clock.now + HOUR)
        before = await known(registry)
        clock.now += 1000 * HOUR
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        again = await registry.redeem_join_token(token, KEY_B, cluster_ca().certificate_pem)
        assert again == replace(before, keys=again.keys)
        assert set(again.keys) == {KEY_A, KEY_B}

    async def test_a_ca_certificate_made_again_over_its_key_replaces_the_old(
        self, registry: Registry, clock: Clock
    ) -> None:
        await self.enrolled(registry)
        old = cluster_ca()
        again = Authority._self_signed(old._certificate.subject, old.key_pem, 86400.0, clock)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        record = await registry.redeem_join_token(token, KEY_A, again.certificate_pem)
        assert record.ca_pem == again.certificate_pem != old.certificate_pem
        assert record.ca_pin == old.pin

    async def test_an_operator_may_let_a_cluster_come_back_with_another_ca(
        self, registry: Registry, clock: Clock
    ) -> None:
        await self.enrolled(registry)
        await registry.seen("prod", clock.now, version="1")
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR, rebind=True)
        record = await registry.redeem_join_token(token, KEY_B, cluster_ca("two").certificate_pem)
        assert (record.ca_pin, record.version) == (cluster_ca("two").pin, "1")
        assert record.valid_since == clock.now
        clock.now += 5
        assert await registry.redeem_join_token(token, KEY_B, cluster_ca("two").certificate_pem) == record
        again = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        with pytest.raises(EnrolmentRefused):
            await registry.redeem_join_token(again, KEY_A, cluster_ca("one").certificate_pem)

    # Adoption.

    async def test_an_unknown_cluster_is_adopted(self, open_registry: Opener, clock: Clock) -> None:
        registry, other = await open_registry(), await open_registry()
        assert await registry.adopt("prod", cluster_ca().certificate_pem, clock.now)
        record = await known(other)
        assert (record.name, record.ca_pem, record.ca_pin) == ("prod", cluster_ca().certificate_pem, cluster_ca().pin)
        assert (record.created, record.last_seen, record.certificate_expires) == (clock.now, 0, 0)
        assert (record.version, record.revoked, record.valid_since) == ("", 0, 0)
        assert await other.clusters() == [record]
        # The cluster is like any other: the same CA may enrol with a token, another CA may not.
        clock.now += 5
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        with pytest.raises(EnrolmentRefused, match="another cluster CA"):
            await other.redeem_join_token(token, KEY_A, cluster_ca("two").certificate_pem)
        again = await other.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        assert again == replace(record, keys=again.keys)
        await registry.seen("prod", clock.now, version="1")
        assert await registry.revoke_cluster("prod")
        assert await other.revocations() == {"prod"}

    @pytest.mark.parametrize("revoked", [False, True])
    async def test_a_known_cluster_is_not_adopted(self, registry: Registry, clock: Clock, revoked: bool) -> None:
        await self.enrolled(registry)
        await registry.seen("prod", clock.now, version="1")
        if revoked:
            await registry.revoke_cluster("prod")
        before = await registry.cluster("prod")
        for name in ("one", "two"):
            assert not await registry.adopt("prod", cluster_ca(name).certificate_pem, clock.now + 5)
        assert await registry.cluster("prod") == before

    async def test_one_of_many_adopts(self, open_registry: Opener, clock: Clock) -> None:
        relays = [await open_registry(), await open_registry()]
        cas = [cluster_ca(), cluster_ca("two")]
        attempts = [relays[n % 2].adopt("prod", cas[n // 2 % 2].certificate_pem, clock.now + n) for n in range(20)]
        results = await asyncio.gather(*attempts)
        assert sum(results) == 1
        record = await relays[0].cluster("prod")
        winner = results.index(True)
        assert (record.ca_pin, record.created) == (cas[winner // 2 % 2].pin, clock.now + winner)

    async def test_an_adopted_cluster_is_there_after_a_restart(self, open_registry: Opener, clock: Clock) -> None:
        registry = await open_registry()
        await registry.adopt("prod", cluster_ca().certificate_pem, clock.now)
        before = await registry.clusters()
        await registry.close()
        assert await (await open_registry()).clusters() == before

    async def test_only_one_certificate_is_adopted(self, registry: Registry, clock: Clock) -> None:
        for pem in ("", "nonsense", cluster_ca().certificate_pem + cluster_ca("two").certificate_pem):
            with pytest.raises(ConfigError):
                await registry.adopt("prod", pem, clock.now)
        assert await registry.clusters() == []

    # Deletion, and a look at join tokens.

    async def test_a_deleted_cluster_leaves_its_name_free(self, open_registry: Opener, clock: Clock) -> None:
        registry, other = await open_registry(), await open_registry()
        await self.enrolled(registry)
        await self.enrolled(registry, "test")
        await registry.seen("prod", clock.now, version="1")
        await registry.revoke_cluster("prod")
        assert await other.delete_cluster("prod")
        assert not await other.delete_cluster("prod")
        assert await registry.cluster("prod") is None
        assert [record.name for record in await registry.clusters()] == ["test"]
        assert await registry.revocations() == frozenset()
        clock.now += 5
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        record = await other.redeem_join_token(token, KEY_B, cluster_ca("two").certificate_pem)
        assert (record.created, record.last_seen, record.version) == (clock.now, 0, "")

    async def test_a_deleted_cluster_is_adopted_again(self, registry: Registry, clock: Clock) -> None:
        assert not await registry.delete_cluster("prod")
        await registry.revoke_cluster("prod")
        assert await registry.delete_cluster("prod"), "the name was marked as revoked"
        assert await registry.adopt("prod", cluster_ca().certificate_pem, clock.now)

    async def test_a_look_at_a_join_token_uses_nothing_up(self, registry: Registry, clock: Clock) -> None:
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        for _ in range(3):
            assert await registry.check_join_token(token) == "prod"
        assert (await registry.list_join_tokens())[0].used == 0
        wrong = token[:-1] + ("A" if token[-1] != "A" else "B")
        for text in (wrong, "unknown." + token.partition(".")[2], "nonsense"):
            with pytest.raises(EnrolmentRefused):
                await registry.check_join_token(text)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        with pytest.raises(EnrolmentRefused, match="used up"):
            await registry.check_join_token(token)
        late = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        clock.now += HOUR
        with pytest.raises(EnrolmentRefused, match="expired"):
            await registry.check_join_token(late)

    # Records.

    async def test_clusters_are_listed_by_name(self, registry: Registry) -> None:
        assert await registry.clusters() == []
        for name in ("b", "a.b", "a"):
            await self.enrolled(registry, name)
        assert [record.name for record in await registry.clusters()] == ["a", "a.b", "b"]
        assert await registry.cluster("c") is None

    async def test_what_is_seen_of_an_agent(self, registry: Registry, clock: Clock) -> None:
        await self.enrolled(registry)
        await registry.seen("prod", clock.now + 5, version="0.1.0")
        await registry.seen("prod", clock.now + 3)
        await registry.certificate_issued("prod", clock.now + HOUR)
        await registry.certificate_issued("prod", clock.now + 60)
        record = await known(registry)
        assert (record.last_seen, record.version) == (clock.now + 5, "0.1.0")
        assert record.certificate_expires == clock.now + HOUR
        await registry.seen("prod", clock.now + 9, version="0.2.0")
        record = await known(registry)
        assert (record.last_seen, record.version) == (clock.now + 9, "0.2.0")

    async def test_an_unknown_cluster_leaves_no_trace(self, registry: Registry, clock: Clock) -> None:
        await registry.seen("unknown", clock.now, version="1")
        await registry.certificate_issued("unknown", clock.now)
        assert not await registry.unrevoke_cluster("unknown")
        with pytest.raises(EnrolmentRefused, match="not enrolled"):
            await registry.renew("unknown", ShownCertificate(KEY_A, 1, clock.now), REQUEST)
        assert await registry.clusters() == []
        assert await registry.revocations() == frozenset()

    async def test_an_agents_words_are_cut_and_checked(self, registry: Registry, clock: Clock) -> None:
        await self.enrolled(registry)
        await registry.seen("prod", clock.now, version="1.0\n\x1b[31m<b>" + "x" * 1000)
        record = await known(registry)
        assert record.version.startswith("1.0[31m<b>xxx")
        assert len(record.version) <= 64

    @pytest.mark.parametrize("name", BAD_NAMES)
    async def test_only_canonical_names(self, registry: Registry, clock: Clock, name: str) -> None:
        """docs/threats.md#J22, #F7."""
        for call in (
            registry.cluster(name),
            registry.adopt(name, cluster_ca().certificate_pem, clock.now),
            registry.seen(name, clock.now),
            registry.certificate_issued(name, clock.now),
            registry.revoke_cluster(name),
            registry.unrevoke_cluster(name),
        ):
            with pytest.raises(ConfigError):
                await call

    # Revocation.

    async def test_revoking_and_restoring(self, open_registry: Opener, clock: Clock) -> None:
        registry, other = await open_registry(), await open_registry()
        await self.enrolled(registry)
        await self.enrolled(registry, "test")
        assert await registry.revoke_cluster("prod")
        revoked_at = clock.now
        clock.now += 5
        assert await registry.revoke_cluster("prod")
        assert await other.revocations() == {"prod"}
        record = await known(other)
        assert record.revoked == revoked_at
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        with pytest.raises(EnrolmentRefused, match="revoked"):
            await other.redeem_join_token(token, KEY_B, cluster_ca().certificate_pem)
        assert await registry.unrevoke_cluster("prod")
        assert await other.revocations() == frozenset()
        await other.redeem_join_token(token, KEY_B, cluster_ca().certificate_pem)

    async def test_a_revoked_cluster_cannot_even_redeem_again(self, registry: Registry, clock: Clock) -> None:
        for rebind in (False, True):
            token = await registry.create_join_token("prod", expires_at=clock.now + HOUR, rebind=rebind)
            await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
            await registry.revoke_cluster("prod")
            with pytest.raises(EnrolmentRefused, match="revoked"):
                await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
            await registry.unrevoke_cluster("prod")

    async def test_a_cluster_that_is_not_known_is_revoked_by_its_name(
        self, open_registry: Opener, clock: Clock
    ) -> None:
        """docs/threats.md#E12: its agents come later, with a certificate of another relay or with a join token."""
        registry, other = await open_registry(), await open_registry()
        token = await registry.create_join_token("prod", uses=2, expires_at=clock.now + HOUR)
        assert not await registry.revoke_cluster("prod"), "it was not known"
        assert not await registry.revoke_cluster("prod")
        assert await other.revocations() == {"prod"}
        assert await other.cluster("prod") is None
        assert not await other.adopt("prod", cluster_ca().certificate_pem, clock.now)
        with pytest.raises(EnrolmentRefused, match="revoked"):
            await other.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        assert await registry.clusters() == []
        assert (await registry.list_join_tokens())[0].used == 0
        await registry.close()
        again = await open_registry()
        assert await again.revocations() == {"prod"}, "after a restart"
        assert await again.unrevoke_cluster("prod")
        assert not await again.unrevoke_cluster("prod")
        assert await other.revocations() == frozenset()
        assert await other.adopt("prod", cluster_ca().certificate_pem, clock.now)
        await other.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        assert await again.revoke_cluster("prod"), "now it is"

    # A cluster's CA that is rotated.

    async def test_a_cluster_follows_its_ca_and_no_other(self, open_registry: Opener, clock: Clock) -> None:
        """docs/threats.md#E14: an agent announces the next CA of its cluster, and a hostile one something else."""
        registry, other = await open_registry(), await open_registry()
        first = cluster_ca()
        token = await registry.create_join_token("prod", uses=9, expires_at=clock.now + HOUR)
        await registry.redeem_join_token(token, KEY_A, first.certificate_pem)
        state = Rotation(first.certificate_pem, first.key_pem)
        steps = [state := state.take(step, clock.now) for step in ("next", "activate", "retire")]
        hostile = Rotation(cluster_ca("two").certificate_pem, cluster_ca("two").key_pem).take("next", clock.now)
        for announced in (
            CaSuccession(hostile.list.text, hostile.oldest),
            CaSuccession(steps[0].list.text.replace(steps[0].list.cas[1], hostile.list.cas[1]), steps[0].oldest),
            CaSuccession("x" * 16_000, "x"),
        ):
            with pytest.raises((ConfigError, PinMismatch)):
                await follow_cluster_ca(registry, "prod", announced)
        assert (await known(other)).cas == ""
        for one in (*steps, steps[0]):  # the last one comes late, and says nothing
            await follow_cluster_ca(registry, "prod", CaSuccession(one.list.text, one.oldest))
        record = await known(other)
        assert (record.ca_pem, record.ca_pin) == (state.certificate, state.list.pins[1])
        assert record.succession == state.list
        assert not await registry.succeed(replace(record, cas="another"), first.certificate_pem, "")
        # Enrolments go on with the CAs that count, certificates with those before, too; a foreign CA does not.
        await registry.redeem_join_token(token, KEY_B, state.certificate)
        for refused in (first.certificate_pem, hostile.certificate):
            with pytest.raises(EnrolmentRefused, match="another cluster CA"):
                await registry.redeem_join_token(token, KEY_A, refused)
        assert await known(other) == await known(registry)
        assert (await known(other)).ca_pin == state.list.pins[1]
        assert (await known(other)).valid_since == 0
        again = await registry.create_join_token("prod", expires_at=clock.now + HOUR, rebind=True)
        await registry.redeem_join_token(again, KEY_A, hostile.certificate)
        assert (await known(other)).cas == ""

    # Renewals.

    async def test_each_generation_is_renewed_once(self, open_registry: Opener, clock: Clock) -> None:
        registry, other = await open_registry(), await open_registry()
        await self.enrolled(registry)
        for generation in (1, 2, 3):
            clock.now += HOUR
            shown = ShownCertificate(KEY_A, generation, clock.now)
            assert await (registry, other)[generation % 2].renew("prod", shown, f"{generation:064x}") == generation + 1
            clock.now += HOUR
            # Its answer was lost, or another pod was as fast: the same request comes again, at any relay.
            assert await registry.renew("prod", shown, f"{generation:064x}") == generation + 1
        record = await known(other)
        assert record.keys[KEY_A].generation == 4
        assert not record.revoked

    async def test_two_renewals_of_one_generation_revoke_both(self, open_registry: Opener, clock: Clock) -> None:
        """docs/threats.md#E11"""
        registry, other = await open_registry(), await open_registry()
        await self.enrolled(registry)
        first = ShownCertificate(KEY_A, 1, clock.now)
        assert await registry.renew("prod", first, "a" * 64) == 2
        clock.now += HOUR
        with pytest.raises(RenewedTwice):
            await other.renew("prod", first, "b" * 64)
        assert await registry.revocations() == {"prod"}
        for generation in (1, 2):
            with pytest.raises(EnrolmentRefused, match="revoked"):
                await registry.renew("prod", ShownCertificate(KEY_A, generation, clock.now), "a" * 64)
        # Restoring the cluster brings back neither of them; a new join token does bring back the agent.
        assert await registry.unrevoke_cluster("prod")
        for generation in (1, 2):
            with pytest.raises(EnrolmentRefused, match="void"):
                await other.renew("prod", ShownCertificate(KEY_A, generation, clock.now), "a" * 64)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        record = await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        assert record.keys[KEY_A].generation == 3
        assert await other.renew("prod", ShownCertificate(KEY_A, 3, clock.now), "c" * 64) == 4

    async def test_many_renew_one_generation_at_once(self, open_registry: Opener, clock: Clock) -> None:
        """The owner's pods share a request; a thief's comes among them, over two open registries."""
        registries = [await open_registry(), await open_registry()]
        await self.enrolled(registries[0])
        shown = ShownCertificate(KEY_A, 1, clock.now)
        pods = [registries[n % 2].renew("prod", shown, "a" * 64) for n in range(10)]
        assert await asyncio.gather(*pods) == [2] * 10
        shown = ShownCertificate(KEY_A, 2, clock.now)
        both = [registries[n % 2].renew("prod", shown, "ab"[n // 2 % 2] * 64) for n in range(10)]
        results = await asyncio.gather(*both, return_exceptions=True)
        assert sum(isinstance(result, RenewedTwice) for result in results) == 1, "one alert"
        assert all(isinstance(result, EnrolmentRefused) for result in results if result != 3)
        assert await registries[1].revocations() == {"prod"}

    # Users.

    async def test_revoking_and_restoring_a_user(self, open_registry: Opener, clock: Clock) -> None:
        registry, other = await open_registry(), await open_registry()
        assert await registry.user_revocations() == {}
        now = int(clock.now)
        made = await registry.revoke_user("alice", now, "left the company")
        assert made == UserRevocation("alice", now, "left the company", clock.now)
        odd = "https://issuer.example#b.o b/*>"
        await registry.revoke_user(odd, now + 1)
        for one in (registry, other):
            assert await one.user_revocations() == {"alice": made, odd: UserRevocation(odd, now + 1, "", clock.now)}
        assert await other.restore_user("alice")
        for one in (registry, other):
            assert set(await one.user_revocations()) == {odd}
            assert not await one.restore_user("alice")

    async def test_of_two_revocations_the_later_time_holds(self, open_registry: Opener, clock: Clock) -> None:
        registry, other = await open_registry(), await open_registry()
        now = int(clock.now)
        await registry.revoke_user("alice", now, "first")
        clock.now += 5
        assert (await other.revoke_user("alice", now - 60)).before == now
        assert (await registry.user_revocations())["alice"] == UserRevocation("alice", now, "first", clock.now)
        clock.now += 1
        await other.revoke_user("alice", now + 3600, "second")
        assert (await registry.user_revocations())["alice"] == UserRevocation("alice", now + 3600, "second", clock.now)
        # Restored, and revoked from an earlier time: nothing of the former one is left.
        for _ in range(3):
            assert await registry.restore_user("alice")
            assert await other.user_revocations() == {}
            await other.revoke_user("alice", now - 60)
            assert (await registry.user_revocations())["alice"].before == now - 60

    async def test_users_that_are_revoked_at_once(self, open_registry: Opener, clock: Clock) -> None:
        first, second = await open_registry(), await open_registry()
        now = int(clock.now)
        users = [f"user-{number}" for number in range(20)]
        await asyncio.gather(
            *((first, second)[n % 2].revoke_user(user, now + n) for n, user in enumerate([*users, *users]))
        )
        found = await first.user_revocations()
        assert {user: entry.before for user, entry in found.items()} == {
            user: now + n + 20 for n, user in enumerate(users)
        }

    async def test_users_that_cannot_be_revoked(self, registry: Registry, clock: Clock) -> None:
        now = int(clock.now)
        for user in ("", " alice", "alice\n", "a\u200bb", "\ud800", "x" * (MAX_USER + 1)):
            for call in (registry.revoke_user(user, now), registry.restore_user(user)):
                with pytest.raises(ConfigError):
                    await call
        for before in (0, -1, 1 << 53):
            with pytest.raises(ConfigError):
                await registry.revoke_user("alice", before)
        for reason in ("x" * (MAX_REASON + 1), "two\nlines", "\x1b[31m"):
            with pytest.raises(ConfigError):
                await registry.revoke_user("alice", now, reason)
        await registry.revoke_user("ü" * (MAX_USER // 2), now, "ü" * MAX_REASON)
        assert len(await registry.user_revocations()) == 1

    async def test_a_full_list_makes_room_where_no_token_can_be_valid_any_more(
        self, registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("arcbridge.relay.registry.base.MAX_REVOKED_USERS", 3)
        now = int(clock.now)
        service_account = "system:serviceaccount:ci:deployer"
        for user in ("alice", "bob", service_account):
            await registry.revoke_user(user, now)
        clock.now += KEEP_REVOKED
        with pytest.raises(StateError, match="and no more can be: restore those"):
            await registry.revoke_user("carol", now)
        # One that is on the list can be revoked again, and one that is restored leaves its place.
        await registry.revoke_user("bob", int(clock.now))
        clock.now += 1
        await registry.revoke_user("carol", int(clock.now))
        assert set(await registry.user_revocations()) == {"bob", service_account, "carol"}
        with pytest.raises(StateError):
            await registry.revoke_user("dave", int(clock.now))
        await registry.restore_user("bob")
        await registry.revoke_user("dave", int(clock.now))

    # Life.

    async def test_everything_is_there_after_a_restart(self, open_registry: Opener, clock: Clock) -> None:
        registry = await open_registry()
        await self.enrolled(registry)
        token = await registry.create_join_token("test", uses=2, expires_at=clock.now + HOUR)
        await registry.revoke_cluster("prod")
        await registry.revoke_user("alice", int(clock.now), "left")
        before = (await registry.clusters(), await registry.list_join_tokens(), await registry.user_revocations())
        await registry.close()
        again = await open_registry()
        assert (await again.clusters(), await again.list_join_tokens(), await again.user_revocations()) == before
        await again.redeem_join_token(token, KEY_B, cluster_ca().certificate_pem)

    async def test_after_close(self, registry: Registry) -> None:
        await registry.close()
        await registry.close()
        for call in (
            registry.clusters(),
            registry.revocations(),
            registry.revoke_cluster("prod"),
            registry.user_revocations(),
            registry.revoke_user("alice", 1),
            registry.restore_user("alice"),
        ):
            with pytest.raises(RegistryUnavailable):
                await call

    async def test_a_cancelled_call_leaves_the_registry_usable(self, registry: Registry, clock: Clock) -> None:
        for _ in range(20):
            task = asyncio.ensure_future(registry.create_join_token("prod", expires_at=clock.now + HOUR))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await self.enrolled(registry)
        assert await registry.cluster("prod") is not None

    # What outlives the registry.

    async def test_what_was_said_last_of_each_name_is_known(self, open_registry: Opener, clock: Clock) -> None:
        registry, other = await open_registry(), await open_registry()
        now = int(clock.now)
        await registry.revoke_user("alice", now, "left")
        await registry.revoke_cluster("gone")
        assert set(await other.access_changes()) == {
            AccessChange("user", "alice", clock.now, now, "left"),
            AccessChange("cluster", "gone", clock.now, 1),
        }
        # The clock is set back: what is said later has a later time all the same.
        clock.now -= 60
        await other.restore_user("alice")
        await other.unrevoke_cluster("gone")
        changes = {one.name: one for one in await registry.access_changes()}
        assert all(one.at > clock.now + 59 and not one.before for one in changes.values())
        await registry.revoke_user("alice", now)
        (again,) = [one for one in await registry.access_changes() if one.name == "alice"]
        assert again.at > changes["alice"].at
        assert again.before == now

    async def test_a_user_who_is_revoked_again_has_a_later_time_where_the_clock_was_set_back(
        self, registry: Registry, clock: Clock
    ) -> None:
        first = await registry.revoke_user("alice", int(clock.now))
        clock.now -= 60
        second = await registry.revoke_user("alice", int(clock.now) + 90, "again")
        assert second.revoked > first.revoked
        (entry,) = await registry.access_changes()
        assert await registry.merge([entry._replace(at=first.revoked, before=first.before, reason="")]) == []

    @pytest.mark.parametrize("order", list(permutations(range(3))))
    async def test_of_what_comes_back_the_later_holds_in_any_order(
        self, open_registry: Opener, clock: Clock, order: tuple[int, ...]
    ) -> None:
        registry, at = await open_registry(), clock.now - 100
        said = [
            [AccessChange("user", "bob", at, int(at)), AccessChange("cluster", "prod", at, 1)],
            [AccessChange("user", "bob", at + 1)],
            [AccessChange("user", "bob", at + 2, int(at) + 9, "again"), AccessChange("cluster", "prod", at + 2)],
        ]
        for number in order:
            await registry.merge(said[number])
            assert not await registry.merge(said[number]), "no news the second time"
        assert (await registry.user_revocations())["bob"].before == int(at) + 9
        assert await registry.revocations() == frozenset()
        # An operator's word is later than all that may come back.
        assert await registry.restore_user("bob")
        assert not await registry.merge(one for part in said for one in part)
        assert await registry.user_revocations() == {}

    async def test_a_cluster_that_comes_back_as_revoked_is_refused(self, open_registry: Opener, clock: Clock) -> None:
        registry = await open_registry()
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        names = [AccessChange("cluster", name, clock.now - 5, 1) for name in ("prod", "other.one")]
        assert await registry.merge(names) == names
        assert (await known(registry)).revoked == clock.now - 5
        assert await registry.revocations() == {"prod", "other.one"}
        assert not await registry.adopt("other.one", cluster_ca().certificate_pem, clock.now)

    async def test_a_recovery_is_changed_by_one_at_a_time(self, open_registry: Opener) -> None:
        registry, other = await open_registry(), await open_registry()
        names = tuple(f"c{number}" for number in range(8))
        assert await registry.recovery() is None
        await registry.change_recovery(lambda known: Recovery("restored", 5.0, awaited=names))

        def heard(name: str) -> Callable[[Recovery | None], Recovery | None]:
            return lambda known: known and replace(known, awaited=tuple(one for one in known.awaited if one != name))

        await asyncio.gather(*((registry, other)[n % 2].change_recovery(heard(f"c{n}")) for n in range(7)))
        assert await registry.recovery() == Recovery("restored", 5.0, awaited=("c7",))
        await other.change_recovery(lambda known: None)
        assert await registry.recovery() is None

    async def test_a_snapshot_replaces_all_but_join_tokens(self, open_registry: Opener, clock: Clock) -> None:
        registry = await open_registry()
        tokens = [await registry.create_join_token(name, expires_at=clock.now + HOUR) for name in ("prod", "spare")]
        await registry.redeem_join_token(tokens[0], KEY_A, cluster_ca().certificate_pem)
        await registry.revoke_user("alice", 5)
        await registry.revoke_cluster("bad")
        before = (await registry.clusters(), await registry.access_changes())
        snapshot = await registry.snapshot()
        await registry.restore_user("alice")
        await registry.delete_cluster("prod")
        await registry.revoke_cluster("later")
        await registry.replace(snapshot.data, Recovery("restored", clock.now, backup=1.0))
        other = await open_registry()
        for one in (registry, other):
            assert (await one.clusters(), await one.access_changes()) == before
            assert await one.recovery() == Recovery("restored", clock.now, backup=1.0, awaited=("prod",))
            assert await one.list_join_tokens() == []
            with pytest.raises(EnrolmentRefused, match="not known"):
                await one.redeem_join_token(tokens[1], KEY_B, cluster_ca().certificate_pem)

    async def test_what_the_replaced_registry_knows_is_merged_before_it_goes(
        self, open_registry: Opener, clock: Clock
    ) -> None:
        """At no moment is a revocation missing, so a restore that was killed loses none (docs/threats.md#E13)."""
        registry = await open_registry()
        for name in ("alice", "bob"):
            await registry.revoke_user(name, 5)
        await registry.revoke_cluster("back")
        snapshot = await registry.snapshot()
        clock.now += 1
        await registry.restore_user("alice")
        await registry.unrevoke_cluster("back")
        await registry.revoke_user("carol", int(clock.now), "left")
        await registry.revoke_cluster("other.one")
        former = await registry.access_changes()
        news = await registry.replace(snapshot.data, Recovery("restored", clock.now), former)
        assert {one.name for one in news} == {"alice", "back", "carol", "other.one"}
        for one in (registry, await open_registry()):
            assert sorted(await one.access_changes()) == sorted(former)
            assert await one.revocations() == {"other.one"}
            assert set(await one.user_revocations()) == {"bob", "carol"}

    @pytest.mark.parametrize("data", [b"", b"not a registry", b"[]", b'{"user.x": [1, {}]}', b"\0" * 8192])
    async def test_what_is_no_snapshot_changes_nothing(self, open_registry: Opener, data: bytes) -> None:
        registry = await open_registry()
        await registry.revoke_user("alice", 5)
        with pytest.raises(StateError, match="backup is damaged, or none"):
            await registry.replace(data, Recovery("restored", 5.0))
        assert set(await registry.user_revocations()) == {"alice"}
        assert await registry.recovery() is None
