"""Reloads: asked for by SIGHUP, counted, told; one at a time."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from arcbridge.errors import ConfigError
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.reloads import Outcome, Reloads, changed, split
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig, RelayTlsConfig


def test_what_has_changed() -> None:
    old = RelayConfig()
    new = replace(old, listen="x", limits=replace(old.limits, sessions=7, agents=8), tls=RelayTlsConfig())
    assert changed(old, new) == ["listen", "limits.sessions", "limits.agents"]
    assert changed(old, RelayConfig(limits=RelayLimitsConfig())) == []


def test_what_needs_a_restart() -> None:
    outcome = split(["listen", "limits.sessions", "observe.log_level", "observe.listen"],
                    frozenset({"limits", "observe.log_level"}))  # fmt: skip
    assert outcome == Outcome(("limits.sessions", "observe.log_level"), ("listen", "observe.listen"))


async def test_a_signal_reloads_and_what_fails_is_counted() -> None:
    reloaded = asyncio.Event()
    wrong = False

    async def reload() -> Outcome:
        reloaded.set()
        if wrong:
            raise ConfigError("no")
        return Outcome(("policy",))

    reloads, metrics = Reloads("relay", reload), Metrics("relay")
    reloads.register(metrics)
    reloads.start()
    try:
        for expected in ({"ok": 1, "failed": 0}, {"ok": 1, "failed": 1}):
            reloaded.clear()
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(10):
                await reloaded.wait()
                while reloads.counts != expected:
                    await asyncio.sleep(0)
            wrong = True
    finally:
        await reloads.stop()
    os.kill(os.getpid(), signal.SIGHUP)  # while the process ends: it is no reason to die
    await asyncio.sleep(0)
    asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
    assert reloads.counts == {"ok": 1, "failed": 1}


async def test_reloads_do_not_overlap_and_the_last_one_counts() -> None:
    running, most, runs = 0, 0, 0
    going = asyncio.Event()

    async def reload() -> Outcome:
        nonlocal running, most, runs
        running, runs = running + 1, runs + 1
        most = max(most, running)
        await going.wait()
        running -= 1
        return Outcome()

    reloads = Reloads("relay", reload)
    for _ in range(5):
        reloads.request()
        await asyncio.sleep(0)
    going.set()
    async with asyncio.timeout(10):
        while reloads.counts["ok"] < 2:
            await asyncio.sleep(0)
    await reloads.stop()
    assert (most, runs) == (1, 2)


@pytest.mark.parametrize("level", ["info", "debug"])
def test_a_level_that_was_switched_on_by_hand_stays(level: str) -> None:
    from arcbridge.observe import logging as logs

    before = logs.level()
    try:
        logs.configure("relay", "info")
        if level == "debug":
            logs.toggle_debug()
        logs.reconfigure_level("error")
        assert logs.level() == ("debug" if level == "debug" else "error")
        if level == "debug":
            assert logs.toggle_debug() == "error"
    finally:
        logs.shutdown()
        logs.set_level(before)
