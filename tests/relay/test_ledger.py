"""What a relay seals, and what it believes of what comes back (docs/threats.md#E13)."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Literal, cast

import pytest

from arcbridge.net.address import Address
from arcbridge.pki.authority import Authority
from arcbridge.pki.rotation import Rotation
from arcbridge.relay.ledger import Intake, LedgerBook, Seal, ledger_secret, registry_name
from arcbridge.relay.recovery_words import recovery_finding
from arcbridge.relay.registry.base import KEEP_REVOKED, AccessChange
from arcbridge.settings.config import RelayConfig
from arcbridge.wire import ledger as wire_ledger
from arcbridge.wire.ledger import MOST_HELD, LedgerEntries, frames
from arcbridge.wire.records import Ledger

CA = Authority.create("relay")
BOB = AccessChange("user", "https://issuer.example#bób", 1000.5, 2000, "left the company")
BACK = AccessChange("user", "carol", 1100.0)
PROD = AccessChange("cluster", "prod", 1200.0, 1)


def test_every_relay_of_a_ca_seals_alike_and_no_other_opens_it() -> None:
    one, other, foreign = Seal(CA.key_pem, "a"), Seal(CA.key_pem, "a"), Seal(Authority.create("other").key_pem, "a")
    for change in (BOB, BACK, PROD):
        assert other.open(one.seal(change)) == change
        assert one.seal(change) == other.seal(change)
        with pytest.raises(ValueError, match="sealed by no relay"):
            foreign.open(one.seal(change))
    entry = one.seal(BOB)
    assert b"company" not in entry
    assert entry[:16] == one.seal(BOB._replace(at=5.0))[:16] != one.seal(PROD)[:16]
    for at in range(len(entry)):
        with pytest.raises(ValueError, match="sealed by no relay"):
            one.open(entry[:at] + bytes([entry[at] ^ 1]) + entry[at + 1 :])


def test_e13_an_entry_of_one_registry_means_nothing_to_another_one_over_the_same_ca() -> None:
    """An agent of relays with a registry each could undo at one what was done at the other."""
    one, other = Seal(CA.key_pem, "relay-a.test:8443"), Seal(CA.key_pem, "relay-b.test:8443")
    for change in (BOB, BACK, PROD):
        with pytest.raises(ValueError, match="sealed by no relay"):
            other.open(one.seal(change))
        assert one.seal(change)[:16] != other.seal(change)[:16]
    alone = RelayConfig()
    fleet = replace(alone, fleet=replace(alone.fleet, servers=("nats://nats.test",)))
    addresses = Address("relay-a.test", 8443), Address("relay-b.test", 8443)
    assert len({registry_name(alone, address) for address in addresses}) == 2
    assert len({registry_name(fleet, address) for address in addresses}) == 1, "relays of a fleet share theirs"


def test_the_book_says_what_is_new_and_forgets_what_is_gone() -> None:
    book = LedgerBook(Seal(CA.key_pem, "a"))
    empty = book.digest
    assert len(book.learn([BOB, PROD])) == 2
    assert book.learn([BOB, PROD]) == []
    (entry,) = book.learn([BOB._replace(at=3000.0), PROD])
    held = LedgerEntries()
    assert [frame.first for frame in book.frames()] == [True]
    for one in (entry, book.seal.seal(PROD)):
        held.put(one)
    assert held.digest() == book.digest
    assert book.learn([]) == []
    assert book.digest == empty


async def given_back(book: LedgerBook, *sent: Ledger, now: float = 2000.0) -> tuple[Intake, list[Ledger | None]]:
    intake = Intake(book, lambda: now)
    return intake, [intake.receive(one) for one in sent]


async def test_an_agent_that_holds_just_that_is_asked_nothing() -> None:
    book = LedgerBook(Seal(CA.key_pem, "a"))
    book.learn([BOB])
    intake, answers = await given_back(book, Ledger(digest=book.digest))
    assert (answers, intake.done.result()) == ([None], [])


async def test_what_the_registry_lacks_is_found_and_nothing_else() -> None:
    book = LedgerBook(Seal(CA.key_pem, "a"))
    taken_back_later = PROD._replace(at=PROD.at + 1, before=0)
    book.learn([BOB, taken_back_later])
    lapsed = AccessChange("user", "old", 1.0, 1)
    entries = [book.seal.seal(one) for one in (BOB, PROD, BACK, lapsed)]
    intake, answers = await given_back(book, Ledger(digest=b"?"), *frames(entries, last=True), now=KEEP_REVOKED + 5)
    assert answers[0] == Ledger(wanted=True)
    assert intake.done.result() == [BACK]
    assert intake.receive(Ledger(digest=b"again")) is None, "once a connection"


@pytest.mark.parametrize(
    "forged",
    [Seal(Authority.create("other").key_pem, "a").seal(PROD), b"x" * 40, b"short"],
    ids=["of another CA", "of nothing", "short"],
)
async def test_e13_what_no_relay_has_sealed_is_not_believed_and_ends_the_reading(forged: bytes) -> None:
    book = LedgerBook(Seal(CA.key_pem, "a"))
    sent = frames([book.seal.seal(BOB), forged, book.seal.seal(PROD)])
    intake, _ = await given_back(book, Ledger(digest=b"?"), *sent)
    assert intake.forged
    assert intake.done.result() == [BOB], "what stood before it is genuine"


async def test_e13_no_more_is_read_than_an_agent_may_keep() -> None:
    book = LedgerBook(Seal(CA.key_pem, "a"))
    intake = Intake(book, lambda: 2000.0)
    intake.receive(Ledger(digest=b"?"))
    opened = 0
    seal = book.seal.open

    def counted(entry: bytes) -> AccessChange | None:
        nonlocal opened
        opened += len(entry)
        return seal(entry)

    book.seal.open = counted
    size = len(book.seal.seal(BOB._replace(reason="x" * 3000)))
    for number in range(MOST_HELD // size * 2):
        for frame in frames([book.seal.seal(BOB._replace(name=f"user {number:06}", reason="x" * 3000))]):
            intake.receive(frame)
    assert MOST_HELD - 2 * size < opened <= MOST_HELD
    assert not intake.done.done()
    intake.end()
    assert len(intake.done.result()) * 2000 < MOST_HELD
    again = Intake(book, lambda: 2000.0)
    again.receive(Ledger(digest=b"?"))
    opened = 0
    for frame in frames([book.seal.seal(BOB)] * 1000):
        again.receive(frame)
    assert again.forged, "an agent keeps one entry of each name"
    assert opened < 200


def test_entries_of_both_cas_of_a_rotation_open_until_the_former_one_is_retired() -> None:
    state = Rotation(CA.certificate_pem, CA.key_pem).take("next", time.time())
    announced = state.authority()
    known, state = state, state.take("activate", time.time())
    state = replace(state, former_secret=ledger_secret(known.key).hex())
    active, retired = state.authority(), state.take("retire", time.time()).authority()
    for name, other in (("a", "b"), ("b", "a")):  # one document, copied to relays with a registry each
        former, present = Seal.of(announced, name).seal(BOB), Seal.of(active, name).seal(BOB)
        assert former == Seal(CA.key_pem, name).seal(BOB) != present == Seal.of(retired, name).seal(BOB)
        for authority in (announced, active):
            seal = Seal.of(authority, name)
            assert seal.open(former) == seal.open(present) == BOB, "relays a step apart"
            for entry in (former, present):
                with pytest.raises(ValueError, match="sealed by no relay"):
                    Seal.of(authority, other).open(entry)
        assert Seal.of(retired, name).open(present) == BOB
        with pytest.raises(ValueError, match="sealed by no relay"):
            Seal.of(retired, name).open(former)


async def test_a_step_of_a_rotation_ends_what_an_agent_is_giving_back_and_forgets_what_was_opened() -> None:
    state = Rotation(CA.certificate_pem, CA.key_pem).take("next", time.time())
    known, state = state, state.take("activate", time.time())
    active = replace(state, former_secret=ledger_secret(known.key).hex())
    book = LedgerBook(Seal.of(active.authority(), "a"))
    former = Seal.of(known.authority(), "a")
    more = former.seal(BOB)[:16]
    newer = more + former._ciphers[0].encrypt(json.dumps([*BOB, "more"]).encode(), [more])
    intake, _ = await given_back(book, Ledger(digest=b"?"), *frames([newer], last=True))
    assert (intake.forged, intake.done.result()) == (False, [BOB]), "of a newer relay, under the former CA"
    intake = Intake(book, time.time)
    intake.receive(Ledger(digest=b"?"))
    await book.use(Seal.of(active.take("retire", time.time()).authority(), "a"))
    for frame in frames([former.seal(BOB)], last=True):
        intake.receive(frame)
    assert intake.was_cut_off
    assert not intake.forged
    assert not intake.complete
    with pytest.raises(ValueError, match="sealed by no relay"):
        book.open(newer)


async def test_an_entry_that_many_agents_give_back_is_opened_once() -> None:
    book, opened = LedgerBook(Seal(CA.key_pem, "a")), []
    seal = book.seal.open

    def counted(entry: bytes) -> AccessChange | None:
        opened.append(entry)
        return seal(entry)

    book.seal.open = counted
    sent = list(frames([book.seal.seal(one) for one in (BOB, BACK, PROD)], last=True))
    for _ in range(50):
        intake, _ = await given_back(book, Ledger(digest=b"?"), *sent)
        assert intake.done.result() == [BOB, BACK, PROD]
    assert len(opened) == 3


async def test_what_a_newer_relay_has_sealed_is_no_forgery() -> None:
    """Relays of a fleet are upgraded one after the other."""
    book = LedgerBook(Seal(CA.key_pem, "a"))
    seal = book.seal
    about = seal.seal(BOB)[:16]
    more = about + seal._ciphers[0].encrypt(json.dumps([*BOB, "more"]).encode(), [about])
    other = seal.seal(BOB._replace(kind=cast(Literal["user"], "group")))
    intake, _ = await given_back(book, Ledger(digest=b"?"), *frames([more, other], last=True))
    assert not intake.forged
    assert intake.done.result() == [BOB]


def test_where_there_is_no_room_for_all_the_newest_revocations_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    book = LedgerBook(Seal(CA.key_pem, "a"))
    old, new = BOB._replace(name="older", at=1.0), BOB._replace(name="newer", at=5000.0)
    monkeypatch.setattr(wire_ledger, "MOST_HELD", len(book.seal.seal(BOB)) + len(book.seal.seal(new)) + 50)
    book.learn([BACK._replace(at=9000.0), old, BOB, new])
    assert [book.holds(book.seal.seal(one)) for one in (old, BOB, new)] == [False, True, True]
    assert book.left_out == 2
    assert recovery_finding(None, book.left_out).code == "ledger_full"
    book.learn([new])
    assert (book.left_out, recovery_finding(None, book.left_out).code) == (0, "")
