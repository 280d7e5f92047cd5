"""Checks that fail, hang, raise and recover: what is logged once, what the metric says, what makes a role unready."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import structlog
from structlog.testing import capture_logs

from arcbridge.checks import self_checks as module
from arcbridge.checks.diagnosis import Finding, FindingState, failed, ok, skipped, warning
from arcbridge.checks.self_checks import SelfCheck, SelfChecks
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics

LOG = structlog.get_logger("test")
DOWN = failed("thing", "it is down", "start it", "down")


class Thing:
    """What a check looks at."""

    def __init__(self, *found: Finding) -> None:
        self.found: Sequence[Finding] = found
        self.looks = 0
        self.looked = asyncio.Condition()

    async def look(self) -> Sequence[Finding]:
        async with self.looked:
            self.looks += 1
            self.looked.notify_all()
        return self.found

    async def wait(self, looks: int) -> None:
        async with asyncio.timeout(10), self.looked:
            await self.looked.wait_for(lambda: self.looks >= looks)


async def test_what_changes_is_logged_once() -> None:
    thing = Thing(DOWN)
    checks = SelfChecks([SelfCheck("thing", thing.look)], LOG)

    def note() -> None:
        checks._note("thing", tuple(thing.found))

    with capture_logs() as lines:
        note()
        note()
        thing.found = [warning("thing", "it is slow", "wait", "slow")]
        note()
        thing.found = [ok("thing", "up")]
        note()
        note()
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("check failed", "error"),
        ("check warns", "warning"),
        ("check passed", "info"),
    ]
    assert lines[0] | {"check": "thing", "code": "down", "reason": "it is down", "remedy": "start it"} == lines[0]


async def test_metric_and_readiness() -> None:
    gated, free, late = Thing(DOWN), Thing(DOWN), Thing(ok("late", "up"))
    holds = True
    checks = SelfChecks(
        [
            SelfCheck("gated", gated.look, gates=lambda: holds),
            SelfCheck("free", free.look),
            SelfCheck("late", late.look, gates=True),
        ],
        LOG,
    )
    metrics, ready = Metrics("agent"), Checks()
    checks.register(metrics, ready)
    assert ready.failures() == {"gated": "not looked at yet", "late": "not looked at yet"}
    assert [one.hop for one in await checks.look()] == ["thing", "thing", "late"]
    assert ready.failures() == {"gated": "it is down (down)"}
    text = metrics.render("")[0].decode()
    assert 'arcbridge_agent_check_ok{check="gated"} 0.0' in text
    assert 'arcbridge_agent_check_ok{check="free"} 0.0' in text
    assert 'arcbridge_agent_check_ok{check="late"} 1.0' in text
    holds = False
    assert ready.failures() == {}


async def test_a_check_that_hangs_or_raises_has_failed_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE", 0.01)

    async def hangs() -> Sequence[Finding]:
        await asyncio.Event().wait()
        return ()

    async def raises() -> Sequence[Finding]:
        raise ValueError("anything")

    other = Thing(ok("other", "up"))
    checks = SelfChecks([SelfCheck("a", hangs), SelfCheck("b", raises), SelfCheck("c", other.look)], LOG)
    found = await checks.look()
    assert [one.state for one in found] == [FindingState.FAILED, FindingState.FAILED, FindingState.OK]
    assert "anything" not in str(found)


async def test_a_request_that_failed_has_it_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOONEST", 0.0)
    thing, other = Thing(ok("thing", "up")), Thing(ok("other", "up"))
    checks = SelfChecks([SelfCheck("thing", thing.look), SelfCheck("other", other.look)], LOG, every=3600.0)
    running = asyncio.ensure_future(checks.run())
    await thing.wait(1)
    await other.wait(1)
    checks.look_soon("thing")
    await thing.wait(2)
    assert other.looks == 1
    checks.look_soon()
    await other.wait(2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("first", [DOWN, skipped("thing", "later")], ids=["failed", "skipped"])
async def test_a_failure_is_looked_at_again_soon(monkeypatch: pytest.MonkeyPatch, first: Finding) -> None:
    monkeypatch.setattr(module, "SOONEST", 0.0)
    monkeypatch.setattr(module, "AGAIN", 0.001)
    thing = Thing(first)
    checks = SelfChecks([SelfCheck("thing", thing.look)], LOG, every=3600.0)
    running = asyncio.ensure_future(checks.run())
    await thing.wait(3)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
