"""`elevate`, `approve`, `deny`, `withdraw` and `elevations`: what each prints, and its exit code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from arcbridge.cli.client import answering, time_limit
from arcbridge.cli.commands import DOCUMENTS
from arcbridge.cli.output import plain, print_note, print_prose, print_rows, rfc3339
from arcbridge.cli.parser import Invocation
from arcbridge.cli.screen import Column
from arcbridge.errors import ConfigError, ExitCode
from arcbridge.units import duration

if TYPE_CHECKING:
    from arcbridge.client.commands.elevation import ElevationRequest, Elevations
    from arcbridge.client.service import ClientContext

_COLUMNS = (
    Column("name"),
    Column("user"),
    Column("state", state=True),
    Column("groups"),
    Column("reason", rank=1),
    Column("until"),
    Column("approved_by", rank=1),
    Column("rule", wide=True),
)


@answering
async def elevate(invocation: Invocation, context: ClientContext) -> int:
    """Ask for groups, and wait until they are lent."""
    from arcbridge.client.commands.elevation import choose, elevations_of, seconds_of

    seconds, reason = time_limit(invocation), invocation.text("reason").strip()
    if not reason or len(reason) > 256:
        raise ConfigError(
            "flag --reason: say why, in 1 to 256 characters; the approver reads it, and the audit log has it"
        )
    async with elevations_of(context) as cluster:
        user, own = await cluster.user()
        wanted, by_rule = invocation.texts("group"), invocation.text("rule")
        rule, groups = choose(await cluster.rules(), user, own, wanted=wanted, name=by_rule)
        asked = await cluster.ask(user, rule, groups, seconds_of(rule, seconds), reason)
        name, waiting = plain(asked.name), "Waiting for the agent"
        if rule.approvals:
            by, waiting = plain(", ".join(rule.approvers)), f"Waiting for approval of {name}"
            print_note(f"Asked as {name}. A user in {by} approves by: arcbridge approve {name}")
        with context.terminal.waiting(waiting, 0.0):
            try:
                found = await cluster.begun(asked.name, rule.approvals)
            except asyncio.CancelledError:
                print_note(f"{name} stays, and may be approved; to take it back: arcbridge withdraw {name}")
                raise
    until = _until(found, time.time())
    print_prose(f"{plain(', '.join(found.groups))} until {until}; `arcbridge withdraw {name}` ends it")
    return ExitCode.DONE


@answering
async def approve(invocation: Invocation, context: ClientContext) -> int:
    """Approve a request."""
    return await _decide(context, "approved", lambda cluster: cluster.approve(invocation.text("name")))


@answering
async def deny(invocation: Invocation, context: ClientContext) -> int:
    """Deny a request, or end what it lends."""
    name, reason = invocation.text("name"), invocation.text("reason")
    return await _decide(context, "denied", lambda cluster: cluster.deny(name, reason))


@answering
async def withdraw(invocation: Invocation, context: ClientContext) -> int:
    """Withdraw a request; what it lends ends."""
    return await _decide(context, "withdrawn", lambda cluster: cluster.withdraw(invocation.text("name")))


@answering
async def elevations(invocation: Invocation, context: ClientContext) -> int:
    """List requests that wait or lend."""
    from arcbridge.client.commands.elevation import elevations_of

    output, now = invocation.text("output", "table"), time.time()
    async with elevations_of(context) as cluster:
        found = await cluster.requests()
    if not invocation.switch("all"):
        found = [one for one in found if one.state(now) in ("waiting", "active")]
    rows = [_row(one, now, people=output not in DOCUMENTS) for one in found]
    if not rows and output not in DOCUMENTS:
        print_note("no request waits, and nothing is lent; --all has those that are over")
        return ExitCode.DONE
    print_rows(rows, _COLUMNS, output)
    return ExitCode.DONE


async def _decide(
    context: ClientContext, done: str, decide: Callable[[Elevations], Awaitable[ElevationRequest]]
) -> int:
    from arcbridge.client.commands.elevation import elevations_of

    async with elevations_of(context) as cluster:
        found = await decide(cluster)
    groups, length = plain(", ".join(found.groups)), duration(found.seconds)
    print_prose(f"{done}: {plain(found.user)}, {groups} for {length}, {plain(found.reason)} ({plain(found.name)})")
    return ExitCode.DONE


def _row(one: ElevationRequest, now: float, *, people: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": one.name, "user": one.user, "state": one.state(now), "rule": one.rule}
    row |= {"reason": one.reason, "seconds": one.seconds, "ended": one.ended}
    if people:
        until = _until(one, now) if one.until > now else ""
        return {**row, "groups": ", ".join(one.groups), "approved_by": ", ".join(one.approved_by), "until": until}
    return {**row, "groups": list(one.groups), "approved_by": list(one.approved_by), "until": rfc3339(one.until)}


def _until(one: ElevationRequest, now: float) -> str:
    """Return the time of day at which a grant ends, with the day unless that is today, and how long it still lasts."""
    there, today = time.localtime(one.until), time.localtime(now)
    clock = time.strftime("%H:%M" if there[:3] == today[:3] else "%Y-%m-%d %H:%M", there)
    return f"{clock} ({duration(one.until - now)})"
