"""Sessions and streams of users who are at a limit."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from arcbridge.agent.accounts import Accounts, Limit
from arcbridge.agent.audit import AuditLog
from arcbridge.agent.targets import TcpTargets, read_targets
from arcbridge.errors import ConnectionLost, SessionEnded, StreamReset
from arcbridge.settings.config import AgentLimitsConfig, LimitsOverrideConfig, TargetConfig
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import DEFAULT
from tests.support.stream_io import StreamIO

from .kube.bench import RecordedAudit
from .pair import Held, end_of, holding, joined, opened, reset_of, used


def limited(**limits: Any) -> Accounts:
    return Accounts(AgentLimitsConfig(**limits), clock=lambda: 1000.0)


async def test_l23_streams_of_all_sessions_count_and_one_over_the_limit_is_reset() -> None:
    audit = RecordedAudit()
    async with holding(accounts=limited(streams=3), audit=audit) as held:  # noqa: SIM117  the one is made by the other
        async with joined(held.sessions, join_id="k" * 16, alone=False) as (second, _):
            inside = [StreamIO() for _ in range(2)]
            for io in inside:
                second.open("kubernetes", io)
                await io.write(b"x")
                assert await io.read() == b"x"
            for client in (held.client, second, second):
                over = opened(client, "kubernetes")
                assert await reset_of(over) == ResetCode.LIMIT
            await held.echo(b"those that are there go on")
            inside[0].finish()
            await held.until(lambda: held.old_of("k").streams == 1)
            io = await used(second)
            assert len(held.proxy.callers) == 4
    assert held.sessions.accounts.refusals[Limit.STREAMS] == 3
    first, rest = audit.lines()
    assert (first["limit"], first["verb"], first["target"]) == ("streams", "open", "kubernetes")
    assert first["reason"].startswith("3 connections of yours are open")
    assert (rest["limit"], rest["verb"], rest["omitted"]) == ("streams", "limit", 2), "none is missing at the end"


async def test_m7_streams_that_end_before_their_answers_count_per_user(held: Held) -> None:
    """The user's next session has no burst of its own; another user has a whole one."""
    (account,) = held.sessions.accounts._present.values()
    account.churn.rate = 0.0  # however long this takes
    begun = 0
    for join_id in ("k" * 16, "l" * 16):
        async with joined(held.sessions, join_id=join_id, alone=False) as (client, _):
            while not client.closed and begun < 2 * DEFAULT.churn_burst:
                io = opened(client, "nothing")
                begun += 1
                with contextlib.suppress(StreamReset, ConnectionLost, SessionEnded):
                    await io.read()
            assert "before their answers" in (await asyncio.wait_for(client.wait_ended(), 10)).message
    assert DEFAULT.churn_burst < begun < 1.5 * DEFAULT.churn_burst
    async with joined(held.sessions, "m", join_id="m" * 16, alone=False) as (mallory, _):
        io = opened(mallory, "nothing")
        assert await reset_of(io) == ResetCode.UNKNOWN_TARGET
    await held.echo(b"what runs in a session without such streams goes on")


async def test_l23_another_user_is_not_touched() -> None:
    async with holding(accounts=limited(streams=1)) as held:  # noqa: SIM117  the one is made by the other
        async with joined(held.sessions, "m", join_id="k" * 16, alone=False) as (mallory, _):
            first, second = StreamIO(), StreamIO()
            mallory.open("kubernetes", first)
            await first.write(b"x")
            assert await first.read() == b"x"
            mallory.open("kubernetes", second)
            assert await reset_of(second) == ResetCode.LIMIT
            await held.echo(b"alice's own")


async def test_l24_one_session_too_many_is_refused_in_words() -> None:
    audit = RecordedAudit()
    async with holding(accounts=limited(sessions=1), audit=audit) as held:
        for _ in range(2):
            async with joined(held.sessions, join_id="k" * 16, alone=False) as (second, _):
                ended = await end_of(second)
            assert ended.code == GoawayCode.LIMIT
            assert ended.message.startswith("1 sessions of yours are open at this agent")
        await held.echo(b"the first one goes on")
        assert (held.sessions.counters.opened, held.sessions.counters.refused) == (1, 2)
        async with joined(held.sessions, "m", join_id="m" * 16, alone=False) as (mallory, _):
            assert not mallory.closed
    assert (len(held.sessions.accounts), len(held.sessions.accounts._retired)) == (0, 2)
    first, rest = audit.lines()
    assert (first["limit"], first["verb"], first["user"]) == ("sessions", "limit", "alice")
    assert rest["omitted"] == 1


async def test_l24_a_lost_session_without_streams_makes_room_for_its_own_user() -> None:
    async with holding(accounts=limited(sessions=1)) as held:
        await held.finish()
        await held.cut()
        async with joined(held.sessions, join_id="k" * 16, alone=False):
            await held.until(lambda: len(held.sessions) == 1 and held.sessions.detached == 0)
            assert (await held.refusal()).code == GoawayCode.GONE


async def test_l25_when_the_days_bytes_are_used_up_what_runs_ends_and_nothing_new_begins() -> None:
    targets = TcpTargets(read_targets({"db": TargetConfig("127.0.0.1:1", groups=("dev",))}), AuditLog(""))
    async with holding(accounts=limited(bytes_per_day=100_000), targets=targets) as held:
        await held.echo(b"x" * 10_000)
        await held.io.write(b"x" * 60_000)  # and as much comes back
        assert await reset_of(held.io) == ResetCode.LIMIT
        tcp = opened(held.client, "tcp:db")
        assert await reset_of(tcp) == ResetCode.LIMIT
        assert held.sessions.accounts.refusals[Limit.BYTES_PER_DAY] == 1
        assert not held.client.closed, "the session itself goes on: its next request is refused in words"


async def test_l25_bytes_are_paced_over_all_sessions_of_a_user() -> None:
    accounts = limited(bytes_per_second_to_cluster=100_000, bytes_per_second_to_user=100_000)
    async with holding(accounts=accounts) as held:  # noqa: SIM117  the one is made by the other
        async with joined(held.sessions, join_id="k" * 16, alone=False) as (second, _):
            io = opened(second, "kubernetes")
            for wire in (held.io, io):
                data = os.urandom(80_000)
                await wire.write(data)
                got = b""
                while len(got) < len(data):
                    got += await wire.read()
                assert got == data, "later, and whole"
    assert accounts.paced_seconds["to_cluster"] > 0
    assert accounts.paced_seconds["to_user"] > 0
    assert sum(accounts.refusals.values()) == 0


async def test_a_renewal_changes_the_limits_of_the_session() -> None:
    accounts = limited(streams=1, groups={"ops": LimitsOverrideConfig(streams=2)})
    async with holding(accounts=accounts) as held:
        over = opened(held.client, "kubernetes")
        assert await reset_of(over) == ResetCode.LIMIT
        held.judge.add("ops", "alice", "ops", issued=1500.0)
        await held.renew("ops")
        await used(held.client)


async def test_m22_the_windows_of_all_sessions_of_a_user_grow_within_one_bound(held: Held) -> None:
    async with joined(held.sessions, join_id="k" * 16, alone=False):
        growths = []
        for letter in "jk":
            session = held.old_of(letter).session
            growths.append(session._machine.stream_table.growth)
        promised = next(iter(held.sessions._open))._caller.account.promised
        promised.most = promised.held + 1000
        assert growths[0].take(600) == 600
        assert growths[1].take(600) == 400
