"""Seats are given in turn, and none is lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from arcbridge.agent.seats import Seats


async def test_seats_are_given_in_the_order_of_the_asking() -> None:
    seats = Seats(2)
    assert seats.take()
    assert seats.take()
    assert not seats.take()
    order: list[int] = []

    async def ask(number: int) -> None:
        await seats.turn(5)
        order.append(number)

    tasks = [asyncio.create_task(ask(number)) for number in range(4)]
    await asyncio.sleep(0)
    assert not order
    for _ in range(4):
        seats.leave()
        assert not seats.take(), "one who asks now does not overtake"
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert (order, seats.held) == ([0, 1, 2, 3], 2)


async def test_a_turn_that_does_not_come_takes_no_seat() -> None:
    seats = Seats(1)
    seats.take()
    with pytest.raises(TimeoutError):
        await seats.turn(0.01)
    seats.leave()
    assert seats.held == 0
    await seats.turn(0.01)
    assert seats.held == 1


async def test_who_came_together_is_not_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of refusals in one turn of the loop would keep all others waiting."""
    parts = [1.0, 0.0]
    monkeypatch.setattr("random.uniform", lambda least, most: parts.pop())
    seats = Seats(1)
    seats.take()
    tasks = [asyncio.create_task(seats.turn(20)) for _ in parts]
    done, waiting = await asyncio.wait(tasks, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(waiting)) == (1, 1)
    for task in waiting:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(isinstance(task.exception(), TimeoutError) for task in done)


@pytest.mark.parametrize("most", [2, 0])
async def test_who_waits_gets_the_seats_that_a_higher_bound_makes_free(most: int) -> None:
    """Settings are read again: behind those who wait nobody else would get one either."""
    seats = Seats(1)
    seats.take()
    waiting = asyncio.create_task(seats.turn(5))
    await asyncio.sleep(0)
    seats.change(most)
    await waiting
    assert seats.held == 2


async def test_without_a_bound_none_waits() -> None:
    seats = Seats(0)
    assert all(seats.take() for _ in range(1000))


@pytest.mark.parametrize("seed", range(20))
async def test_cancelled_turns_lose_no_seat(seed: int) -> None:
    rng, seats = random.Random(seed), Seats(3)
    held = 0

    async def work() -> None:
        nonlocal held
        await seats.turn(5)
        held += 1
        assert held <= seats.held <= 3
        try:
            await asyncio.sleep(rng.random() / 500)
        finally:
            held -= 1
            seats.leave()

    tasks = [asyncio.create_task(work()) for _ in range(60)]
    while not all(task.done() for task in tasks):
        rng.choice(tasks).cancel()
        await asyncio.sleep(rng.random() / 1000)
    for task in tasks:
        assert task.cancelled() or task.exception() is None
    assert (seats.held, len(seats._waiting)) == (0, 0)
