"""A changed policy: who loses what is said, and what cannot be meant is held back until it is accepted."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import PolicyFile
from arcbridge.relay.policy_guard import PolicyWatch, Session
from arcbridge.relay.self_checks import policy_finding
from arcbridge.settings.config import RelayConfig

ALL = '[[allow]]\nusers = ["*"]\nclusters = ["*"]\n'


def only(*users: str, cluster: str = "*") -> str:
    names = ", ".join(f'"{user}"' for user in users)
    return f'[[allow]]\nusers = [{names}]\nclusters = ["{cluster}"]\n'


class Relay:
    """A relay's policy file with its watch, at a time of the test's own."""

    def __init__(self, file: Path, users: int, clusters: tuple[str, ...] = ("berlin",), share: int = 50) -> None:
        file.write_text(ALL)
        self.now = 0.0
        self.path = file
        self.file = PolicyFile(file, clock=lambda: self.now)
        self.file.hold_back(share, 600)
        self.sessions: list[Session] = [
            (Identity(f"user-{n}", "", (), f"s{n}", "i", 0.0), "berlin") for n in range(users)
        ]
        checked = SimpleNamespace(config=RelayConfig(policy=file), issuers=SimpleNamespace(issuers=()))
        basis: Any = SimpleNamespace(policy=self.file, checked=checked)
        self.watch = PolicyWatch(basis, lambda: self.sessions, lambda: clusters)

    async def write(self, text: str) -> list[dict[str, Any]]:
        """Change the file and look; return the lines of the log."""
        self.path.write_text(text)
        self.now += 2
        os.utime(self.path, ns=(int(self.now * 1e9), int(self.now * 1e9)))
        return await self.look()

    async def look(self) -> list[dict[str, Any]]:
        with structlog.testing.capture_logs() as lines:
            await self.watch.look()
        return list(lines)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "policy.toml"


async def test_who_loses_what_is_a_record(file: Path) -> None:
    relay, found = Relay(file, users=5), []
    relay.watch.record = lambda act, arguments, **more: found.append((arguments.get("rules"), more))
    await relay.write("")
    await relay.write(ALL)
    await relay.write("nonsense")
    await relay.write(only("user-0", "user-1", "user-2"))
    held, withdrawn, refused, taken = found
    assert held[1]["outcome"] == "held"
    assert held[1]["result"]["users_lost"] == 5
    assert withdrawn == (None, {"outcome": "withdrawn"})
    assert refused[1]["outcome"] == "refused"
    assert (taken[0], taken[1]["result"]["users"]) == (1, ("user-3", "user-4"))


async def test_a_new_administrator_is_in_the_record_and_in_the_log(file: Path) -> None:
    relay, found = Relay(file, users=1), []
    relay.watch.record = lambda act, arguments, **more: found.append((arguments, more["result"]))
    admin = '[[admin]]\nusers = [{}]\nclusters = ["shop-*"]\nwhat = ["tokens"]\n'
    line, *_ = await relay.write(ALL + admin.format('"eve"'))
    assert (line["admins"], line["admins_gain"]) == (1, ["user eve: tokens of shop-*"])
    assert (found[0][0]["admins"], found[0][1]["admins_gain"]) == (1, ["user eve: tokens of shop-*"])
    assert "admins_lose" not in found[0][1]
    await relay.write(ALL + admin.format(", ".join(f'"u{n:02}"' for n in range(30))))
    assert found[1][1]["admins_lose"] == ["user eve: tokens of shop-*"]
    assert found[1][1]["admins_gain"][19:] == ["user u19: tokens of shop-*", "10 more"]


async def test_who_loses_what_is_a_line(file: Path) -> None:
    relay = Relay(file, users=5)
    former = relay.file.current().hash
    (line,) = await relay.write(only("user-0", "user-1", "user-2"))
    assert (line["event"], line["former"], line["rules"]) == ("policy taken over", former, 1)
    assert (line["hash"], line["users"]) == (relay.file.current().hash, "user-3, user-4")
    assert (line["users_lost"], line["sessions_lost"]) == (2, 2)
    assert await relay.look() == [], "once"


@pytest.mark.parametrize(
    ("text", "users", "reason"),
    [
        ("", 1, "it has no rule"),
        (only("user-0", cluster="munich-*"), 1, "none of its rules is for a cluster that is enrolled"),
        (only("user-0", "user-1"), 5, "3 of 5 users who are connected would lose the cluster that they use"),
    ],
)
async def test_what_cannot_be_meant_is_held_back_until_it_is_accepted(
    file: Path, text: str, users: int, reason: str
) -> None:
    relay = Relay(file, users)
    former = relay.file.current()
    (line,) = await relay.write(text)
    assert (line["event"], line["log_level"]) == ("policy held back", "error")
    assert reason in line["reason"]
    assert relay.file.current() is former
    finding = policy_finding(relay.file.error, relay.file.held)
    assert (finding.code, reason in finding.detail, line["hash"] in finding.remedy) == ("policy_held", True, True)
    assert await relay.look() == []
    assert not relay.file.accept(former.hash), "another version is not what was looked at"
    assert relay.file.accept(line["hash"])
    taken, *_ = await relay.look()
    assert (taken["event"], taken["reason"]) == ("policy taken over", "an operator has accepted it")
    assert relay.file.current().hash == line["hash"]
    assert policy_finding(relay.file.error, relay.file.held).code == ""


async def test_of_two_looks_at_once_one_decides(file: Path) -> None:
    """The relay looks each second, and before each look at the registry; the loop has turns between the sessions."""
    relay, found = Relay(file, users=100), []
    relay.watch.record = lambda act, arguments, **more: found.append(more.get("outcome", "done"))
    await relay.write(only("user-0"))
    assert relay.file.held is not None
    relay.file.accept(relay.file.held[0].hash)
    with structlog.testing.capture_logs() as lines:
        await asyncio.gather(relay.watch.look(), relay.watch.look())
    assert [line["event"] for line in lines] == ["policy taken over"]
    assert found == ["held", "done"]


async def test_a_version_that_stays_counts_after_a_time(file: Path) -> None:
    relay = Relay(file, users=5)
    await relay.write(only("user-0"))
    relay.now += 590
    assert await relay.look() == []
    relay.now += 20
    (taken,) = await relay.look()
    assert (taken["event"], taken["reason"]) == ("policy taken over", "it was held back for long enough")


async def test_a_version_that_is_undone_is_held_no_more(file: Path) -> None:
    relay = Relay(file, users=5)
    await relay.write(only("user-0"))
    (line,) = await relay.write(ALL)
    assert line["event"] == "policy held back no more"
    assert relay.file.held is None
    await relay.write("")
    (line,) = await relay.write(only("user-0", "user-1", "user-2"))
    assert (line["event"], line["users_lost"]) == ("policy taken over", 2), "a better one is taken in its place"


async def test_a_share_of_0_holds_nothing_back(file: Path) -> None:
    relay = Relay(file, users=5, share=0)
    (line, *_) = await relay.write("")
    assert (line["event"], line["users_lost"]) == ("policy taken over", 5)


async def test_two_of_three_may_go_because_few_are_meant(file: Path) -> None:
    relay = Relay(file, users=3)
    (line,) = await relay.write(only("user-0"))
    assert (line["event"], line["users_lost"]) == ("policy taken over", 2)


async def test_a_reload_holds_back_as_well(file: Path) -> None:
    relay = Relay(file, users=5)
    former = relay.file.current()
    other = file.with_name("other.toml")
    other.write_text("")
    relay.file.take(other, PolicyFile(other).current())
    assert (await relay.look())[0]["event"] == "policy held back"
    assert relay.file.current() is former
    relay.file.hold_back(50, 600)
    assert await relay.look() == [], "the same share changes nothing"
    relay.file.hold_back(80, 600)
    assert (await relay.look())[0]["event"] == "policy held back", "another one has it judged again"
    relay.file.hold_back(0, 600)
    assert (await relay.look())[0]["event"] == "policy taken over", "a share of 0 lets go what is held"


@pytest.mark.parametrize("broken", ["[[allow", None])
async def test_what_is_not_in_the_file_any_more_is_held_no_more(file: Path, broken: str | None) -> None:
    """A correction with a typing mistake, or a deleted file: nobody is cut when the time of the former is over."""
    relay = Relay(file, users=5)
    await relay.write("")
    relay.now += 300
    if broken is None:
        file.unlink()
        lines = await relay.look()
    else:
        lines = await relay.write(broken)
    assert [line["event"] for line in lines] == ["policy not taken over", "policy held back no more"]
    relay.now += 900
    await relay.look()
    assert len(relay.file.current().rules) == 1
    assert relay.file.held is None
    assert [line["event"] for line in await relay.write(ALL)] == ["policy can be read again"]


async def test_what_was_accepted_counts_where_it_comes_later(file: Path) -> None:
    """Another process, or another relay, to which the file comes after the operator's command."""
    relay, other = Relay(file, users=5), PolicyFile(file)
    file.write_text("")
    hash = PolicyFile(file).current().hash
    file.write_text(ALL)
    assert other.current().hash == relay.file.current().hash
    assert not relay.file.accept(hash), "nothing is held yet"
    line, *_ = await relay.write("")
    assert (line["event"], line["reason"]) == ("policy taken over", "an operator has accepted it")


async def test_a_version_is_accepted_once_and_for_a_while(file: Path) -> None:
    """The same mistake, weeks later, is held back again."""
    relay = Relay(file, users=5)
    (line,) = await relay.write("")
    assert relay.file.accept(line["hash"])
    await relay.look()
    await relay.write(ALL)
    assert (await relay.write(""))[0]["event"] == "policy held back"
    await relay.write(ALL)
    assert not relay.file.accept(line["hash"])
    relay.now += 600
    assert (await relay.write(""))[0]["event"] == "policy held back"


async def test_another_comment_is_no_other_version(file: Path) -> None:
    relay = Relay(file, users=5)
    (line,) = await relay.write("")
    relay.now += 500
    assert await relay.write("# nothing yet\r\n") == []
    relay.now += 110
    taken, *_ = await relay.look()
    assert (taken["event"], taken["hash"]) == ("policy taken over", line["hash"]), "its time is not begun anew"


async def test_the_loop_has_its_turns_while_many_sessions_are_looked_at(file: Path) -> None:
    relay = Relay(file, users=1000)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await relay.write(only("user-0"))
    counting.cancel()
    assert turns >= 1000 // 32
