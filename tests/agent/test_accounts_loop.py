"""The event loop's time is charged to the user for whom it works, wherever the work is done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.accounts import Account, Accounts, Limit, check_limits
from arcbridge.agent.kube import fast_path, proxy, upstream_pool
from arcbridge.agent.kube.attempt import Attempt
from arcbridge.errors import ConfigError
from arcbridge.loop_shares import MAX_WAIT, RECENT, REFUSED_AFTER
from arcbridge.mux import splice
from arcbridge.mux.session import MuxSession
from arcbridge.settings.config import AgentLimitsConfig, LimitsOverrideConfig
from arcbridge.wire.sender import Sender
from tests.support.clock import Clock

from .kube.bench import ALICE, PODS, Bench, Member, running
from .kube.test_upgrade import EXEC, SPDY, SWITCH_SPDY, echo
from .pair import FakeAuthenticator, joined, make_sessions

BURNT = 0.03
"""Seconds of CPU time that a spoilt function takes."""


def burn() -> None:
    ends = time.thread_time() + BURNT
    while time.thread_time() < ends:
        pass


def spoil(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Let a function take BURNT; return the list of its calls."""
    calls: list[str] = []
    inner: Callable[..., Any] = getattr(owner, name)

    def spoilt(*args: Any, **named: Any) -> Any:
        calls.append(name)
        burn()
        return inner(*args, **named)

    patch.setattr(owner, name, spoilt)
    return calls


async def settled(bench: Bench) -> None:
    """Charge the agent's side of the session to the user, as `AgentSession` does when it accepts one."""
    for session in bench.agents:
        session.payer = bench.caller.account.loop_time


@pytest.mark.parametrize(
    ("owner", "name", "headers"),
    [
        (fast_path, "plain_head", ()),  # a callback of the caller's connection
        (proxy, "read_facts", ("TE: trailers",)),  # a step of the stream's task
        (upstream_pool, "read_head", ()),  # a callback of the API server's connection
        (Sender, "data_to_send", ()),  # a flush of the session
    ],
)
async def test_work_for_a_request_is_charged_to_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, headers: tuple[str, ...]
) -> None:
    async with running(tmp_path) as bench:
        await settled(bench)
        await bench.get(PODS, *headers)
        payer = bench.caller.account.loop_time
        before, began = payer.spent, time.monotonic()
        calls = spoil(monkeypatch, owner, name)
        assert (await bench.get(PODS, *headers)).status == 200
        assert calls
        # The client's end of the session, in this process, flushes too; a flush of the agent's may follow the answer.
        burnt = BURNT if name == "data_to_send" else len(calls) * BURNT
        assert burnt <= payer.spent - before <= time.monotonic() - began, "once, and not twice"
        assert payer.shares.total == pytest.approx(payer.spent)


async def test_what_runs_once_a_record_is_written_is_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#L47."""

    def written_later(self: Attempt, recorded: Callable[[str], None]) -> None:
        asyncio.get_running_loop().call_soon(recorded, "")

    async with running(tmp_path) as bench:
        await settled(bench)
        monkeypatch.setattr(Attempt, "record_begun", written_later)
        calls = spoil(monkeypatch, fast_path.FastPath, "_start")
        payer = bench.caller.account.loop_time
        before = payer.spent
        assert (await bench.get(f"{PODS}?watch=true")).status == 200
        assert calls
        assert payer.spent - before >= BURNT


async def test_a_token_is_charged_to_the_relay_until_its_user_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#L47. Sessions of a relay whose tokens take too much wait, and those of others do not."""
    authenticator = FakeAuthenticator(t="alice")
    sessions, _ = make_sessions(authenticator, Clock())
    relays = sessions.accounts.relays
    calls = spoil(monkeypatch, FakeAuthenticator, "authenticate")
    async with joined(sessions, via="a", alone=False):
        assert calls
        assert relays.of("a", 0.0).spent >= BURNT
        relays.of("a", 0.0).held_until = ends = time.monotonic() + 0.3
        async with (
            joined(sessions, join_id="k" * 16, via="a", alone=False, wait=False) as (late, _),
            joined(sessions, join_id="l" * 16, via="b") as (other, _),
        ):
            waiting = asyncio.create_task(late.wait_established())
            await other.wait_established()
            assert not waiting.done()
            await waiting
            assert time.monotonic() > ends


async def test_what_an_upgraded_stream_brings_is_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as bench:
        await settled(bench)
        bench.api.routes[EXEC] = echo(SWITCH_SPDY)
        wire = bench.stream()
        await wire.send(SPDY)
        status, _ = await wire.head()
        assert status == 101
        payer = bench.caller.account.loop_time
        before = payer.spent
        # The echo comes through the splice's own callback, in which the stream is written.
        calls = spoil(monkeypatch, splice.StreamTransport, "write")
        await wire.send(b"ping")
        assert await wire.exactly(4) == b"ping"
        assert payer.spent - before >= BURNT
        assert calls
        wire.io.finish()
        await wire.rest()


def heavy(account: Account, other: Account, seconds: float) -> None:
    """Let the loop work for both users, `seconds` for the first one, by a clock that ends now."""
    shares = account.loop_time.shares
    for now in (time.monotonic() - REFUSED_AFTER, time.monotonic() - REFUSED_AFTER / 2, time.monotonic()):
        other.loop_time.charge(now, now - 0.001, shares.total)
        shares._cpu_mark -= seconds  # as if the thread had worked for so long
        account.loop_time.charge(now, now - seconds, shares.total)


async def test_all_sessions_of_a_user_over_the_share_stand_still_and_nobody_elses() -> None:
    authenticator = FakeAuthenticator()
    authenticator.add("t", "alice", "dev")
    authenticator.add("u", "bob", "dev")
    sessions, _ = make_sessions(authenticator, Clock())
    async with (
        joined(sessions) as (one, _),
        joined(sessions, join_id="k" * 16, alone=False) as (two, _),
        joined(sessions, "u", "l" * 16, alone=False) as (honest, _),
    ):
        for client in (one, two, honest):
            await client.wait_established()
        alice, bob = (sessions.accounts._present[name] for name in ("i#alice", "i#bob"))
        heavy(alice, bob, 2.0)

        def held(account: Account) -> list[bool]:
            ends: list[MuxSession] = [member.session for member in account.members]
            return [end.pacing.reading_held is not None and end.pacing.sending_held is not None for end in ends]

        assert (held(alice), held(bob)) == ([True, True], [False])
        assert alice.admit_request(time.monotonic()) is Limit.LOOP_SHARE
        assert alice.refuses_stream(time.monotonic(), plain=True) is Limit.LOOP_SHARE
        assert alice.refuses_stream(time.monotonic(), plain=False) is None
        assert bob.admit_request(time.monotonic()) is None
        bob.end_request()
        assert alice.admit_request(time.monotonic() + MAX_WAIT + RECENT) is None
        alice.end_request()


async def test_the_refusal_says_why_and_when_to_come_back(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        accounts = bench.caller.account._accounts
        other = accounts.enter(ALICE.__class__("bob", "", (), "i#bob", "i", 4e9), Member())
        heavy(bench.caller.account, other, 2.0)
        answer = await bench.get(PODS)
        assert answer.status == 429
        assert "takes more than the 50 % of the agent's time" in answer.status_object["message"]
        assert 1 <= int(answer.header("retry-after")[0]) <= MAX_WAIT + RECENT
        assert accounts.refusals[Limit.LOOP_SHARE] == 1
        assert accounts.loop.over > 0.0
        assert not bench.api.requests


def test_a_user_or_a_group_may_have_another_share_or_none() -> None:
    config = AgentLimitsConfig(users={"alice": LimitsOverrideConfig(loop_share=0)})
    accounts = Accounts(config, clock=Clock(), monotonic=Clock())
    bob = ALICE.__class__("bob", "", (), "i#bob", "i", 4e9)
    free, bound = accounts.enter(ALICE, Member()), accounts.enter(bob, Member())
    heavy(free, bound, 5.0)
    assert free.loop_time.refused_until == 0.0
    accounts.change(AgentLimitsConfig(loop_share=20))
    heavy(free, bound, 5.0)
    assert free.loop_time.refused_until > 0.0


@pytest.mark.parametrize("share", [-1, 101])
def test_a_share_is_a_percentage(share: int) -> None:
    with pytest.raises(ConfigError, match=r"limits\.loop_share: must be"):
        check_limits(AgentLimitsConfig(loop_share=share))


async def test_an_only_user_is_not_slowed_down() -> None:
    accounts = Accounts(AgentLimitsConfig())
    member = Member()
    account = accounts.enter(ALICE, member)
    shares, now = accounts.loop, time.monotonic()
    for _ in range(50):
        shares._cpu_mark -= 1.0
        account.loop_time.charge(now, now - 1.0, shares.total)
    await asyncio.sleep(0)
    assert (member.held, account.admit_request(now)) == ([], None)
