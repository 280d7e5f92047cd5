"""Ends a test that pytest-timeout's signal does not end, and a run whose threads do not end.

pytest-timeout raises in the main thread, so that one test fails and the run goes on. Neither a waiting loop of uvloop
nor a call that holds the interpreter is ended by that. Half a deadline later a thread of `faulthandler`, which needs no
interpreter, writes the stacks of all threads and ends the process; pytest-xdist names the test and starts another one.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import Any

import pytest

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


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give threads that no test ended their time, and end the process then; pytest-xdist ends its workers itself."""
    if not hasattr(config, "workerinput"):
        faulthandler.dump_traceback_later(LEAVING, exit=True, file=_stderr)
