"""A registry that lacks revocations: what agents give back counts before they are told anything else, users wait
meanwhile, and the relay says what is missing (docs/threats.md#E13).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from arcbridge.checks.diagnosis import FindingState
from arcbridge.errors import JoinRefused
from arcbridge.mux.session import MuxSession
from arcbridge.pki.authority import Authority
from arcbridge.pki.rotation import Rotation
from arcbridge.relay import control, recovery
from arcbridge.relay.ledger import Seal, ledger_secret
from arcbridge.relay.parts import Basis
from arcbridge.relay.recovery import RevocationRecovery
from arcbridge.relay.recovery_words import recovery_finding
from arcbridge.relay.registry.base import AccessChange, Recovery, RegistryUnavailable
from arcbridge.settings.config import RelayConfig
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.ledger import FEATURE, LedgerEntries, entries_of, frames
from arcbridge.wire.records import Goaway, Ledger, Revoke
from tests.relay.station import Agent, Station, station
from tests.support.clock import Clock
from tests.support.eventually import until

ADDRESS = "relay.test:8443"
DAY = 86400.0
NOW = time.time()
CA = Authority.create("relay", clock=lambda: NOW - DAY)
BOB = AccessChange("user", "bob", NOW - 60, int(NOW + DAY), "left the company")
PROD = AccessChange("cluster", "prod", NOW - 60, 1)


class Keeping(Agent):
    """An agent that keeps a ledger, or (None) is older than that."""

    def __init__(self, relay: Station, cluster: str, *held: AccessChange | bytes, keeps: bool = True) -> None:
        self.features = FEATURE if keeps else ""
        super().__init__(relay, cluster, f"of {cluster}")
        self.ledger = LedgerEntries()
        for one in held:
            self.ledger.put(one if isinstance(one, bytes) else Seal(CA.key_pem, ADDRESS).seal(one))
        self.keeps = keeps
        self.told: list[Revoke] = []
        self.over: Goaway | None = None

    def established(self, session: MuxSession) -> None:
        if self.keeps:
            session.send(Ledger(digest=self.ledger.digest()))

    def ledger_received(self, session: MuxSession, ledger: Ledger) -> None:
        if ledger.wanted:
            for one in frames(self.ledger, last=True):
                session.send(one)
            return
        if ledger.first:
            self.ledger.clear()
        for entry in entries_of(ledger):
            self.ledger.put(entry)

    def revoke_received(self, session: MuxSession, revoke: Revoke) -> None:
        self.told.append(revoke)

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        self.over = goaway


class Place:
    """A station with a registry of two clusters, whose relay looks when the test says."""

    def __init__(self, relay: Station, clock: Clock) -> None:
        self.relay, self.clock = relay, clock
        checked = SimpleNamespace(config=RelayConfig(), public=ADDRESS)
        basis = SimpleNamespace(
            registry=relay.registry, checks=relay.checks, counters=relay.counters, authority=CA, checked=checked
        )
        self.recovery = RevocationRecovery(cast(Basis, basis), relay.control, 30.0, clock=clock)
        self.recovery.refresh = self.look

    async def look(self) -> None:
        registry, access = self.relay.registry, self.relay.access
        await self.recovery.look()
        access.clusters = await registry.revocations()
        access.learn_users(await registry.user_revocations())
        self.relay.control.revoke(access.clusters)
        self.relay.control.tell_users(access.users)
        await self.recovery.share()

    async def joins(self) -> str:
        """Why alice cannot join; empty once it is for want of an agent that answers."""
        try:
            await self.relay.join("alice", "prod")
        except JoinRefused as error:
            return error.message
        return ""

    async def restored(self, *awaited: str) -> None:
        made = Recovery("restored", self.clock.now, backup=self.clock.now - 60, awaited=awaited)
        await self.relay.registry.change_recovery(lambda known: made)
        await self.look()


@asynccontextmanager
async def place(tmp_path: Path, *clusters: str) -> AsyncIterator[Place]:
    async with station(tmp_path, *clusters, dial_deadline=0.2) as relay:
        made = Place(relay, Clock(NOW))
        await made.look()
        yield made


async def test_a_change_is_kept_by_every_agent_and_given_back_to_nobody_else(tmp_path: Path) -> None:
    async with place(tmp_path, "prod", "other") as made, Keeping(made.relay, "prod") as agent:
        await until(lambda: len(made.relay.control))
        await made.relay.registry.revoke_user("bob", BOB.before)
        await made.look()
        await until(lambda: len(agent.ledger) == 1)
        await made.relay.registry.restore_user("bob")
        await made.look()
        await until(lambda: agent.ledger.digest() == made.recovery.book.digest)
        async with Keeping(made.relay, "other") as late:
            await until(lambda: late.ledger.digest() == made.recovery.book.digest)
        assert (len(late.ledger), made.recovery.recovery) == (1, None)


async def test_e13_a_lost_revocation_counts_before_the_agent_is_told_of_any(tmp_path: Path) -> None:
    async with place(tmp_path, "prod", "other") as made:
        await made.relay.registry.create_join_token("prod", expires_at=NOW + 3600)
        with capture_logs() as logs:
            async with Keeping(made.relay, "prod", BOB) as agent:
                await until(lambda: agent.told)
        assert agent.told == [Revoke("bob", BOB.before, True, BOB.reason)], "and never of an empty list"
        (line,) = [one for one in logs if one["event"] == "revocation came back"]
        assert (line["name"], line["cluster"]) == ("bob", "prod")
        # Nobody had said that something is lost: a copy of an older file.
        assert made.relay.access.held
        known = await made.relay.registry.recovery()
        assert (known.cause, known.awaited, known.returned) == ("older", ("other",), 1)
        assert all(one.used == one.uses for one in await made.relay.registry.list_join_tokens()), (
            "one of them may have been used since"
        )
        assert made.relay.counters.revocations_returned == 1


async def test_e13_a_cluster_that_another_one_knows_as_revoked_is_cut_off_and_refused(tmp_path: Path) -> None:
    async with place(tmp_path, "prod", "other") as made:
        await made.restored("prod", "other")
        async with Keeping(made.relay, "prod") as revoked:
            await until(lambda: len(made.relay.control))
            assert "waits for the revocations" in await made.joins(), "no user reaches it before"
            async with Keeping(made.relay, "other", PROD):
                await until(lambda: revoked.over)
        assert revoked.over.code == GoawayCode.REVOKED
        await made.look()
        assert made.recovery.recovery is None, "all are heard, or revoked"
        assert made.relay.access.held == ""
        assert "no such cluster" in await made.joins()


async def test_users_wait_for_all_known_clusters_or_for_the_time_that_is_set(tmp_path: Path) -> None:
    async with place(tmp_path, "prod", "other") as made, Keeping(made.relay, "prod"):
        await until(lambda: len(made.relay.control))
        await made.restored("prod", "other", "deleted since")
        assert "waits for the revocations" in await made.joins()
        made.clock.now += 31
        await made.look()
        assert "waits" not in await made.joins()
        known = made.recovery.recovery
        assert known.awaited == ("prod", "other"), "connected before: it comes again, or the operator ends it"
        finding = recovery_finding(known)
        assert finding.state is FindingState.FAILED
        assert "prod, other" in finding.remedy
        async with Keeping(made.relay, "other"):
            await until(lambda: made.recovery.recovery == replace(known, awaited=("prod",)))


async def test_an_older_agent_is_told_nothing_that_voids_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with place(tmp_path, "prod") as made:
        await made.restored("prod")
        await made.relay.registry.revoke_user("carol", 7)
        await made.look()
        # It sends nothing behind its HELLO, and is told at once: else each new connection would be late.
        monkeypatch.setattr(control, "RETURN_DEADLINE", 1e9)
        async with Keeping(made.relay, "prod", keeps=False) as agent:
            await until(lambda: agent.told)
        assert agent.told == [Revoke("carol", 7)]
        known = await made.relay.registry.recovery()
        assert known.awaited == ("prod",), "it was not heard"


async def test_e13_an_agent_that_invents_revocations_is_not_believed(tmp_path: Path) -> None:
    forged = Seal(Authority.create("its own").key_pem, ADDRESS).seal(BOB)
    async with place(tmp_path, "prod", "other") as made:
        await made.restored("prod", "other")
        async with Keeping(made.relay, "prod", forged):
            await until(lambda: made.relay.counters.ledgers_forged)
        known = await made.relay.registry.recovery()
        assert "prod" in known.awaited
        assert await made.relay.registry.access_changes() == []


async def test_e13_the_ledger_of_an_agent_that_does_not_say_what_it_holds_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its HELLO says that it keeps one, so that it is late, and not older."""
    monkeypatch.setattr(control, "RETURN_DEADLINE", 0.05)
    monkeypatch.setattr(Keeping, "established", lambda self, session: None)
    async with place(tmp_path, "prod") as made:
        await made.relay.registry.revoke_user("carol", 7)
        await made.look()
        async with Keeping(made.relay, "prod", BOB) as agent:
            await until(lambda: agent.over)
        assert agent.over.code == GoawayCode.UNAVAILABLE
        assert len(agent.ledger) == 1
        assert agent.told == [], "nor anything that voids what it knows"


async def test_e13_the_ledger_of_an_agent_that_did_not_give_back_all_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "RETURN_DEADLINE", 1.0)
    sent = Keeping.ledger_received

    def halves(self: Keeping, session: MuxSession, ledger: Ledger) -> None:
        if not ledger.wanted:
            sent(self, session, ledger)
            return
        for one in frames([next(iter(self.ledger))]):  # the other entry, and the mark of the end, do not arrive
            session.send(one)

    monkeypatch.setattr(Keeping, "ledger_received", halves)
    async with place(tmp_path, "prod", "other") as made:
        await made.relay.registry.revoke_user("carol", 7)
        await made.look()
        async with Keeping(made.relay, "prod", BOB, BOB._replace(name="dave")) as agent:
            await until(lambda: agent.over)
            await made.look()
        assert agent.over.code == GoawayCode.UNAVAILABLE
        assert len(agent.ledger) == 2, "nothing was voided"
        assert agent.told == []
        assert set(await made.relay.registry.user_revocations()) == {"bob", "carol"}, "what came counts"
        known = await made.relay.registry.recovery()
        assert "prod" in known.awaited


async def test_a_slow_agent_gives_back_all_while_it_makes_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "RETURN_DEADLINE", 1.5)
    monkeypatch.setattr(control, "RETURN_LEAST", 1)
    sent = Keeping.ledger_received

    def slowly(self: Keeping, session: MuxSession, ledger: Ledger) -> None:
        if not ledger.wanted:
            sent(self, session, ledger)
            return
        for number, entry in enumerate(list(self.ledger)):
            for one in frames([entry], last=number == 3):
                asyncio.get_running_loop().call_later(0.6 * number, session.send, one)

    monkeypatch.setattr(Keeping, "ledger_received", slowly)
    users = [BOB._replace(name=f"user {number}") for number in range(4)]
    async with place(tmp_path, "prod") as made, Keeping(made.relay, "prod", *users):
        await until(lambda: len(made.relay.control))
        assert len(await made.relay.registry.user_revocations()) == 4


@pytest.mark.parametrize(
    ("age", "agent", "returned", "ends"),
    [
        (0.0, None, 0, True),
        (recovery.FRESH * 2, True, 0, True),
        (recovery.FRESH * 2, True, 1, False),
        (recovery.FRESH * 2, False, 0, False),
        (recovery.FRESH * 2, None, 0, False),
    ],
    ids=["new", "heard", "came back", "keeps none", "away"],
)
async def test_an_empty_registry_beside_an_old_ca_may_be_a_lost_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, agent: bool | None, returned: int, ends: bool
) -> None:
    ca: Any = Authority.create("relay", clock=lambda: NOW - age)
    monkeypatch.setattr("tests.relay.test_recovery.CA", ca)
    async with place(tmp_path) as made:
        assert bool(made.relay.access.held) == bool(age)
        await made.relay.enrol("prod")
        if agent is not None:
            async with Keeping(made.relay, "prod", keeps=agent):
                await until(lambda: len(made.relay.control))
        made.clock.now += 31
        if returned:
            await made.relay.registry.change_recovery(lambda known: known and replace(known, returned=returned))
        await made.look()
        assert made.relay.access.held == ""
        assert (made.recovery.recovery is None) == ends, "until the operator ends it"


async def test_e13_a_registry_is_known_as_an_older_one_before_what_came_back_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that dies at the merge has not forgotten that more may be missing, nor left join tokens in use."""
    async with place(tmp_path, "prod", "other") as made:
        registry = made.relay.registry
        await registry.create_join_token("prod", expires_at=NOW + 3600)

        async def dies(changes: object) -> list[AccessChange]:
            raise RegistryUnavailable("killed")

        monkeypatch.setattr(registry, "merge", dies)
        async with Keeping(made.relay, "prod", BOB) as agent:
            await until(lambda: agent.over)
        known = await registry.recovery()
        assert (known.cause, known.awaited) == ("older", ("other", "prod"))
        assert all(one.used == one.uses for one in await registry.list_join_tokens())


async def test_an_older_registry_awaits_no_cluster_that_was_heard_already(tmp_path: Path) -> None:
    async with place(tmp_path, "prod", "other", "away") as made, Keeping(made.relay, "other"):
        await until(lambda: len(made.relay.control))
        async with Keeping(made.relay, "prod", BOB) as agent:
            await until(lambda: agent.told)
        known = made.recovery.recovery
        assert (known.cause, known.awaited) == ("older", ("away",))
        async with Keeping(made.relay, "away"):
            await until(lambda: made.recovery.recovery is None)
        assert made.relay.access.held == ""


async def test_a_revocation_that_refuses_no_more_did_not_come_back(tmp_path: Path) -> None:
    """The same saying with another time: of two relays, or from before the clock was set back."""
    async with place(tmp_path, "prod") as made:
        await made.relay.registry.merge([BOB])
        await made.look()
        async with Keeping(made.relay, "prod", BOB._replace(at=BOB.at + 1)):
            await until(lambda: len(made.relay.control))
        assert await made.relay.registry.recovery() is None
        assert made.relay.counters.revocations_returned == 0


async def test_a_clock_that_was_set_back_holds_no_user_up(tmp_path: Path) -> None:
    async with place(tmp_path, "prod") as made:
        await made.restored("prod")
        assert made.relay.access.held
        made.clock.now -= 3600
        await made.look()
        assert made.relay.access.held == ""


async def test_x14_a_recovery_that_cannot_be_written_keeps_no_relay_from_reading_revocations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While NATS is down a fleet's registry reads from its copy; each look that raised would end readiness."""
    async with place(tmp_path, "prod", "other") as made:
        await made.restored("prod", "other")
        await made.relay.registry.revoke_cluster("other")

        async def down(*_: object) -> None:
            raise RegistryUnavailable("NATS is down")

        for name in ("clusters", "change_recovery"):
            monkeypatch.setattr(made.relay.registry, name, down)
        made.clock.now += 31
        await made.look()
        assert made.relay.access.clusters == {"other"}
        assert made.recovery.recovery is not None, "it does not end unwritten"


async def test_a_revocation_outlives_the_registry_also_where_the_ca_was_rotated_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Rotation(CA.certificate_pem, CA.key_pem).take("next", NOW)
    former = state.authority()
    active = replace(state.take("activate", NOW), former_secret=ledger_secret(state.key).hex())
    async with place(tmp_path / "before", "prod", "other") as here:
        near, far = Keeping(here.relay, "prod"), Keeping(here.relay, "other")
        await here.relay.registry.revoke_user("bob", int(NOW), reason="left the company")
        await here.look()
        await near.connect()
        await far.connect()
        await until(lambda: near.ledger.digest() == far.ledger.digest() == here.recovery.book.digest)
        under_former = LedgerEntries()
        for frame in frames(far.ledger):
            for entry in entries_of(frame):
                under_former.put(entry)
        # `ca activate`: an agent that is connected is given all of it anew, at once.
        await here.recovery.rotated(former)
        assert near.ledger.digest() == under_former.digest(), "the next CA does not seal yet"
        await here.recovery.rotated(active.authority())
        await until(lambda: near.ledger.digest() == here.recovery.book.digest != under_former.digest())
    # The registry is lost; of the agents one was away since before the step, and the other was not.
    monkeypatch.setitem(globals(), "CA", active.authority())
    for held in (under_former, near.ledger):
        assert await gives_back(tmp_path / str(held is near.ledger), held)


async def gives_back(directory: Path, held: LedgerEntries) -> bool:
    """Whether a relay without a registry learns of bob from an agent, and has it keep what this relay seals."""
    async with place(directory, "prod") as made:
        agent = Keeping(made.relay, "prod")
        agent.ledger = held
        async with agent:
            await until(lambda: "bob" in (made.relay.access.users or {}))
            await until(lambda: agent.ledger.digest() == made.recovery.book.digest)
        return not made.relay.counters.ledgers_forged
