"""A user's pairs pause and go on together, and each of them is read between two pauses (docs/threats.md#L44)."""

from __future__ import annotations

import asyncio
import time

from arcbridge.loop_shares import LoopShares, LoopTime
from arcbridge.relay.pump_accounts import PumpAccount
from tests.support.eventually import until


class Pair:
    """A pair that notes what it is told."""

    def __init__(self) -> None:
        self.closed = False
        self.told: list[str] = []

    def pause(self) -> None:
        self.told.append("pause")

    def go_on(self) -> None:
        self.told.append("go on")


def over(payer: LoopTime, seconds: float) -> None:
    payer.held_until = time.monotonic() + seconds
    payer.on_over(seconds)


async def until_told(pair: Pair, count: int) -> None:
    await until(lambda: len(pair.told) >= count)


async def test_all_pairs_pause_at_the_end_of_the_turn_and_go_on_when_the_debt_is_paid() -> None:
    payer = LoopTime(LoopShares(), lambda seconds: None)
    account = PumpAccount(payer)
    pairs = [Pair(), Pair()]
    account.pumps.update(pairs)
    over(payer, 0.001)
    over(payer, 0.001)
    assert [pair.told for pair in pairs] == [[], []], "whoever is readable in this turn is read"
    for pair in pairs:
        await until_told(pair, 2)
        assert pair.told == ["pause", "go on"]
    assert payer.spent > 0.0, "pausing is charged"
    account.close()


async def test_a_debt_that_grew_prolongs_the_pause() -> None:
    payer = LoopTime(LoopShares(), lambda seconds: None)
    account, pair = PumpAccount(payer), Pair()
    account.pumps.add(pair)
    over(payer, 0.0)
    payer.held_until = time.monotonic() + 3600.0
    for _ in range(5):
        await asyncio.sleep(0)
    account._go_on()
    assert pair.told == ["pause"]
    payer.held_until = 0.0
    account._go_on()
    assert pair.told == ["pause", "go on"]
    account.close()


async def test_a_new_pair_is_paused_with_the_others_and_a_closed_one_is_left_alone() -> None:
    payer = LoopTime(LoopShares(), lambda seconds: None)
    account, new, ended = PumpAccount(payer), Pair(), Pair()
    account.hold(new)
    assert new.told == [], "nobody is over"
    payer.held_until = time.monotonic() + 3600.0
    ended.closed = True
    account.hold(ended)
    account.hold(new)
    assert (new.told, ended.told) == (["pause"], [])
    account.close()
    await asyncio.sleep(0)
    assert new.told == ["pause"]
    payer.on_over(1.0)
    assert account._next is None
