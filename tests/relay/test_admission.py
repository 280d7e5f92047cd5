from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.relay.admission import ARRIVAL_PATIENCE, BURST_SECONDS, PATIENCE, Admission, Purpose, Ticket
from tests.relay.station import places, places_limits
from tests.support.clock import Clock


class Closed(list[str]):
    """Addresses whose connections were closed to make room, in order."""

    def watch(self, ticket: Ticket) -> Ticket:
        ticket.on_evicted = lambda: self.append(ticket.address)
        return ticket


def entered(admission: Admission, address: str, purpose: Purpose = Purpose.ARRIVING) -> Ticket:
    ticket = admission.enter(address)
    assert isinstance(ticket, Ticket), ticket
    if purpose is not Purpose.ARRIVING:
        assert ticket.becomes(purpose) == ""
    return ticket


def flood(
    admission: Admission, purpose: Purpose, addresses: Iterable[str], each: int, closed: Closed | None = None
) -> int:
    """Come with `each` connections from every address, those of all in turn; return how many were let in."""
    let_in = 0
    for address in [address for _ in range(each) for address in addresses]:
        ticket = admission.enter(address)
        if isinstance(ticket, Ticket):
            if closed is not None:
                closed.watch(ticket)
            if ticket.becomes(purpose):
                ticket.leave()
            else:
                let_in += 1
    return let_in


def test_caps_per_source() -> None:
    admission = places(100, 2)
    first, _ = entered(admission, "10.0.0.1"), entered(admission, "10.0.0.1")
    assert admission.enter("10.0.0.1") == "cap_address"
    assert admission.enter("::ffff:10.0.0.1") == "cap_address"
    entered(admission, "2001:db8::1")
    entered(admission, "2001:db8::2")
    assert admission.enter("2001:db8::ffff:3") == "cap_address"
    entered(admission, "2001:db8:0:1::1")
    first.leave()
    first.leave()
    assert admission.waiting == 4
    entered(admission, "10.0.0.1")


def test_the_newest_is_refused_among_equals() -> None:
    """A crowd in which each address holds one: those that came first are not closed for those behind them."""
    closed = Closed()
    admission = places(16, 100, clock=Clock())
    for number in range(16 - 3 * 2):
        closed.watch(entered(admission, f"10.0.0.{number}"))
    assert admission.enter("10.0.1.1") == "cap_total"
    assert closed == []


def test_crowds_do_not_displace_each_other() -> None:
    """docs/threats.md#J15: ten addresses come again whenever they were refused. Each that displaced an equal would
    cost a handshake; only what waits too long gives way."""
    clock, closed = Clock(), Closed()
    admission = places(1000, 100, clock=clock)
    hostile = [f"10.0.0.{number}" for number in range(10)]
    flood(admission, Purpose.HTTP, hostile, 100, closed)
    for _ in range(10):
        closed.clear()
        assert flood(admission, Purpose.HTTP, hostile, 10, closed) == len(closed) == 0
        entered(admission, "10.1.0.1", Purpose.HTTP).leave()
        assert len(closed) == 1, "an address with few is let in"
        flood(admission, Purpose.HTTP, hostile, 1)
    clock.now += 2 * PATIENCE
    assert flood(admission, Purpose.HTTP, hostile, 10) == 100


@pytest.mark.parametrize("purpose", [Purpose.CONTROL, Purpose.JOIN, Purpose.HTTP, Purpose.ARRIVING])
def test_few_addresses_with_many_give_way_to_many_with_few(purpose: Purpose) -> None:
    """docs/threats.md#J15: ten addresses with a hundred connections each; sixty honest newcomers, none refused."""
    closed = Closed()
    admission = places(1000, 100, clock=Clock())
    hostile = [f"10.0.0.{number}" for number in range(10)]
    assert flood(admission, purpose, hostile, 100, closed) >= 250
    before = len(closed)
    honest = [entered(admission, f"10.1.0.{number}", purpose) for number in range(60)]
    assert set(closed[before:]) <= set(hostile)
    assert [ticket.purpose for ticket in honest] == [purpose] * 60
    assert admission.waiting <= 1000


@pytest.mark.parametrize("flooded", list(Purpose))
@pytest.mark.parametrize("wanted", list(Purpose))
def test_no_purpose_takes_the_places_of_another(flooded: Purpose, wanted: Purpose) -> None:
    """docs/threats.md#J15: even a thousand addresses with one connection each leave an eighth to every purpose."""
    clock = Clock()
    admission = places(1000, 100, clock=clock)
    flood(admission, flooded, [f"10.{n // 250}.{n % 250}.1" for n in range(2000)], 1)
    if flooded is Purpose.ARRIVING:
        # What says nothing gives way at once, and all other purposes come through there.
        assert admission.enter("10.99.0.0") == "cap_total"
        clock.now += 2 * ARRIVAL_PATIENCE
    if wanted is not flooded:
        for number in range(125):
            entered(admission, f"10.99.{number}.1", wanted)
    assert admission.waiting <= 1000


def test_http_has_a_quarter_and_its_oldest_idle_connection_goes_first() -> None:
    clock, closed = Clock(), Closed()
    admission = places(16, 100, clock=clock)
    http = [closed.watch(entered(admission, f"10.0.0.{number}", Purpose.HTTP)) for number in range(4)]
    fifth = admission.enter("10.0.0.5")
    assert isinstance(fifth, Ticket)
    assert fifth.becomes(Purpose.HTTP) == "cap_http"
    fifth.leave()
    # The relay works for the first, and the second has just been answered: the third has been idle longest.
    http[0].works()
    http[1].waits()
    # Joins have their reserve and what is free; then the HTTP connections above the reserve of theirs go.
    for number in range(10):
        entered(admission, f"10.1.0.{number}", Purpose.JOIN)
    assert closed == ["10.0.0.2", "10.0.0.3"]
    assert admission.held() == {"arriving": 0, "control": 0, "join": 10, "http": 2}
    assert admission.evicted() == {"arriving": 0, "control": 0, "join": 0, "http": 2}


def test_who_stalls_gives_way_to_any_newcomer() -> None:
    clock, closed = Clock(), Closed()
    admission = places(8, 100, clock=clock)
    stalled = [closed.watch(entered(admission, f"10.0.0.{number}", Purpose.JOIN)) for number in range(5)]
    stalled[0].works()
    clock.now += PATIENCE / 2
    newcomer = admission.enter("10.1.0.1")
    assert isinstance(newcomer, Ticket)
    assert newcomer.becomes(Purpose.JOIN) == "cap_join"
    newcomer.leave()
    clock.now += PATIENCE
    entered(admission, "10.1.0.2", Purpose.JOIN)
    assert closed == ["10.0.0.1"]


def test_a_neighbour_that_stalls_gives_way_behind_one_address() -> None:
    """docs/threats.md#J15: one address is a NAT; a neighbour holds all that it may."""
    clock, closed = Clock(), Closed()
    admission = places(100, 3, clock=clock)
    stalled = [closed.watch(entered(admission, "10.0.0.1", Purpose.HTTP)) for _ in range(3)]
    assert admission.enter("10.0.0.1") == "cap_address"
    clock.now += PATIENCE + 1
    stalled[0].works()
    entered(admission, "10.0.0.1")
    assert closed == ["10.0.0.1"]
    assert stalled[0].purpose is Purpose.HTTP
    assert stalled[1].purpose is None


def test_the_rate_of_one_address() -> None:
    clock = Clock()
    admission = places(10_000, 10_000, rate=2, clock=clock)
    for _ in range(int(2 * BURST_SECONDS)):
        entered(admission, "10.0.0.1").leave()
    assert admission.enter("10.0.0.1") == "rate_address"
    entered(admission, "10.0.0.2")
    clock.now += 0.5
    entered(admission, "10.0.0.1")
    assert admission.enter("10.0.0.1") == "rate_address"


def test_behind_a_balancer_the_origin_counts() -> None:
    admission = places(100, 2)
    tickets = [admission.enter("10.0.0.9", through_proxy=True) for _ in range(5)]
    assert admission.waiting == 5
    reasons = []
    for ticket in tickets:
        assert isinstance(ticket, Ticket)
        reasons.append(ticket.came_from("192.0.2.1"))
        assert ticket.address == "192.0.2.1"
    assert reasons == ["", "", "cap_address", "cap_address", "cap_address"]
    for ticket in tickets:
        assert isinstance(ticket, Ticket)
        ticket.leave()
    assert admission.waiting == 0
    assert admission.sources == {}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from(["enter", "leave", "becomes", "waits", "works", "aside", "later"]),
            st.sampled_from(list(Purpose)),
        ),
        max_size=200,
    )
)  # fmt: skip
def test_the_bounds_hold_and_nothing_is_left_when_all_have_left(steps: list[tuple[int, str, Purpose]]) -> None:
    clock = Clock()
    admission = places(16, 3, clock=clock)
    held: list[Ticket] = []

    def gone(ticket: Ticket) -> None:
        held.remove(ticket)

    for number, what, purpose in steps:
        if what == "enter":
            ticket = admission.enter(f"10.0.0.{number}")
            if isinstance(ticket, Ticket):
                held.append(ticket)
                ticket.on_evicted = lambda ticket=ticket: gone(ticket)
        elif what == "later":
            clock.now += number
        elif held:
            ticket = held[number % len(held)]
            if what == "leave" or (what == "becomes" and ticket.becomes(purpose)):
                ticket.leave()
                held.remove(ticket)
            elif what == "aside":
                ticket.set_aside()
            elif what == "waits":
                ticket.waits()
            elif what == "works":
                ticket.works()
        taken = admission.held()
        assert sum(taken.values()) == admission.waiting == sum(one.purpose is not None for one in held) <= 16
        assert taken["http"] <= 4
        assert max((len(found) for found in admission.sources.values()), default=0) <= 3
    for ticket in held:
        ticket.leave()
    assert admission.waiting == 0
    assert admission.sources == {}
    assert not any(admission.waiting for places in admission.places.values())


def test_who_is_set_aside_counts_against_its_source_only() -> None:
    admission = places(3, 2)
    held = [admission.enter("10.0.0.1"), admission.enter("10.0.0.1")]
    for ticket in held:
        assert isinstance(ticket, Ticket)
        ticket.set_aside()
        ticket.set_aside()
    assert admission.waiting == 0
    assert admission.enter("10.0.0.1") == "cap_address"
    others = [admission.enter(f"10.0.1.{n}") for n in range(4)]
    assert others[3] == "cap_total"
    for ticket in [*held, *others[:3]]:
        assert isinstance(ticket, Ticket)
        ticket.leave()
        ticket.leave()
        ticket.set_aside()
    assert admission.waiting == 0
    assert admission.sources == {}


def test_other_bounds_count_for_newcomers() -> None:
    admission = places(16, 4)
    tickets = [admission.enter("10.0.0.1") for _ in range(4)]
    assert all(isinstance(ticket, Ticket) for ticket in tickets)
    admission.change_limits(places_limits(16, 2, rate=1))
    assert admission.waiting == 4, "no place is taken away"
    assert admission.enter("10.0.0.1") == "cap_address"
    for _ in range(5):
        admission.enter("10.0.0.2")
    assert admission.enter("10.0.0.2") == "rate_address"
    admission.change_limits(places_limits(16, 8))
    assert isinstance(admission.enter("10.0.0.1"), Ticket)
