"""Holds the asyncio tasks of parts, ends them, bounds what is waited for, and unpacks the errors of task groups.

Invariants: what was cancelled here runs no more when the caller goes on, and a task of a `TaskSet` is held until it
ends, because the event loop does not hold it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class TaskSet(set[asyncio.Task[Any]]):
    """Tasks that run beside the part that started them, and have not ended."""

    def start(self, work: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
        """Run `work` in a task of its own."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.add(task)
        task.add_done_callback(self.discard)
        return task


def report_failure(task: asyncio.Task[Any]) -> None:
    """Report that a task has failed which is to run until it is cancelled (a done callback): its owner waits for no
    result, and asyncio says nothing of a task that is held."""
    if not task.cancelled() and (error := task.exception()) is not None:
        context = {"message": f"the task {task.get_name()} has failed", "exception": error, "task": task}
        task.get_loop().call_exception_handler(context)


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and return when all have ended, however each did."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def completed(work: Coroutine[Any, Any, T], grace: float) -> T:
    """Return what `work` returns; where the caller is cancelled, give the work `grace` seconds to end before."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,), timeout=grace)
        raise
    finally:
        await cancel_and_wait(task)


async def in_time(awaited: Awaitable[object], seconds: float | None) -> bool:
    """Wait for something, at most `seconds` (None: without an end); return whether it came."""
    try:
        async with asyncio.timeout(seconds):
            await awaited
    except TimeoutError:
        return False
    return True


@asynccontextmanager
async def within(seconds: float | None, late: Exception) -> AsyncIterator[None]:
    """Give a block so many seconds; raises `late` where it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise late from error


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error inside a task group's, because users are shown one sentence."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
