"""A payer that takes more than its share of the loop while others wait is slowed down, and nobody else is."""

from __future__ import annotations

import asyncio
import math
import time
import types
from collections.abc import Callable, Generator
from dataclasses import dataclass

import pytest

from arcbridge.loop_shares import BURST, MAX_WAIT, RECENT, REFUSED_AFTER, LoopShares, LoopTime, LoopTimes


class Loop:
    """A loop of two payers whose clock moves only while one of them works."""

    def __init__(self, share: float = 0.5) -> None:
        self.now = self.cpu = 0.0
        self.looks: list[Callable[[float], None]] = []
        self.shares = LoopShares(cpu=lambda: self.cpu, look_later=self.looks.append)
        self.waits: list[float] = []
        self.heavy = LoopTime(self.shares, self.waits.append)
        self.other = LoopTime(self.shares, self.waits.append)
        for payer in (self.heavy, self.other):
            payer.set_share(0.0, share)

    def work(self, payer: LoopTime, seconds: float, *, cpu: float | None = None) -> None:
        began, before = self.now, self.shares.total
        self.now += seconds
        self.cpu += seconds if cpu is None else cpu
        payer.charge(self.now, began, before)

    def turns(self, count: int, seconds: float, *, other: float = 0.0002) -> int:
        """Give both payers `count` turns; return how often one of them was slowed down."""
        before = len(self.waits)
        for _ in range(count):
            self.work(self.heavy, seconds)
            if other:
                self.work(self.other, other)
        return len(self.waits) - before


def test_a_payer_of_long_callbacks_is_slowed_down_while_another_one_waits() -> None:
    loop = Loop()
    assert loop.turns(8, 0.2) == 0  # its burst
    assert loop.turns(8, 0.2) > 0
    assert max(loop.waits) <= MAX_WAIT
    assert loop.heavy.held_until > loop.now
    assert loop.other.held_until == 0.0


def test_who_is_slowed_down_again_and_again_is_refused() -> None:
    loop = Loop()
    loop.turns(6, 0.2)
    began = loop.now
    while not loop.heavy.refused_until:
        loop.turns(1, 0.2)
        loop.now = max(loop.now, loop.heavy.held_until)
    assert loop.now - began >= REFUSED_AFTER
    assert loop.heavy.refused_until >= loop.heavy.held_until + RECENT
    loop.now = loop.heavy.refused_until + RECENT
    loop.heavy.refused_until = 0.0
    loop.turns(6, 0.5)
    assert loop.heavy.held_until > loop.now
    assert loop.heavy.refused_until == 0.0, "it begins anew"


def test_a_payer_that_obeys_gets_its_share_and_no_more() -> None:
    loop = Loop()
    for _ in range(200):
        loop.work(loop.heavy, 0.05)
        loop.work(loop.other, 0.0002)
        loop.now = max(loop.now, loop.heavy.held_until)
    assert loop.heavy.spent / loop.now == pytest.approx(0.5, abs=0.1)


def test_an_only_payer_takes_the_whole_loop() -> None:
    loop = Loop()
    assert loop.turns(100, 0.2, other=0.0) == 0
    assert loop.shares.over == 0.0
    loop.now += 1.0
    # What it took alone it does not owe.
    assert loop.turns(1, 0.05) == 0


def test_short_turns_slow_nobody_down_however_many_they_are() -> None:
    loop = Loop()
    assert loop.turns(20_000, 0.0005) == 0
    assert len(loop.looks) == 1, "one look at a time"
    look = loop.looks.pop()
    loop.turns(1, 0.0)
    look(loop.now)
    loop.looks.clear()
    assert loop.turns(1000, 0.0005) > 0, "10 s of CPU time in one turn"


@pytest.mark.parametrize(
    ("own", "others", "stood_still", "is_late"), [(30, 0.0, 0.0, True), (10, 0.1, 0.0, False), (10, 0.0, 0.1, False)]
)
def test_a_long_turn_is_the_payers_whose_cpu_time_made_it_long(
    own: int, others: float, stood_still: float, is_late: bool
) -> None:
    """docs/threats.md#L48."""
    loop = Loop()
    for _ in range(5000):
        if not loop.looks:
            loop.turns(1, 0.001)
    loop.turns(own, 0.001, other=0.0)
    loop.work(loop.other, others)
    loop.work(loop.heavy, stood_still, cpu=0.0)
    loop.looks.pop()(loop.now)
    loop.work(loop.other, 0.001)
    assert (loop.turns(100, 0.001, other=0.0) > 0) is is_late


def test_another_payer_counts_as_waiting_for_a_second() -> None:
    loop = Loop()
    loop.work(loop.other, 0.001)
    loop.turns(20, 0.2, other=0.0)  # it used the loop before all of these, which lasted 4 s
    before = len(loop.waits)
    assert loop.turns(int(2 * RECENT / 0.2), 0.2, other=0.0) == 0
    assert len(loop.waits) == before


def test_time_in_which_the_thread_did_not_run_is_nobodys() -> None:
    loop = Loop()
    for _ in range(50):
        loop.work(loop.heavy, 0.2, cpu=0.001)  # the machine was busy with others
        loop.work(loop.other, 0.0002)
    assert not loop.waits


def test_a_nested_measurement_is_charged_once_and_to_its_own_payer() -> None:
    loop = Loop()
    began, before = loop.now, loop.shares.total
    loop.now += 0.25
    loop.work(loop.other, 0.5)
    loop.now += 0.25
    loop.heavy.charge(loop.now, began, before)
    assert (loop.heavy.spent, loop.other.spent, loop.shares.total) == (0.5, 0.5, 1.0)


def test_time_before_a_measurement_within_another_one_counts() -> None:
    """The inner one reads the CPU's clock, and the outer one does not take its own time for one that the thread did not
    run for."""
    loop = Loop()
    for _ in range(20):
        began, before = loop.now, loop.shares.total
        loop.now += 0.2
        loop.cpu += 0.2
        loop.work(loop.other, 0.01)
        loop.heavy.charge(loop.now, began, before)
    assert loop.waits


def test_payers_that_are_over_their_shares_have_one_together() -> None:
    alone, two = Loop(), Loop()
    third = LoopTime(two.shares, two.waits.append)
    third.set_share(0.0, 0.5)
    for loop, payers in ((alone, [alone.heavy]), (two, [two.heavy, third])):
        for _ in range(100):
            for payer in payers:
                loop.work(payer, 0.05)
            loop.work(loop.other, 0.0002)
            loop.now += max(loop.waits, default=0.0)
            loop.waits.clear()
    of_two = (two.heavy.spent + third.spent) / two.now
    assert of_two == pytest.approx(alone.heavy.spent / alone.now, abs=0.1)


@pytest.mark.parametrize("count", [2, 3])
def test_payers_that_are_the_only_ones_leave_the_loop_no_idle_time(count: int) -> None:
    """docs/threats.md#L49. Each of them obeys; the clock moves on alone only where all are held."""
    loop = Loop()
    heavy = [loop.heavy, loop.other, LoopTime(loop.shares, loop.waits.append)][:count]
    heavy[-1].set_share(0.0, 0.5)
    idle = 0.0
    while loop.now < 60.0:
        ready = [one for one in heavy if one.held_until <= loop.now]
        for one in ready:
            loop.work(one, 0.05)
        if not ready:
            until = min(one.held_until for one in heavy)
            idle += until - loop.now
            loop.now = until
    assert idle < 0.1 * loop.now
    assert min(one.spent for one in heavy) > 0.8 * max(one.spent for one in heavy)


async def test_work_for_a_user_within_the_steps_of_an_address_is_nobody_that_waits() -> None:
    """docs/threats.md#L49: an address whose users alone come is not slowed down for them."""
    loop = Loop()

    async def work() -> None:
        loop.now += 0.1
        loop.cpu += 0.1

    async def serve() -> None:
        loop.now += 0.2
        loop.cpu += 0.2
        await loop.other.steps(work(), inner=inner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arcbridge.loop_shares.time", types.SimpleNamespace(monotonic=lambda: loop.now))
        for inner in (True, False):
            for _ in range(30):
                await loop.heavy.steps(serve())
            assert bool(loop.waits) is not inner
    assert loop.shares.inner == pytest.approx(3.0)
    assert loop.other.inner == pytest.approx(3.0)


def test_a_share_of_none_is_never_slowed_down_and_a_share_may_change() -> None:
    loop = Loop(share=0.0)
    assert loop.turns(100, 0.2) == 0
    loop.heavy.set_share(loop.now, 0.5)
    assert loop.turns(20, 0.2) > 0
    loop.heavy.set_share(loop.now, 0.9)
    assert loop.heavy._bucket is not None
    assert (loop.heavy._bucket.burst, loop.heavy._bucket.rate) == (0.9 * BURST, 0.9)
    loop.heavy.set_share(loop.now, 0.0)
    assert loop.heavy.refused_until == 0.0
    assert loop.turns(20, 0.2) == 0


def test_a_debt_is_bounded() -> None:
    loop = Loop()
    loop.work(loop.other, 0.001)
    loop.turns(1, 100.0)
    assert loop.waits == [MAX_WAIT]
    assert loop.heavy.refused_until == 0.0


async def test_each_step_of_a_task_is_charged_and_its_end_is_its_own() -> None:
    loop = Loop()

    @types.coroutine
    def step() -> Generator[None, None, None]:
        yield

    async def work() -> str:
        await step()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "cancelled"
        return "never"

    task = asyncio.get_running_loop().create_task(loop.heavy.steps(work()))
    spent = []
    for _ in range(3):
        await asyncio.sleep(0)
        spent.append(loop.heavy.spent)
    assert 0.0 < spent[0] < spent[1]
    task.cancel()
    assert await task == "cancelled"
    assert loop.heavy.spent > spent[-1]
    assert loop.shares.total == loop.heavy.spent
    spent_before = loop.heavy.spent

    async def value() -> int:
        await step()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        return 7

    assert await loop.heavy.steps(value()) == 7
    assert loop.heavy.spent > spent_before


async def test_the_loop_itself_is_looked_at_in_a_later_turn() -> None:
    shares = LoopShares()
    looked: list[float] = []
    began = time.monotonic()
    shares.look_later(looked.append)
    assert not looked
    while not looked:
        await asyncio.sleep(0)
    assert looked[0] > began


@dataclass(slots=True)
class Person:
    """A user of the simulated loop: wants `part` of the wall clock in bursts of callbacks of `costs` CPU seconds each,
    obeys while it is held, and ends its turn there."""

    part: float
    costs: tuple[float, ...]
    ends: float = math.inf
    """When it goes away, seconds."""
    done: float = 0.0
    """CPU seconds."""
    refused_at: float = 0.0
    holds: int = 0


def simulate(*people: Person, seconds: float = 40.0, quota: float = 1.0) -> list[float]:
    """Run a loop whose clock is the work of these people; return for each the part of the time that it worked.

    `quota`: the part of each 100 ms for which the thread runs; for the rest of it the machine stands still, and a
    callback that is under way then lasts so much longer.
    """
    now = cpu = 0.0
    looks: list[Callable[[float], None]] = []
    shares = LoopShares(cpu=lambda: cpu, look_later=looks.append)

    def count(one: Person) -> Callable[[float], None]:
        def over(wait: float) -> None:
            one.holds += 1

        return over

    payers = [LoopTime(shares, count(one)) for one in people]
    for payer in payers:
        payer.set_share(0.0, 0.5)
    while now < seconds:
        due, looks[:] = looks[:], []
        began_turn = now
        for one, payer in zip(people, payers, strict=True):
            if payer.refused_until > now:
                one.refused_at = one.refused_at or now
                continue
            if one.done > now * one.part or payer.held_until > now or now > one.ends:
                continue
            for cost in one.costs:
                began, before = now, shares.total
                cpu += cost
                one.done += cost
                now += cost
                # Periods whose quota was used up within this callback.
                now += 0.1 * (1.0 - quota) * (cpu // (0.1 * quota) - (cpu - cost) // (0.1 * quota))
                payer.charge(now, began, before)
        for look in due:
            look(now)
        if now == began_turn:
            now += 0.001
    return [one.done / now for one in people]


BULK = (0.002,)
ATTACK = (0.025, 0.006)
"""What a reader of this code found: one late callback, and a second one that made the attacker heavy."""


@pytest.mark.parametrize("wanted", [0.3, 0.45, 0.9])
@pytest.mark.parametrize("attackers", [1, 3])
def test_a_user_of_short_callbacks_gets_what_it_wants_whatever_others_do_in_bursts(
    wanted: float, attackers: int
) -> None:
    """docs/threats.md#L48. The late turns are the attackers' own, 3.4 % of the loop each."""
    victim = Person(wanted, BULK)
    got, *_ = simulate(victim, *(Person(0.034, ATTACK) for _ in range(attackers)))
    assert (victim.holds, victim.refused_at) == (0, 0.0)
    assert got == pytest.approx(min(wanted, 1.0 - 0.034 * attackers), abs=0.03)


def test_a_user_of_many_callbacks_in_one_turn_is_slowed_down_to_the_share_and_never_refused() -> None:
    """docs/threats.md#L48: 24 ms of one user in each turn; each callback is short."""
    victim, attacker = Person(0.9, BULK * 12), Person(0.034, ATTACK)
    got, _ = simulate(victim, attacker)
    assert victim.holds > 0
    assert victim.refused_at == 0.0
    assert got == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("long", [0.03, 0.1])
def test_who_is_slowed_down_below_the_full_share_is_not_refused(long: float) -> None:
    """docs/threats.md#L48. A heavy user next to one that wants 45 % in late callbacks: they share, and it is slow."""
    victim, attacker = Person(0.45, (long,)), Person(0.2, (long,))
    got, _, light = simulate(victim, attacker, Person(0.01, (0.0005,)), seconds=60.0)
    assert victim.refused_at == 0.0
    assert got > 0.2
    assert light == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize("names", [1, 2, 4])
def test_the_finder_of_a_dear_request_leaves_half_of_the_loop_to_light_users(names: int) -> None:
    """docs/threats.md#L41. Under one name the finder is refused at last; under several they get one share together."""
    finders = [Person(1.0, (0.05,)) for _ in range(names)]
    light = [Person(0.05, (0.0005,)) for _ in range(8)]
    got = simulate(*finders, *light)
    assert sum(got[:names]) < 0.6
    assert all(one == pytest.approx(0.05, abs=0.005) for one in got[names:])
    assert not any(one.refused_at or one.holds for one in light)
    assert bool(finders[0].refused_at) is (names == 1)


def test_a_finder_who_shared_for_a_moment_is_refused_all_the_same() -> None:
    """docs/threats.md#L40. Another one is heavy at first, and light from then on."""
    finder, other = Person(1.0, (0.05,)), Person(0.01, (0.0005,))
    simulate(finder, Person(0.3, (0.02,), ends=6.0), other)
    assert finder.refused_at > 6.0


@pytest.mark.parametrize("quota", [0.1, 0.3, 0.7])
def test_a_throttled_machine_refuses_nobody_whose_callbacks_are_short(quota: float) -> None:
    """docs/threats.md#L48. Callbacks last for up to 92 ms, by the clock on the wall."""
    people = [Person(1.0, BULK), Person(1.0, BULK * 12), Person(0.01, (0.0005,))]
    got = simulate(*people, quota=quota)
    assert [one.refused_at for one in people] == [0.0] * 3
    assert sum(got) > 0.5 * quota
    assert people[2].holds == 0


def test_a_throttled_machine_refuses_nobody_whose_cpu_time_is_small() -> None:
    """docs/threats.md#L48. Its callbacks are long, and take the whole quota; its CPU time is a twentieth of a core."""
    one, other = Person(1.0, (0.025,)), Person(0.005, (0.0005,))
    simulate(one, other, quota=0.05, seconds=120.0)
    assert (one.refused_at, other.refused_at) == (0.0, 0.0)


def test_many_light_users_are_never_slowed_down() -> None:
    """docs/threats.md#L48. Together they take nine tenths of the loop, in late turns."""
    people = [Person(0.009, (0.003, 0.001)) for _ in range(100)]
    got = simulate(*people)
    assert not any(one.holds or one.refused_at for one in people)
    assert sum(got) == pytest.approx(0.9, abs=0.05)


def test_the_payers_of_many_keys_are_bounded_and_share_one_loop() -> None:
    times: LoopTimes[str] = LoopTimes(0.5, size=2)
    first = times.of("a", 0.0)
    second = times.of("b", 0.0)
    assert first.shares is second.shares
    assert times.of("a", 0.0) is first
    times.of("c", 0.0)
    assert times.of("a", 0.0) is first
    assert times.of("b", 0.0) is not second, "it was the one asked for longest ago"
    times.change(0.1, 0.0)
    kept = times.of("b", 0.0)._bucket
    assert kept is not None
    assert kept.rate == 0.1
