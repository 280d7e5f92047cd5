"""An hour of agents, relays and users under one virtual clock (bench/virtual): what must hold, and that it is noticed.

`python -m bench.virtual` runs as many agents as are wanted; a seed that fails is kept in `virtual_seeds` and runs here
from then on. With ARCBRIDGE_LONG=1 the product is broken on purpose, in one place after the other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.control import BALANCE_LAST, LEAVE_GRACE, SETTLED, ControlConnections
from arcbridge.agent.relay_choice import RelayChoice
from arcbridge.client.relay.relays import Relays
from arcbridge.net.backoff import Backoff
from arcbridge.relay.control import ControlServer
from arcbridge.relay.fleet.base import Fleet
from arcbridge.relay.fleet.nats import NatsFleet
from bench.virtual.loop import VirtualLoop
from bench.virtual.model import HOME
from bench.virtual.plan import KINDS, Outage, Size, outages
from bench.virtual.run import simulate
from tests.support.long import long_form

KEPT = sorted((Path(__file__).parent / "virtual_seeds").glob("*.json"))
EVERYTHING = tuple(range(12))
PLAN = (
    Outage(300, "kill", (3,), seconds=20),
    Outage(600, "upgrade", EVERYTHING, seconds=2),
    Outage(1400, "region", (1, 5, 9), seconds=10),
    Outage(1700, "all", EVERYTHING, seconds=3),
)


def test_time_jumps_to_the_next_timer() -> None:
    async def main() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        began, seen = loop.time(), []
        for name, after in (("late", 86400.0), ("early", 1.0)):
            loop.call_later(after, lambda name=name: seen.append((name, loop.time() - began)))
        assert await loop.run_in_executor(None, lambda: 7) == 7
        await asyncio.sleep(100_000)
        return seen

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(main()) == [("early", 1.0), ("late", 86400.0)]
        with pytest.raises(RuntimeError, match="nothing left to do"):
            runner.run(asyncio.Event().wait())


def test_every_kind_of_outage_has_its_seeds() -> None:
    plans = [outages(Size(), seed) for seed in range(20)]
    assert {outage.kind for plan in plans for outage in plan} == set(KINDS)
    assert all(first.at + first.seconds < then.at for plan in plans for first, then in pairwise(plan))


@pytest.mark.parametrize("kept", KEPT, ids=[path.stem for path in KEPT])
def test_a_seed_that_once_failed(kept: Path) -> None:
    case = json.loads(kept.read_text())
    size = Size(**case["size"])
    if size.agents > 2000 and not long_form():
        pytest.skip("ARCBRIDGE_LONG=1 runs what takes minutes: a large seed")
    result = simulate(size, case["seed"])
    assert result["violations"] == [], case["found"]
    assert len(result["outages"]) == size.outages
    assert result["users_served"] > 0


def test_a_seed_always_makes_the_same_run() -> None:
    runs = [simulate(Size(agents=40, users=4, outages=2), 7) for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_way_home_is_shorter_than_its_bound() -> None:
    """A try, the time until a stand-in is left for it, and the grace in which it is left: 132 s of 120 (20 000 agents,
    seed 8). Chance has no part in it, as in the run of a few agents."""
    assert BALANCE_LAST + SETTLED + LEAVE_GRACE <= HOME


def test_behind_one_nat_too_all_are_back_in_a_minute() -> None:
    """As 10 000 agents and 300 a second at each of three relays, in proportion: an address may make 200 connections a
    second, and hold 100 that have not shown who they are."""
    size = Size(agents=400, users=5, relays=3, regions=1, seconds=420, agents_per_second=12, addresses=1)
    result = simulate(size, 5, plan=[Outage(200, "all", (0, 1, 2), seconds=3)])
    assert result["violations"] == []
    assert result["turned_away"]["rate_address"] > 0


# -- broken on purpose ----------------------------------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


async def _at_once(*_: Any, **__: Any) -> bool:
    return True


async def _done(*_: Any, **__: Any) -> None:
    """Do nothing, as a coroutine."""


def _delay(delay: Callable[[Backoff, float, float | None], float]) -> Break:
    def next_delay(self: Backoff, *, lasted: float = 0.0, hint: float | None = None) -> float:
        self.attempt += 1
        bound = min(self._cap, self._first * 2.0 ** min(self.attempt - 1, 32))
        return delay(self, bound, hint)

    return lambda patch: patch.setattr(Backoff, "next_delay", next_delay)


def _set(owner: object, name: str, value: object) -> Break:
    return lambda patch: patch.setattr(owner, name, value)


def _listed(self: RelayChoice, relays: Any, wanted: int, **named: Any) -> None:
    _CHOICE(self, relays, wanted, **named | {"draw": lambda: 0.0})


_CHOICE = RelayChoice.__init__
_ORDER = Relays.order

BROKEN: dict[str, tuple[Break, str]] = {
    "no pacing": (_set(ControlServer, "_turn", _at_once), "pace"),
    "no time that a relay names is obeyed": (_delay(lambda self, bound, hint: self._random() * bound), "early"),
    "a backoff without jitter": (_delay(lambda self, bound, hint: (hint or 0) + bound), "back"),
    "a backoff that grows on": (_delay(lambda self, bound, hint: (hint or 0) + 100 * self.attempt), "back"),
    "relays in the order of the list": (_set(RelayChoice, "__init__", _listed), "spread"),
    "no way back to a preferred relay": (_set(ControlConnections, "_preferred_back", lambda *_: None), "home"),
    "an agent that is turned away tries the next relay at once": (_set(RelayChoice, "turned_away", _nothing), "storm"),
    "no stand-in is left": (_set(ControlConnections, "_leave_surplus", lambda *_: None), "connections, not to the"),
    "a drain that tells no agent": (_set(ControlServer, "drain", _done), "drain"),
    "an agent that does not hear of a drain": (_set(ControlConnections, "relay_sent_goaway", _nothing), "drain"),
    "a fleet that asks no other relay": (_set(NatsFleet, "_ask", _done), "fleet"),
    "a fleet that forgets no agent": (_set(Fleet, "remove", _nothing), "is not connected to it"),
    "a client that tries one relay": (_set(Relays, "order", lambda *_: _ORDER(*_)[:1]), "users"),
}


@pytest.mark.skipif(not long_form(), reason="ARCBRIDGE_LONG=1 runs what takes minutes: broken parts")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_part_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, word = BROKEN[broken]
    breaks(monkeypatch)
    found = simulate(Size(agents=600, users=60), 1, plan=PLAN)["violations"]
    assert any(word in one for one in found), found
