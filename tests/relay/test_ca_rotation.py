"""The rotation of the relay's CA: who is waited for, and how processes take a step over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from arcbridge.errors import StateError
from arcbridge.mux.session import MuxSession
from arcbridge.pki.authority import Authority, agent_cluster
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.pki.private_files import locked
from arcbridge.pki.rotation import Rotation
from arcbridge.pki.succession import Succession
from arcbridge.relay import ca_rotation, control, data_dir
from arcbridge.relay.audit.log import RelayAudit
from arcbridge.relay.ca_rotation import RotationWatch, is_behind, status, take_step
from arcbridge.relay.control import ANNOUNCEMENTS, ControlConnection
from arcbridge.relay.data_dir import change_authority, open_authority, open_registry, read_authority, read_rotation
from arcbridge.relay.fleet.base import AgentReport
from arcbridge.relay.hop import Hops
from arcbridge.relay.registry.base import Recovery, RegistryUnavailable
from arcbridge.relay.service import _Maintenance
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig, RelayTlsConfig
from arcbridge.wire.records import CaSuccession, Status
from tests.net.ends import authority
from tests.relay.audit.test_log import records
from tests.relay.conftest import relay_config
from tests.relay.station import Agent, Station, station
from tests.support.eventually import until


class Running:
    """What the relay that runs answers."""

    def __init__(self, config: RelayConfig) -> None:
        self.authority = open_authority(config.data_dir)
        self.watch = RotationWatch(config.data_dir)
        self.agents: list[dict[str, Any]] = []
        self.users: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        """What other relays of the fleet find out about themselves; they do not say which CA they have."""

    async def ask(self, data_dir: Path, question: dict[str, Any]) -> list[dict[str, Any]]:
        known = self.authority.succession
        origin = {"relay": "127.0.0.1:443", "worker": 1}
        state = {"pins": list(known.pins), "present": known.present, "since": known.since}
        return {
            "agents": [{**origin, **one} for one in self.agents],
            "checks": [*self.others, origin],
            "ca": [{**state, **origin}],
            "users": self.users,
        }[question["ask"]]


@pytest.fixture
def config(tmp_path: Path) -> RelayConfig:
    return relay_config(tmp_path, "")


@pytest.fixture
def running(config: RelayConfig, monkeypatch: pytest.MonkeyPatch) -> Running:
    found = Running(config)
    monkeypatch.setattr(ca_rotation, "ask", found.ask)
    return found


async def enrol(config: RelayConfig, *names: str) -> None:
    registry = await open_registry(config.data_dir)
    for name in names:
        await registry.adopt(name, Authority.create(name).certificate_pem, time.time())
        await registry.certificate_issued(name, time.time() + 3600)
    await registry.close()


async def test_a_step_waits_for_all_and_names_those_it_waits_for(config: RelayConfig, running: Running) -> None:
    await enrol(config, "near", "far")
    first = running.authority.pin
    await take_step(config, "next", force=False)
    with pytest.raises(
        StateError, match=r"relay 127.0.0.1:443 \(worker 1\) has another ca-rotation.json; cluster far is"
    ):
        await take_step(config, "activate", force=False)
    for _ in range(2):
        assert await running.watch.look(running.authority), "until all that depends on it has followed"
    running.watch.done()
    assert not await running.watch.look(running.authority)
    second = running.authority.succession.pins[1]
    running.agents = [{"cluster": name, "relay_ca": pin} for name, pin in (("near", second), ("far", first))]
    found = await status(config)
    assert found.followed == "1 of 2 clusters"
    assert found.agents == "1 of 2 agents"
    assert found.missing == (f"cluster far has an agent that does not know {second} (1 of its 1 agents)",)
    with pytest.raises(
        StateError, match=r"the step before \(1 of 2 clusters, 1 of 2 agents\): cluster far has an agent"
    ):
        await take_step(config, "activate", force=False)
    running.agents[1]["relay_ca"] = second
    await take_step(config, "activate", force=False)
    assert await running.watch.look(running.authority)
    assert running.authority.pin == second
    with pytest.raises(StateError, match="cluster near has an agent with a certificate of the former CA"):
        await take_step(config, "retire", force=False)
    await take_step(config, "retire", force=True)
    assert await running.watch.look(running.authority)
    assert running.authority.trusted_pem == running.authority.certificate_pem
    assert (read_authority(config.data_dir) or running.authority).pin == second


async def test_how_many_agents_and_users_have_the_next_ca_is_counted_once_over_all_processes(
    config: RelayConfig, running: Running
) -> None:
    await enrol(config, "prod")
    await take_step(config, "next", force=False)
    await running.watch.look(running.authority)
    first, second = running.authority.succession.pins
    # An agent is connected to two relays; the user's joins came out at two workers.
    agents = (("a", second), ("a", second), ("b", second), ("b", first), ("c", second))
    running.agents = [{"cluster": "prod", "agent": name, "relay_ca": pin} for name, pin in agents]
    joins = (("anna", 1, ""), ("anna", 2, second), ("bob", 4, first), ("bob", 3, second), ("eve", 1, second))
    running.users = [{"user": user, "at": at, "relay_ca": pin} for user, at, pin in joins]
    found = await status(config)
    assert (found.followed, found.agents) == ("0 of 1 clusters", "2 of 3 agents")
    assert found.users == "2 of 3 users; not at the last join of bob"
    assert [(row["agents"], row["users"]) for row in found.rows] == [("", ""), (found.agents, found.users)]
    with pytest.raises(StateError, match=r"2 of 3 agents\): cluster prod has .* \(1 of its 3 agents\)"):
        await take_step(config, "activate", force=False)
    # Clients do not know this CA where another one vouches for the relay.
    pem = config.data_dir / "x.pem"
    assert (await status(replace(config, tls=RelayTlsConfig(pem, pem)))).users == ""


async def test_a_relay_restored_from_before_next_makes_no_other_next_ca(config: RelayConfig, running: Running) -> None:
    await enrol(config, "prod")
    first, other = running.authority.pin, Authority.create("x").pin
    words = f"cluster prod has an agent that follows {other}, which this relay does not have"
    running.agents = [{"cluster": "prod", "relay_ca": other, "certificate_ca": first}]
    assert (await status(config)).strayed == (words,)
    with pytest.raises(StateError, match=rf"^{words}\. Restore a later backup"):
        await take_step(config, "next", force=False)
    # Of a relay with a certificate of another CA: the agent verifies relays by that one, and knows no other yet.
    running.agents = [{"cluster": "prod", "relay_ca": other, "certificate_ca": ""}]
    await take_step(config, "next", force=False)


async def test_a_relay_restored_from_behind_next_says_how_its_agents_come_back(
    config: RelayConfig, running: Running
) -> None:
    await enrol(config, "prod")
    await take_step(config, "next", force=False)
    await running.watch.look(running.authority)
    with pytest.raises(StateError, match="'ca activate --force' brings them back; cluster prod is not connected"):
        await take_step(config, "activate", force=False)
    restored, ends = read_rotation(config.data_dir), Succession.of_pin(running.authority.pin)
    retired = restored.take("activate", time.time()).take("retire", time.time()).list
    ends = ends.follow(retired, "the relay's CA", retire=True)
    await take_step(config, "activate", force=True)
    await running.watch.look(running.authority)
    assert running.authority.links_pem == ends.trusted


async def test_a_ca_is_not_retired_while_revocations_come_back(config: RelayConfig, running: Running) -> None:
    """docs/threats.md#E13: what agents keep of them under the former CA does not open any more then."""
    await enrol(config)
    registry = await open_registry(config.data_dir)
    await registry.change_recovery(lambda _: Recovery("restored", time.time(), awaited=("away",)))
    for step in ("next", "activate"):
        await take_step(config, step, force=False)
        await running.watch.look(running.authority)
    with pytest.raises(StateError, match="before: revocations may be missing"):
        await take_step(config, "retire", force=False)
    await registry.change_recovery(lambda _: None)
    await registry.close()
    await take_step(config, "retire", force=False)


async def test_a_relay_that_does_not_say_which_ca_it_has_has_not_followed(
    config: RelayConfig, running: Running
) -> None:
    await enrol(config)
    await take_step(config, "next", force=False)
    assert await running.watch.look(running.authority)
    running.others = [{"relay": "older.test:8443", "worker": None}]
    with pytest.raises(StateError, match=r"relay older.test:8443 does not say which CA it has\. Wait"):
        await take_step(config, "activate", force=False)
    running.others = []
    with pytest.raises(StateError, match="2 of 3 processes of this relay do not answer"):
        await take_step(replace(config, workers=3), "activate", force=False)
    assert (await status(config)).relays == ("127.0.0.1:443",)
    await take_step(config, "activate", force=False)


async def test_agents_of_the_former_ca_are_taken_until_it_is_retired(config: RelayConfig, running: Running) -> None:
    former = copy_of(running.authority)
    assert running.authority.announced == ""
    csr = make_csr(make_key())
    certificates = [former.sign_agent(csr, "one", life=3600)]
    for step in ("next", "activate"):
        await take_step(config, step, force=True)
        await running.watch.look(running.authority)
    assert running.authority.announced == running.authority.succession.text
    certificates.append(running.authority.sign_agent(csr, "one", life=3600))
    for pem in certificates:
        assert running.authority.authenticate_agent(der(pem)) == agent_cluster(der(pem)) == "one"
    await take_step(config, "retire", force=True)
    await running.watch.look(running.authority)
    with pytest.raises(Exception, match="not issued to an agent by this relay"):
        running.authority.authenticate_agent(der(certificates[0]))
    assert running.authority.authenticate_agent(der(certificates[1])) == "one"


async def test_a_document_that_cannot_be_read_leaves_the_ca_as_it_is(config: RelayConfig, running: Running) -> None:
    pin, file = running.authority.pin, config.data_dir / "ca-rotation.json"
    file.write_text("{")
    for _ in range(2):
        with pytest.raises(StateError, match="damaged"):
            await running.watch.look(running.authority)
    assert running.authority.pin == pin
    file.unlink()
    assert not await running.watch.look(running.authority)


async def test_an_older_document_and_another_next_ca_are_not_taken_over(config: RelayConfig, running: Running) -> None:
    """A relay that went back would sign with a CA that its agents have left; they would renew again and again."""
    file, state = config.data_dir / "ca-rotation.json", read_rotation(config.data_dir)
    other = state.take("next", time.time())
    older = [other]
    for step in ("next", "activate", "retire", "next"):
        state = state.take(step, time.time())
        file.write_bytes(state.encode())
        assert await running.watch.look(running.authority)
        known = copy_of(running.authority), running.authority.announced
        for one in older:
            file.write_bytes(one.encode())
            with pytest.raises(StateError, match=r"is older than the CA that this relay runs with|is of another CA"):
                await running.watch.look(running.authority)
            assert (running.authority.pin, running.authority.announced) == (known[0].pin, known[1])
        older.append(state)


async def test_a_step_before_the_first_look_is_taken_over(config: RelayConfig) -> None:
    authority = open_authority(config.data_dir)
    await take_step(config, "next", force=True)
    watch = RotationWatch(config.data_dir)
    assert await watch.look(authority)
    assert len(authority.succession.pins) == 2


async def test_a_directory_that_vanishes_under_a_relay_makes_no_other_ca(config: RelayConfig, running: Running) -> None:
    await take_step(config, "next", force=True)
    assert await running.watch.look(running.authority)
    known = running.authority.pin
    for file in config.data_dir.iterdir():
        file.unlink()
    with pytest.raises(StateError, match="still mounted"):
        await running.watch.look(running.authority)
    assert running.authority.pin == known
    assert list(config.data_dir.iterdir()) == []


async def test_a_step_that_is_not_yet_announced_is_announced_at_the_next_look(
    config: RelayConfig, running: Running
) -> None:
    basis, recovery = mock.Mock(authority=running.authority), mock.Mock()
    basis.checked.config = config
    recovery.rotated = mock.AsyncMock(side_effect=[RegistryUnavailable("not now"), None])
    maintenance = _Maintenance(basis, mock.Mock(), mock.Mock(), mock.Mock(), recovery)
    await take_step(config, "next", force=True)
    for error in ("not now", "", ""):
        await maintenance._look_at_ca()
        assert maintenance.ca_error == error
    assert recovery.rotated.await_count == 2
    assert basis.certificate.refresh.call_count == 2
    assert [one.kwargs.get("outcome", "done") for one in basis.audit.note.call_args_list] == ["refused", "done"]


@pytest.mark.parametrize("force", [False, True])
async def test_a_wrong_data_dir_is_said_and_nothing_is_made(tmp_path: Path, force: bool) -> None:
    config = replace(relay_config(tmp_path, ""), data_dir=tmp_path / "typo")
    for command in (status(config), take_step(config, "next", force=force)):
        with pytest.raises(StateError, match="there is no CA in"):
            await command
    assert not (config.data_dir / "ca.key").exists()
    assert not (config.data_dir / "registry.db").exists()


async def test_a_command_that_hangs_holds_no_relay_up(config: RelayConfig, running: Running) -> None:
    await take_step(config, "next", force=True)
    with locked(config.data_dir / ".ca.lock"):
        async with asyncio.timeout(5):
            assert await running.watch.look(running.authority)


@pytest.mark.parametrize("step", ["next", "activate", "retire"])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_step_that_was_killed_between_its_files_is_completed(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch, step: str, written: int
) -> None:
    open_authority(config.data_dir)
    while read_rotation(config.data_dir).step != step:
        change_authority(config.data_dir, lambda state: state.take(state.step, time.time()))
    write, done = data_dir.write_private, 0

    def killed(path: Path, data: bytes) -> None:
        nonlocal done
        if done == written:
            raise SystemExit
        done += 1
        write(path, data)

    monkeypatch.setattr(data_dir, "write_private", killed)
    with contextlib.suppress(SystemExit):
        change_authority(config.data_dir, lambda state: state.take(step, time.time()))
    monkeypatch.undo()
    for found in (read_authority(config.data_dir), open_authority(config.data_dir)):
        assert found.pin == read_rotation(config.data_dir).authority().pin
    assert (read_rotation(config.data_dir).step != step) == bool(written)
    pair = Authority.read(config.data_dir)
    assert pair.pin == open_authority(config.data_dir).pin, "for an arcbridge that knows no rotation"
    change_authority(config.data_dir, lambda state: state.take(state.step, time.time()))


async def test_who_is_behind(config: RelayConfig, running: Running) -> None:
    def behind(**report: str) -> bool:
        return is_behind(replace(AgentReport(), **report), running.authority)

    first = running.authority.pin
    assert not behind(), "no rotation is under way"
    await take_step(config, "next", force=True)
    await running.watch.look(running.authority)
    second = running.authority.succession.pins[1]
    assert behind(relay_ca=first, certificate_ca=first)
    assert not behind(relay_ca=second, certificate_ca=first)
    await take_step(config, "activate", force=True)
    await running.watch.look(running.authority)
    assert behind(relay_ca=second, certificate_ca=first)
    assert not behind(relay_ca=second, certificate_ca=second)


async def test_relays_that_are_a_step_apart_reach_each_other(config: RelayConfig, running: Running) -> None:
    hops = Hops(Peers(), authority=running.authority, pumps=None)
    before = hops.server_context()
    await take_step(config, "next", force=True)
    await running.watch.look(running.authority)
    assert hops.server_context() is not before


class Peers:
    relay_id = "1"


def copy_of(authority: Authority) -> Authority:
    return Authority.load(authority.certificate_pem, authority.key_pem)


def der(pem: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem)


async def test_e14_a_flood_of_announcements_costs_the_relay_four_and_one_judgement_in_two_seconds(
    monkeypatch: pytest.MonkeyPatch, relay: Station
) -> None:
    assert (control.FOLLOW_PAUSE, ANNOUNCEMENTS) == (2.0, 4)
    monkeypatch.setattr(control, "FOLLOW_PAUSE", 3600.0)
    judged: list[str] = []
    read = Succession.read

    def counted(text: str, *, own: bool = False) -> Succession:
        judged.append(text)
        return read(text, own=own)

    monkeypatch.setattr(Succession, "read", counted)
    async with Agent(relay) as agent:
        (link,) = relay.fleet.links()
        assert isinstance(link, ControlConnection)
        for sent in (1, 10, 1000):
            for number in range(sent):
                agent.session.send(CaSuccession(f"# {number} of {sent}\n" + "x" * 100))
            await reported(agent, link, sent)
            await until(lambda: judged)
            assert len(judged) == 1
            assert len(link.announced) == (0 if sent == 1 else ANNOUNCEMENTS)
        assert link in relay.fleet.links()


class Follower(Agent):
    """An agent that keeps what the relay announces of its CAs."""

    cas = ""

    def succession_received(self, session: MuxSession, succession: CaSuccession) -> None:
        self.cas = succession.cas


async def test_agents_are_told_of_a_step_one_after_the_other(relay: Station) -> None:
    """Each renews then: all at once they would take the relay's loop, and wait for each other's durable writes."""
    async with contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(Follower(relay, instance=f"i{n}")) for n in range(4)]
        assert relay.control._pause == pytest.approx(3 / RelayLimitsConfig().agents_per_second)
        for step, pause in (("one", 3600.0), ("two", 0.0)):
            relay.control.cas = lambda step=step: CaSuccession(step)
            relay.control._pause = pause
            relay.control.announce()
            if pause:
                await until(lambda: any(one.cas for one in agents))
                assert sum(one.cas == step for one in agents) == 1
                relay.control._announcing.cancel()
                await asyncio.sleep(0)
            else:
                await until(lambda: all(one.cas == "two" for one in agents))


async def reported(agent: Agent, link: ControlConnection, sessions: int) -> None:
    """Have the relay read all that was sent before."""
    agent.session.send(Status(instance=agent.instance, ready=True, sessions=sessions))
    await until(lambda: link.report.sessions == sessions)


async def test_steps_are_acts_and_their_refusals_say_who_has_not_followed(
    config: RelayConfig, running: Running
) -> None:
    await enrol(config, "far")
    await take_step(config, "next", force=False)
    with pytest.raises(StateError):
        await take_step(config, "activate", force=False)
    await take_step(config, "activate", force=True)
    ends = [one for one in records(config.data_dir / "audit.jsonl") if one["stage"] == "ended"]
    assert [(one["act"], one["outcome"], one["arguments"]["force"]) for one in ends] == [
        ("ca next", "done", False),
        ("ca activate", "refused", False),
        ("ca activate", "done", True),
    ]
    assert {(one["by"], one["uid"]) for one in ends} == {("os", os.getuid())}
    assert "cluster far is not connected" in ends[1]["reason"]
    assert ends[0]["result"] == ends[2]["result"] == {"relay_ca_pin": open_authority(config.data_dir).pin}
    assert "PRIVATE" not in (config.data_dir / "audit.jsonl").read_text()


async def test_what_an_agent_announces_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "FOLLOW_PAUSE", 0.0)
    file, cluster_ca = tmp_path / "audit.jsonl", authority()
    made = Rotation(cluster_ca.certificate_pem, cluster_ca.key_pem).take("next", time.time())
    async with station(tmp_path, "prod") as relay, Agent(relay) as agent:
        relay.control.audit = audit = RelayAudit(str(file))
        agent.session.send(CaSuccession("# nothing"))
        agent.session.send(CaSuccession(made.succession, made.oldest))
        await until(lambda: audit.records == 2)
        audit.close()
    refused, done = records(file)
    assert (refused["act"], refused["outcome"]) == (done["act"], "refused") == ("cluster ca follow", "refused")
    assert "not a succession" in refused["reason"]
    assert (done["outcome"], done["by"], done["actor"]) == ("done", "agent", agent.instance)
    assert done["arguments"] == {"cluster": "prod", "cluster_ca_pin": made.list.pins[1]}
