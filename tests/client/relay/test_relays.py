"""The order in which relays are tried, when the next one is tried, and that nothing is left of those not needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from arcbridge.client.relay import relays as relays_module
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import FAILED_LATELY, Relays, RelaysFailed
from arcbridge.errors import PermissionRefused, Unauthenticated, Unreachable
from arcbridge.settings.config import ClientConfig
from tests.support.clock import Clock
from tests.support.eventually import until

A, B, C = (RelayAccess(f"https://{name}:443") for name in "abc")


def make(*access: RelayAccess, clock: Clock | None = None, backwards: bool = False) -> Relays:
    """Return relays in the order given, or reversed, but not shuffled."""
    return Relays(
        access or (A, B, C), draw=lambda: 0.999 if backwards else 0.0,
        clock=clock or Clock(),
    )  # fmt: skip


Attempt = Callable[[RelayAccess], Coroutine[Any, Any, str]]


def answering(**answers: object) -> tuple[Attempt, list[str]]:
    """An attempt that answers for each host: a text, an error, an event to wait for, or never (None)."""
    tried: list[str] = []

    async def attempt(relay: RelayAccess) -> str:
        host = relay.address.host
        tried.append(host)
        answer = answers[host]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, asyncio.Event):
            await answer.wait()
        if isinstance(answer, Exception):
            raise answer
        return f"through {host}"

    return attempt, tried


class TestOrder:
    def test_a_random_one_first(self) -> None:
        assert make().order() == [A, B, C]
        assert make(backwards=True).order() == [C, B, A]

    def test_what_worked_stays_first(self) -> None:
        relays = make()
        relays.works(B)
        assert relays.order() == [B, A, C]
        assert relays.in_use is B

    def test_what_failed_lately_is_last_and_not_for_ever(self) -> None:
        clock = Clock()
        relays = make(clock=clock)
        relays.works(A)
        relays.failed(A)
        assert relays.in_use is None
        clock.now += 1
        relays.failed(B)
        assert relays.order() == [C, A, B]
        clock.now += FAILED_LATELY - 0.5
        assert relays.order() == [A, C, B]
        relays.works(B)
        assert relays.order() == [B, A, C]

    def test_the_one_to_leave_is_the_very_last(self) -> None:
        relays = make()
        relays.works(A)
        relays.failed(B)
        assert relays.order(leaving=A) == [C, B, A]

    def test_a_memory_of_its_own(self) -> None:
        relays = make()
        relays.failed(A)
        assert relays.with_own_record("prod").order() == [A, B, C]


class TestSettings:
    def test_a_list(self) -> None:
        relays = Relays.of(ClientConfig(relays=("https://a", "b:444", "a:443")))
        assert relays.names == ("a:443", "b:444")
        assert len(relays) == 2

    def test_one(self) -> None:
        assert Relays.of(ClientConfig(relay="https://a")).names == ("a:443",)

    def test_none(self) -> None:
        with pytest.raises(Unauthenticated, match="logged in at no relay"):
            Relays.of(ClientConfig())


class TestFirstOf:
    async def test_the_first_that_works(self) -> None:
        attempt, tried = answering(a="ok", b="ok", c="ok")
        relays = make()
        assert await relays.first_of(attempt) == (A, "through a")
        assert tried == ["a"]
        assert relays.in_use is A

    async def test_a_failure_goes_on_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(relays_module, "HEAD_START", 3600.0)
        attempt, tried = answering(a=Unreachable("refused"), b=Unreachable("draining"), c="ok")
        relays = make()
        assert await relays.first_of(attempt) == (C, "through c")
        assert tried == ["a", "b", "c"]
        attempt, tried = answering(a="ok", b="ok", c="ok")
        await relays.first_of(attempt)
        assert tried == ["c"]

    async def test_a_silent_one_costs_its_head_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(relays_module, "HEAD_START", 0.01)
        attempt, _ = answering(a=None, b=None, c="ok")
        relays = make()
        before = asyncio.all_tasks()
        assert await relays.first_of(attempt) == (C, "through c")
        await settled()
        assert asyncio.all_tasks() == before
        attempt, tried = answering(a="ok", b="ok", c="ok")
        relays.failed(C)  # the others failed before it did
        await relays.first_of(attempt)
        assert tried == ["a"]

    async def test_a_slow_one_may_still_win(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(relays_module, "HEAD_START", 0.01)
        gate = asyncio.Event()
        attempt, tried = answering(a=gate, b=None)
        relays = make(A, B)
        work = asyncio.ensure_future(relays.first_of(attempt))
        await until(lambda: tried == ["a", "b"])
        gate.set()
        assert await work == (A, "through a")

    async def test_what_comes_too_late_is_disposed_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(relays_module, "HEAD_START", 0.01)
        gate = asyncio.Event()
        attempt, tried = answering(a=gate, b=gate)
        disposed: list[str] = []
        work = asyncio.ensure_future(make(A, B).first_of(attempt, disposed.append))
        await until(lambda: tried == ["a", "b"])
        gate.set()
        _, won = await work
        await settled()
        assert {won, *disposed} == {"through a", "through b"}

    @pytest.mark.parametrize("ends", [False, True])
    async def test_cancelled(self, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cancelling gives back what the attempts hold, also when one succeeds in the same turn."""
        monkeypatch.setattr(relays_module, "HEAD_START", 0.01)
        gate = asyncio.Event()
        attempt, tried = answering(a=gate, b=None)
        disposed: list[str] = []
        before = asyncio.all_tasks()
        work = asyncio.ensure_future(make(A, B).first_of(attempt, disposed.append))
        await until(lambda: tried == ["a", "b"])
        if ends:
            gate.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await settled()
        assert asyncio.all_tasks() == before
        assert disposed == (["through a"] if ends else [])

    async def test_what_all_would_say_ends_it_at_once(self) -> None:
        attempt, tried = answering(a=Unauthenticated("no"), b="ok", c="ok")
        relays = make()
        with pytest.raises(Unauthenticated):
            await relays.first_of(attempt)
        assert tried == ["a"]
        assert relays.order() == [A, B, C]

    async def test_a_bug_is_no_failure_of_a_relay(self) -> None:
        attempt, tried = answering(a=ZeroDivisionError(), b="ok")
        with pytest.raises(ZeroDivisionError):
            await make(A, B).first_of(attempt)
        assert tried == ["a"]


class TestSummedUp:
    async def failing(self, **errors: Exception) -> RelaysFailed:
        attempt, _ = answering(**errors)
        access = [one for one in (A, B, C) if one.address.host in errors]
        with pytest.raises(RelaysFailed) as caught:
            await make(*access).first_of(attempt)
        return caught.value

    async def test_one_relay_speaks_for_itself(self) -> None:
        error = Unreachable("no answer", retry_after=3)
        assert (await self.failing(a=error)).summed_up(lambda _: 0) is error

    async def test_the_most_useful_and_how_many(self) -> None:
        failed = await self.failing(a=Unreachable("refused"), b=PermissionRefused("may not"), c=Unreachable("x"))
        error = failed.summed_up(lambda error: int(isinstance(error, PermissionRefused)))
        assert isinstance(error, PermissionRefused)
        assert error.message == str(error) == "may not (3 relays were tried)"

    async def test_the_first_of_equal_ones(self) -> None:
        failed = await self.failing(a=Unreachable("first"), b=Unreachable("second"))
        assert failed.summed_up(lambda _: 0).message.startswith("first")

    async def test_a_hint_counts_when_all_gave_one(self) -> None:
        failed = await self.failing(a=Unreachable("x", retry_after=9), b=Unreachable("y", retry_after=4))
        assert failed.summed_up(lambda _: 0).retry_after == 4
        failed = await self.failing(a=Unreachable("x", retry_after=9), b=Unreachable("y"))
        assert failed.summed_up(lambda _: 0).retry_after is None


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
