from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arcbridge.relay.admission import Admission, Ticket


def entered(admission: Admission, address: str) -> Ticket:
    ticket = admission.enter(address)
    assert isinstance(ticket, Ticket)
    return ticket


def test_caps_in_all_and_per_source() -> None:
    admission = Admission(4, 2)
    first, _ = entered(admission, "10.0.0.1"), entered(admission, "10.0.0.1")
    assert admission.enter("10.0.0.1") == "cap_address"
    assert admission.enter("::ffff:10.0.0.1") == "cap_address"
    entered(admission, "2001:db8::1")
    entered(admission, "2001:db8::2")
    assert admission.enter("10.0.0.2") == "cap_total"
    first.leave()
    first.leave()
    assert admission.waiting == 3
    assert admission.enter("2001:db8::ffff:3") == "cap_address"
    entered(admission, "2001:db8:0:1::1")


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=200))
def test_nothing_is_left_when_all_have_left(steps: list[tuple[int, bool]]) -> None:
    admission = Admission(8, 3)
    held: list[Ticket] = []
    for number, leaves in steps:
        if leaves and held:
            held.pop(number % len(held)).leave()
        else:
            ticket = admission.enter(f"10.0.0.{number}")
            if isinstance(ticket, Ticket):
                held.append(ticket)
        assert admission.waiting == len(held) <= 8
    for ticket in held:
        ticket.leave()
    assert admission.waiting == 0
    assert len(admission._sources) == 0


def test_who_is_set_aside_counts_against_its_source_only() -> None:
    admission = Admission(total=3, per_source=2)
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
    assert len(admission._sources) == 0
