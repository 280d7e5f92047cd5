"""What all tests share: hypothesis profiles, and a loud list of what was left out."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings

from arcbridge.observe import logging as observe_logging
from tests.support.deadline import (
    pytest_configure,  # noqa: F401
    pytest_runtest_makereport,  # noqa: F401
    pytest_timeout_cancel_timer,  # noqa: F401
    pytest_timeout_set_timer,  # noqa: F401
    pytest_unconfigure,  # noqa: F401
)
from tests.support.eventually import settled
from tests.support.processes import require_or_skip
from tests.support.windows import POSIX_TESTS

if sys.platform != "win32":
    import uvloop

TESTS = Path(__file__).parent

collect_ignore = list(POSIX_TESTS) if sys.platform == "win32" else []

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


FEW = os.environ.get("ARCBRIDGE_CASES") == "few"
"""Whether few cases of each test run, and of two event loops the one that comes with Python."""

# Folders of what runs on Linux alone, where uvloop is installed with it.
ON_UVLOOP_ALONE = {
    "agent",
    "audit",
    "bench",
    "demo",
    "differential",
    "e2e",
    "hostile",
    "keycloak",
    "relay",
    "walkthrough",
}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run a test on the loop of production and, if it is about what a client has, on asyncio's own (Windows)."""
    production: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {}
    if sys.platform != "win32":
        production = {"uvloop": uvloop.new_event_loop}
        if item.path.relative_to(TESTS).parts[0] in ON_UVLOOP_ALONE:
            return production
    return {**({} if FEW else production), "asyncio": asyncio.new_event_loop}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases where few are wanted, and mix files that wait with files that compute."""
    if FEW:
        chosen = _few(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    items[:] = _mixed(items)


WAITING = {"demo", "e2e", "keycloak", "release", "walkthrough"}
"""Folders of tests that wait for processes most of the time."""


def _few(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the first and each tenth further case of each test."""
    tests = itertools.groupby(sorted(items, key=_test_of), key=_test_of)
    return {item for _, cases in tests for item in [*cases][::10]}


def _test_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _mixed(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests, file by file, with the files that wait spread over the first nine tenths of the others.

    So no core is idle while all processes of pytest-xdist wait, and many short files fill up the end.
    """
    files = [(path, [*tests]) for path, tests in itertools.groupby(items, key=lambda item: item.path)]
    kinds: dict[bool, list[list[pytest.Item]]] = {True: [], False: []}
    for path, tests in files:
        kinds[path.relative_to(TESTS).parts[0] in WAITING].append(tests)
    placed = [
        (position * (0.9 if waits else 1.0) / len(found), waits, tests)
        for waits, found in kinds.items()
        for position, tests in enumerate(found)
    ]
    placed.sort(key=lambda one: one[0])
    return [item for _, _, tests in placed for item in tests]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests without collecting garbage, of which there is next to none: a third of the CPU time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Exempt pytest's own objects from garbage collection: tests that count what is left collect several times."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    """A role that ran inside a test has set up logging for its process: the next test starts without it."""
    yield
    if structlog.is_configured():
        observe_logging.shutdown()
        structlog.reset_defaults()


@pytest.fixture
async def faults() -> AsyncIterator[list[dict[str, Any]]]:
    """Collect errors that reach the loop, which a test has to take out; nothing is left of what it began."""
    from tests.support.descriptors import AT_ONCE, held, left_open

    loop = asyncio.get_running_loop()
    found: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: found.append(context))
    gc.collect()
    before = held()
    yield found
    await asyncio.sleep(0.01)  # what comes late may still complain
    gc.collect()
    await settled(lambda: asyncio.all_tasks() == {asyncio.current_task()} and left_open(before) <= AT_ONCE)
    assert found == []
    assert left_open(before) <= AT_ONCE
    assert asyncio.all_tasks() == {asyncio.current_task()}
    if isinstance(loop, asyncio.SelectorEventLoop):  # uvloop shows neither
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []
        assert list(loop._selector.get_map()) == [loop._ssock.fileno()]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwrite the receive buffer after each callback: a view of it that is used too late holds wrong bytes."""
    from arcbridge.mux import buffer, connection, splice

    def poison(owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def poisoning(*arguments: object) -> None:
            plain(*arguments)
            buffer.VIEW[:] = b"\xdb" * buffer.SIZE

        monkeypatch.setattr(owner, name, poisoning)

    poison(connection.MuxConnection, "buffer_updated")
    poison(splice.TransportSplice, "buffer_updated")
    poison(splice.SocketSplice, "_read")


# Signals that were ignored when this run began: nohup(1) ignores SIGHUP, and a shell without job control SIGINT of what
# it runs in the background. Programs under test would inherit that, and an interrupt in a test would do nothing.
IGNORED = [
    number
    for name in ("SIGHUP", "SIGINT")
    if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) is signal.SIG_IGN
]


@pytest.fixture(autouse=True)
def _signals_have_their_meaning() -> None:
    """Catch what was ignored: SIGINT as Python does, SIGHUP in silence, because the run outlives its terminal. A child
    begins with the default."""
    for number in IGNORED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else lambda *_: None)


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """pip and a package index that answers; after this, whatever fails is a fault of ours."""
    probe = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--dest"]
    done = subprocess.run(
        [*probe, str(tmp_path_factory.mktemp("probe")), "pluggy==1.6.0"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        require_or_skip("index", "no package index can be reached, from which a release takes its tools")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what this run left out, and why, at the end of its output."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        terminalreporter.section("nothing was left out")
        return
    reasons: dict[str, int] = {}
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    terminalreporter.section("LEFT OUT", red=True, bold=True)
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:4} test(s): {reason}")
