"""Look-ups for all callers together: one for each key, remembered, bounded in number, size and time."""

from __future__ import annotations

import asyncio
import gc
import weakref
from functools import partial

import pytest

from arcbridge.identity import lookups
from arcbridge.identity.lookups import AT_ONCE, ENTRIES, KEEP_FAILURE, WAITING, Lookups
from arcbridge.identity.refusal import GroupsUnavailable, TokenRefused
from tests.support.clock import Clock


class Place:
    """The other server: answers when it is let, and counts."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.error: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.asked = 0
        self.at_once = 0
        self.most_at_once = 0

    async def __call__(self) -> tuple[str, ...]:
        self.asked += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.open.wait()
        finally:
            self.at_once -= 1
        if self.error is not None:
            raise self.error
        return self.names


async def test_names_are_remembered_for_a_while() -> None:
    clock, place = Clock(), Place("a", "b")
    subject = Lookups(clock, 300.0)
    for _ in range(3):
        assert await subject.get("anna", place, "there") == ("a", "b")
    assert place.asked == 1
    clock.now += 300
    place.names = ("a",)
    assert await subject.get("anna", place, "there") == ("a",)
    assert place.asked == 2


async def test_one_key_never_has_what_another_one_has() -> None:
    subject = Lookups(Clock(), 300.0)
    assert await subject.get(("users", "1"), Place("a"), "there") == ("a",)
    assert await subject.get(("servicePrincipals", "1"), Place("b"), "there") == ("b",)
    assert await subject.get(("users", "1"), Place("c"), "there") == ("a",)


async def test_callers_of_one_key_share_one_look_up_and_one_may_leave() -> None:
    place = Place("a")
    place.open.clear()
    subject = Lookups(Clock(), 300.0)
    callers = [asyncio.create_task(subject.get("anna", place, "there")) for _ in range(20)]
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.sleep(0)
    place.open.set()
    found = await asyncio.gather(*callers, return_exceptions=True)
    assert found[1:] == [("a",)] * 19
    assert place.asked == 1


async def test_look_ups_at_once_and_those_that_wait_are_bounded() -> None:
    place = Place("a")
    place.open.clear()
    subject = Lookups(Clock(), 300.0)
    callers = [asyncio.create_task(subject.get(n, place, "there")) for n in range(AT_ONCE + WAITING)]
    while place.at_once < AT_ONCE:
        await asyncio.sleep(0)
    with pytest.raises(GroupsUnavailable, match="too many look-ups at there"):
        await subject.get("one more", place, "there")
    place.open.set()
    assert await asyncio.gather(*callers) == [("a",)] * (AT_ONCE + WAITING)
    assert place.most_at_once == AT_ONCE
    assert await subject.get("one more", place, "there") == ("a",)


async def test_a_failure_is_remembered_for_seconds() -> None:
    clock, place = Clock(), Place("a")
    subject = Lookups(clock, 300.0)
    place.error = GroupsUnavailable("there is down")
    for _ in range(3):
        with pytest.raises(GroupsUnavailable) as caught:
            await subject.get("anna", place, "there")
    assert "there is down; try again shortly" in caught.value.message
    assert (place.asked, subject.asked, subject.failed) == (1, 1, 1)
    clock.now += KEEP_FAILURE
    place.error = None
    assert await subject.get("anna", place, "there") == ("a",)


async def test_a_failure_that_cost_the_other_server_nothing_ends_with_its_cause() -> None:
    place = Place("a")
    subject = Lookups(Clock(), 300.0)
    place.error = GroupsUnavailable("there is no token for it", asked=False)
    for _ in range(2):
        with pytest.raises(GroupsUnavailable, match="no token for it"):
            await subject.get("anna", place, "there")
    assert subject.failed == 2
    place.error = None
    assert await subject.get("anna", place, "there") == ("a",)


async def test_a_refusal_stays_one() -> None:
    place = Place()
    place.error = TokenRefused("claims.groups.unknown", "not known")
    subject = Lookups(Clock(), 300.0)
    for _ in range(2):
        with pytest.raises(TokenRefused) as caught:
            await subject.get("anna", place, "there")
        assert (caught.value.rule, caught.value.message) == ("claims.groups.unknown", "not known")
    assert place.asked == 1


@pytest.mark.parametrize(
    "error",
    [
        GroupsUnavailable("there is down", detail="why"),
        TokenRefused("claims.groups", "they are no list", wanted="groups", detail="inner"),
    ],
)
async def test_t53_a_failure_that_is_remembered_holds_nothing_of_its_callers(error: Exception) -> None:
    """An error that was raised holds each frame that it passed, and with it tokens of 64 KiB."""
    subject = Lookups(Clock(), 300.0)

    class Token(str):
        pass

    async def look(token: str) -> tuple[str, ...]:
        try:
            raise ValueError(token)
        except ValueError as cause:
            raise error.with_traceback(None) from cause

    async def call() -> tuple[object, BaseException]:
        token = Token("secret")
        with pytest.raises(type(error)) as caught:
            await subject.get("anna", partial(look, token), "there")
        return weakref.ref(token), caught.value.with_traceback(None)

    (first, one), (second, two) = await call(), await call()
    assert subject.asked == 1
    assert (str(one), str(two)) == (str(error), str(error))
    assert len({id(error), id(one), id(two)}) == 3
    assert (one.__cause__, one.__context__) == (None, None)
    error.__cause__ = error.__context__ = error.__traceback__ = None
    gc.collect()
    assert (first(), second()) == (None, None)


async def test_who_does_not_answer_is_not_waited_for() -> None:
    place = Place("a")
    place.open.clear()
    subject = Lookups(Clock(), 300.0, deadline=0.01)
    with pytest.raises(GroupsUnavailable, match="there did not answer within"):
        await subject.get("anna", place, "there")
    assert place.at_once == 0


async def test_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "MEMORY", 850)  # ten names
    subject, place = Lookups(Clock(), 300.0), Place("a", "b", "c", "d")
    for key in ("anna", "bert", "anna", "carl"):
        await subject.get(key, place, "there")
    assert place.asked == 3
    await subject.get("anna", place, "there")
    assert place.asked == 3, "used last"
    await subject.get("bert", place, "there")
    assert place.asked == 4, "made room"
    place.names = ()
    for n in range(ENTRIES + 10):
        await subject.get(n, place, "there")
    assert len(subject._entries) == ENTRIES


async def test_long_names_make_room_as_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "MEMORY", 10_000)
    subject, place = Lookups(Clock(), 300.0), Place("x" * 4000)
    for key in ("anna", "bert", "carl"):
        await subject.get(key, place, "there")
    await subject.get("anna", place, "there")
    assert place.asked == 4, "two names of 4 KB take the room of a hundred short ones"
    place.names = ("é" * 4000,)
    await subject.get("dora", place, "there")
    await subject.get("dora", place, "there")
    assert place.asked == 6, "what takes more than all the room is not remembered"


async def test_an_end_leaves_nothing_running() -> None:
    place = Place()
    place.open.clear()
    subject = Lookups(Clock(), 300.0)
    caller = asyncio.create_task(subject.get("anna", place, "there"))
    await asyncio.sleep(0)
    await subject.close()
    assert place.at_once == 0
    with pytest.raises(asyncio.CancelledError):
        await caller
