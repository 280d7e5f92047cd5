"""Signals end a run in order; systemd is told."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.cli.loop import Interrupted, loop_factory, notify, run_until_drained, run_until_signal
from arcbridge.errors import ConfigError, ExitCode


def test_a_result_and_an_error() -> None:
    async def good() -> int:
        return 3

    async def bad() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(worse())

    async def worse() -> None:
        raise ConfigError("x")

    assert run_until_signal(good()) == 3
    with pytest.raises(ConfigError):
        run_until_signal(bad())


def test_a_role_runs_with_the_collector_that_imports_went_without() -> None:
    async def collecting() -> bool:
        return gc.isenabled()

    gc.disable()
    try:
        assert run_until_signal(collecting())
    finally:
        gc.enable()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(number: signal.Signals) -> None:
    steps = []

    async def work() -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("closed")

    with pytest.raises(Interrupted) as caught:
        run_until_signal(work())
    assert (caught.value.signal, steps) == (number, ["closed"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_drains_is_asked_and_then_hurried(number: signal.Signals) -> None:
    steps = []

    async def work(stopping: asyncio.Event, hurry: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(os.kill, os.getpid(), number)
        await stopping.wait()
        steps.append(f"stopping, hurry={hurry.is_set()}")
        loop.call_soon(os.kill, os.getpid(), signal.SIGTERM)
        await hurry.wait()
        steps.append("hurry")

    code = ExitCode.DONE if number == signal.SIGTERM else ExitCode.INTERRUPTED
    assert (run_until_drained(work), steps) == (code, ["stopping, hurry=False", "hurry"])


def test_one_that_drains_may_fail() -> None:
    async def work(stopping: asyncio.Event, hurry: asyncio.Event) -> None:
        raise ConfigError("x")

    with pytest.raises(ConfigError):
        run_until_drained(work)


def python(program: str, *before: str) -> tuple[int, str]:
    """Run a program, after the imports that all of these need; return its exit code and what it wrote."""
    imports = "import asyncio, os, signal\nfrom arcbridge.cli.loop import *\n"
    command = [*before, sys.executable, "-c", imports + program]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=30)
    return done.returncode, done.stdout


def test_the_second_one_does_not_wait() -> None:
    program = """
async def work():
    try:
        os.kill(os.getpid(), signal.SIGINT); await asyncio.Event().wait()
    finally:
        os.kill(os.getpid(), signal.SIGINT); await asyncio.Event().wait()
run_until_signal(work())
"""
    assert python(program) == (130, "")


def test_the_end_of_a_terminal_may_be_told_twice() -> None:
    program = """
async def work():
    try:
        os.kill(os.getpid(), signal.SIGHUP); await asyncio.Event().wait()
    finally:
        os.kill(os.getpid(), signal.SIGHUP); await asyncio.sleep(0.01); print('in order')
try:
    run_until_signal(work())
except Interrupted as ended:
    print(ended.signal == signal.SIGHUP)
"""
    assert python(program) == (0, "in order\nTrue\n")


@pytest.mark.parametrize(
    ("before", "terminal"), [((), "terminal=False"), (("nohup",), "")], ids=["background", "nohup"]
)
def test_where_the_end_of_a_terminal_does_nothing(before: tuple[str, ...], terminal: str) -> None:
    program = f"""
async def work():
    os.kill(os.getpid(), signal.SIGHUP); await asyncio.sleep(0.01); print('goes on')
run_until_signal(work(), {terminal})
"""
    code, said = python(program, *before)
    assert (code, said.splitlines()[-1]) == (0, "goes on")


def test_which_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    uvloop = pytest.importorskip("uvloop")
    assert loop_factory() is uvloop.new_event_loop
    monkeypatch.setenv("ARCBRIDGE_LOOP", "asyncio")
    assert loop_factory() is None


def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    notify("READY=1")
    if sys.platform == "linux":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            name = f"arcbridge-test-{os.getpid()}"
            manager.bind("\0" + name)
            monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
            notify("STOPPING=1")
            assert manager.recv(100) == b"STOPPING=1"


def test_a_role_runs_with_an_allocator_that_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("arcbridge.cli.loop.tune_allocator", lambda: told.append("tuned"))

    async def work() -> None:
        told.append("running")

    async def drains(stopping: asyncio.Event, hurry: asyncio.Event) -> None:
        told.append("running")

    run_until_signal(work())
    run_until_drained(drains)
    assert told == ["tuned", "running"] * 2


def test_a_role_may_open_as_many_descriptors_as_the_hard_limit_says() -> None:
    """A child with a lower limit than ours runs a role in both ways."""
    pytest.importorskip("resource")
    program = """
import resource
async def look(*events):
    print(*resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)
for run in (lambda: run_until_signal(look()), lambda: run_until_drained(look)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
    run()
"""
    _, said = python(program)
    assert [line for line in said.splitlines() if line[:1].isdigit() and len(line) < 10] == ["300 300", "300 300"]
    assert said.count("may open more file descriptors") == 2
