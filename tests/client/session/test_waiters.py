"""Callers share the session or the error of an attempt, and none of them disturbs another one."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from arcbridge.client.session.waiters import FAILURE_HOLD, Waiters
from arcbridge.errors import Unreachable

SESSION = cast(Any, object())


async def waiting(waiters: Waiters, count: int, *, before_auth: bool = False) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.ensure_future(waiters.wait(before_auth=before_auth)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_all_get_the_session_and_one_that_was_cancelled_disturbs_no_other() -> None:
    waiters = Waiters()
    assert not waiters
    first, second, third = await waiting(waiters, 3)
    first.cancel()
    waiters.complete(SESSION)
    waiters.complete(cast(Any, "another one"))
    assert await asyncio.gather(second, third) == [SESSION, SESSION]
    assert first.cancelled()
    assert not waiters


async def test_only_those_who_ask_for_it_get_a_session_before_its_token_is_accepted() -> None:
    waiters = Waiters()
    (early,), (late,) = await waiting(waiters, 1, before_auth=True), await waiting(waiters, 1)
    waiters.begin_auth(SESSION)
    assert await early is SESSION
    assert not late.done()
    waiters.complete(SESSION)
    assert await late is SESSION


async def test_a_failure_is_given_to_all_and_for_a_while_to_those_that_come_later() -> None:
    waiters, error = Waiters(), Unreachable("no")
    tasks = await waiting(waiters, 2)
    waiters.fail(error, 100.0)
    for task in tasks:
        with pytest.raises(Unreachable):
            await task
    assert waiters.recent_failure(100.0 + FAILURE_HOLD / 2) is error
    assert waiters.recent_failure(100.0 + FAILURE_HOLD) is None
    assert waiters.failure is error
    waiters.complete(SESSION)
    assert waiters.failure is None
