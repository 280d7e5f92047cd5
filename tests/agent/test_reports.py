"""What the agent reports of itself, and when."""

from __future__ import annotations

import asyncio

from arcbridge.agent import reports
from arcbridge.agent.reports import AgentReports
from arcbridge.checks.diagnosis import Finding, failed, ok
from arcbridge.checks.self_checks import SelfCheck, SelfChecks
from arcbridge.observe.health import Checks


class Log:
    def error(self, *args: object, **fields: object) -> None: ...

    info = warning = error


def made(found: dict[str, Finding]) -> tuple[AgentReports, SelfChecks]:
    """The reports of an agent with these self-checks, of which `api_server` gates readiness."""

    def check(name: str) -> SelfCheck:
        async def look() -> list[Finding]:
            return [found[name]]

        return SelfCheck(name, look, gates=name == "api_server")

    self_checks, checks = SelfChecks([check(name) for name in found], Log()), Checks()
    checks.add("api_server", lambda: self_checks.unready("api_server"))
    return AgentReports("i1", self_checks, checks, lambda: 7, lambda: ("r2", "r1", "c2")), self_checks


async def test_a_report_has_codes_and_numbers_and_no_detail_of_a_check_that_gates_nothing() -> None:
    secret = "secret.internal.example"
    agent, self_checks = made(
        {"api_server": ok("API server", "is there"), "audit": failed("audit", f"disk of {secret}", "", "audit_disk")}
    )
    await self_checks.look()
    status = agent.status(0.0123)
    assert (status.ready, status.checks, status.sessions) == (True, "api_server audit:audit_disk", 7)
    assert (status.round_trip, status.instance, status.unready) == (12300, "i1", "")
    assert (status.relay_ca, status.certificate_ca, status.cluster_ca) == ("r2", "r1", "c2")
    assert secret not in repr(status.encode())


async def test_an_agent_that_is_not_ready_says_why() -> None:
    agent, self_checks = made({"api_server": failed("API server", "refuses connections", "", "api_refused")})
    assert agent.status(0.0).unready == "api_server", "not looked at yet"
    await self_checks.look()
    status = agent.status(0.0)
    assert (status.ready, status.checks) == (False, "api_server:api_refused")
    assert status.unready == "api_server"
    assert len(status.encode()) < 4096


async def test_a_change_is_reported_at_once_and_the_rest_now_and_then(monkeypatch) -> None:
    monkeypatch.setattr(reports, "LOOK", 0.005)
    found = {"api_server": ok("API server", "is there")}
    agent, self_checks = made(found)
    await self_checks.look()
    sent: asyncio.Queue[bool] = asyncio.Queue()
    task = asyncio.create_task(agent.run(lambda: sent.put_nowait(agent.status(0.0).ready), draw=lambda: 0.5))
    assert await asyncio.wait_for(sent.get(), 5) is True
    found["api_server"] = failed("API server", "refuses connections", "", "api_refused")
    await self_checks.look()
    assert await asyncio.wait_for(sent.get(), 5) is False
    assert sent.empty(), "nothing has changed since, and half a minute has not passed"
    task.cancel()
