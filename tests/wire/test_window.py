"""Credit: never lost, never invented; windows grow by bandwidth times the smallest round trip."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.wire.backlog import Backlog
from arcbridge.wire.replay import Budget
from arcbridge.wire.window import LEAST_ROUND_TRIP, QUICK, Growth, ReceiveWindow
from tests.support.books import check_window

KIB = 1024


def test_a_grant_per_quarter_of_the_window() -> None:
    window = ReceiveWindow(100, 100)
    assert window.receive(100)
    assert not window.receive(1)
    assert window.consume(24, 0.0, 0.0) == 0
    assert window.consume(1, 0.0, 0.0) == 25
    assert window.receive(25)
    assert not window.receive(1)


def test_open_up_lifts_to_the_whole_window() -> None:
    window = ReceiveWindow(64, 64)
    window.receive(60)
    window.consume(10, 0.0, 0.0)
    window.size = window.limit = 1000
    assert window.open_up() == 946
    assert window.open_up() == 0
    check_window(window)


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000), st.floats(0, 5)), max_size=60))
def test_books_balance(steps: list[tuple[int, int, float]]) -> None:
    window = ReceiveWindow(1000, 8000)
    credit, now = 1000, 0.0  # the sender's side
    for send, take, pause in steps:
        now += pause
        send = min(send, credit)
        assert window.receive(send)
        credit -= send
        credit += window.consume(min(take, window.unconsumed), now, 0.05)
        check_window(window)
        assert window.granted == window.received + credit
        assert credit <= window.size
    credit += window.consume(window.unconsumed, now, 0.05)
    assert window.size - credit <= window.size // 4, "once all is consumed, the sender lacks a quarter at most"


def run(window: ReceiveWindow, *, rate: float, trip: float, seconds: float, piece: int = 16 * KIB) -> None:
    """A sender that uses all its credit over a path of `rate` bytes/s and round trip `trip`; the reader keeps up."""
    now, credit = 0.0, window.granted
    grants: list[tuple[float, int]] = []
    while now < seconds:
        now += piece / rate
        credit += sum(due for at, due in grants if at <= now)
        grants = [(at, due) for at, due in grants if at > now]
        if credit >= piece:
            credit -= piece
            assert window.receive(piece)
            if due := window.consume(piece, now, trip):
                grants.append((now + trip, due))
        check_window(window)


def test_it_grows_to_fill_a_long_path() -> None:
    window = ReceiveWindow(256 * KIB, 16 * KIB * KIB)
    run(window, rate=50e6, trip=0.1, seconds=5)
    assert window.size >= 50e6 * 0.1, "one stream fills the path"
    assert window.size <= 50e6 * 0.1 * 2.2


def test_it_stays_small_on_a_slow_path() -> None:
    window = ReceiveWindow(256 * KIB, 16 * KIB * KIB)
    run(window, rate=1e6, trip=0.02, seconds=20)
    assert window.size == 256 * KIB


def test_it_never_exceeds_its_limit() -> None:
    window = ReceiveWindow(256 * KIB, 1024 * KIB)
    run(window, rate=200e6, trip=0.2, seconds=3)
    assert window.size == 1024 * KIB


@pytest.mark.parametrize("piece", [256 * KIB, 16 * KIB], ids=["gulps", "pieces that were stored"])
def test_a_slow_reader_who_takes_a_window_at_once_does_not_make_it_grow(piece: int) -> None:
    window = ReceiveWindow(256 * KIB, 16 * KIB * KIB)
    now = 0.0
    for _ in range(50):  # 256 KiB/s: a reader that pauses for a second, and then reads all that is there
        now += 1.0
        free = window.granted - window.received
        assert window.receive(free)
        while window.unconsumed:
            window.consume(min(piece, window.unconsumed), now, 0.01)
    assert window.size == 256 * KIB


def test_the_first_round_trip_is_unknown() -> None:
    window = ReceiveWindow(256 * KIB, 16 * KIB * KIB)
    run(window, rate=1e9, trip=0.0, seconds=0.2)
    assert window.size <= 2.2 * 1e9 * LEAST_ROUND_TRIP + 256 * KIB


def test_a_copys_window_doubles_within_the_round_trip() -> None:
    window = ReceiveWindow(256 * KIB, 16 * KIB * KIB)
    now, due = 10.0, 0
    while window.received + 16 * KIB <= window.granted and window.received < 1024 * KIB:
        now += 16 * KIB / 500e6
        assert window.receive(16 * KIB)
        due += window.consume(16 * KIB, now, 0.0003)
    assert window.received == 1024 * KIB, "credit never ran out, and each grant came at once"
    assert QUICK <= window.size <= 2 * QUICK


def test_m22_windows_grow_within_what_their_user_has() -> None:
    process, user = Budget(1 << 30), Backlog(1000)
    first, second = Growth(800, process), Growth(800, process)
    assert first.take(300) == 300
    for growth in (first, second):
        growth.share(user)
    assert user.held == 300
    assert second.take(900) == 700
    assert first.take(1) == 0
    second.give(100)
    assert first.take(500) == 100
    second.clear()
    assert (user.held, process.held) == (400, 400)
    assert Growth(800, process).take(500) == 500, "another user's"
