"""A task that was cancelled runs no more, however it ends."""

from __future__ import annotations

import asyncio

import pytest

from arcbridge.tasks import TaskSet, cancel_and_wait, completed, first_error, report_failure


async def test_they_have_ended_also_where_they_take_their_time() -> None:
    done: list[str] = []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            done.append(name)

    tasks = [asyncio.create_task(work(name)) for name in "ab"]
    await asyncio.sleep(0)
    await cancel_and_wait(*tasks)
    assert sorted(done) == ["a", "b"]
    assert all(task.cancelled() for task in tasks)
    await cancel_and_wait(*tasks)


async def test_one_that_fails_and_none_at_all() -> None:
    async def fail() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("while it ends")

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await cancel_and_wait(task)
    assert isinstance(task.exception(), ValueError)
    await cancel_and_wait()


async def test_one_that_is_held_and_fails_is_reported() -> None:
    seen: list[tuple[str, type[BaseException]]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: seen.append((context["message"], type(context["exception"]))))

    async def fail() -> None:
        raise ValueError("what it keeps is kept no more")

    failing, waiting = loop.create_task(fail(), name="elevation"), loop.create_task(asyncio.sleep(3600))
    for task in (failing, waiting):
        task.add_done_callback(report_failure)
    await asyncio.wait([failing])
    await cancel_and_wait(waiting, failing)
    await asyncio.sleep(0)
    assert seen == [("the task elevation has failed", ValueError)]


def test_the_first_error_of_a_group_is_found_at_any_depth() -> None:
    error = ValueError("the one")
    assert first_error(ExceptionGroup("", [ExceptionGroup("", [error]), TypeError()])) is error


async def test_a_set_has_the_tasks_that_run() -> None:
    tasks, may_end = TaskSet(), asyncio.Event()
    task = tasks.start(may_end.wait(), "waits")
    await asyncio.sleep(0)
    assert tasks == {task}
    assert task.get_name() == "waits"
    may_end.set()
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    assert tasks == set()


async def test_what_is_to_be_completed_ends_before_its_caller() -> None:
    begun, going, done = asyncio.Event(), asyncio.Event(), []

    async def work() -> str:
        begun.set()
        await going.wait()
        done.append("whole")
        return "result"

    caller = asyncio.create_task(completed(work(), 10.0))
    await begun.wait()
    caller.cancel()
    asyncio.get_running_loop().call_soon(going.set)
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done == ["whole"]
    assert await completed(work(), 0.0) == "result"


async def test_it_has_no_longer_than_its_grace_and_raises_what_it_raises() -> None:
    begun, ended = asyncio.Event(), []

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    caller = asyncio.create_task(completed(work(), 0.01))
    await begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended == ["cancelled"]

    async def fail() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await completed(fail(), 10.0)
