"""Ends a test that pytest-timeout's signal does not end, and a run whose threads do not end.

pytest-timeout raises in the main thread, so that one test fails and the run goes on. Neither a waiting loop of uvloop
nor a call that holds the interpreter is ended by that. Half a deadline later a thread of `faulthandler`, which needs no
interpreter, writes the stacks of all threads and ends the process; pytest-xdist names the test and starts another one.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Generator
from typing import Any

import pytest

from tests.support.tracebacks import numbered

# Seconds in which the threads that the tests left end after the last one.
LEAVING = 60.0

# The standard error of the run, before pytest captures that of a test.
_stderr = os.dup(sys.__stderr__.fileno()) if sys.__stderr__ is not None else 2


def pytest_configure() -> None:
    """Keep the standard error of the run: pytest captures none while it is configured."""
    os.dup2(2, _stderr)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """Begin the second deadline; None lets pytest-timeout begin its own."""
    faulthandler.dump_traceback_later(1.5 * settings.timeout, exit=True, file=_stderr)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    """End the second deadline with the first."""
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put off a deadline that comes while a report is made, and give each frame of a failure a line number.

    What is raised between two steps of a test is an internal error, which ends the whole run; so it is raised in the
    next step, if there is one. The signal can also be handled at an instruction that has no line, such as the end of
    the loop in `selectors`, and pytest computes with the number.
    """
    if call.excinfo is not None:
        error = call.excinfo.value
        call.excinfo = pytest.ExceptionInfo.from_exception(error.with_traceback(numbered(error.__traceback__)))
    if sys.platform == "win32":
        return (yield)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        return (yield)
    finally:
        if signal.SIGALRM in signal.sigpending():
            signal.sigwait({signal.SIGALRM})
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give threads that no test ended their time, and end the process then; pytest-xdist ends its workers itself."""
    if not hasattr(config, "workerinput"):
        faulthandler.dump_traceback_later(LEAVING, exit=True, file=_stderr)
