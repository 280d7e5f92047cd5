"""A relay of two processes: joins handed over, a worker killed, counts that add up, one token, the drain."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.identity.proof import ProofKey
from arcbridge.pki.private_files import write_private
from tests.support.processes import run
from tests.support.reports import metrics, page, records, until, wait_for_record
from tests.support.talk import Talk, TalkServer
from tests.support.world import ALICE, BOB, CLUSTER_AUDIENCE, RELAY_AUDIENCE, ApiServer, World, arcbridge, fixed_port

RELAY = "arcbridge_relay_"


@pytest.fixture(scope="module")
def world(server: TalkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("workers")
    (directory / "token").write_text("an-unused-token")
    api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=directory / "token")
    with World(api, directory=directory / "world", agents=2) as world:
        world.relay_settings = "workers = 2"
        world.targets["talk"] = (server.address, (*ALICE.groups, *BOB.groups))
        world.start()
        until(lambda: counted(world)["agents"] == 2, "both agents are there")
        yield world


def counted(world: World) -> dict[str, float]:
    return {name.removeprefix(RELAY): value for name, value in metrics(world.relay_observe).items()}


def workers(world: World) -> dict[int, int]:
    """The process of each worker, by its index: those that are told apart by their command line."""
    found = {}
    for one in Path(f"/proc/{world.relay.pid}/task/{world.relay.pid}/children").read_text().split():
        words = Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")
        if b"arcbridge-relay-worker" in words:
            found[int(words[words.index(b"arcbridge-relay-worker") + 1])] = int(one)
    return found


def command(world: World, *words: str) -> None:
    """Run an operator's command on the relay's machine."""
    run(arcbridge("--role", "relay", *words, "--config", str(world.relay_config)))


def test_client_and_agent_at_different_workers(world: World, server: TalkServer) -> None:
    """The kernel chooses a worker for each connection; within a few sessions both kinds of crossing have happened."""
    for number in range(20):
        _, port = world.start_forward("talk")
        talk = Talk(port, number, pause=0.002)
        talk.wait_moves(50_000)
        server.check(talk)
        seen = counted(world)
        if seen['handovers_total{result="joined"}'] and seen["worker_dials_total"]:
            break
    assert seen['handovers_total{result="joined"}'] >= 1
    assert seen["worker_dials_total"] >= 1

    def added_up() -> bool:
        """The counts of both processes add up to the relay's; those of a busy worker may be a second old."""
        now = counted(world)
        both = now['worker_sessions{worker="0"}'] + now['worker_sessions{worker="1"}']
        counts = {now["pumps_open"], both, now['joins_total{result="ok"}'], now["pumps_total"]}
        return counts == {number + 1} and now['handovers_total{result="failed"}'] == 0

    until(added_up, f"{number + 1} sessions are counted, and no hand-over that failed")
    assert (seen["agents"], seen["workers"], seen["workers_serving"], seen["ready"]) == (2, 2, 2, 1)


def test_t30_a_bound_token_is_proved_at_either_worker(world: World, server: TalkServer, tmp_path: Path) -> None:
    """Each worker shows a certificate of its own, and a proof names the one that the client has seen."""
    key = ProofKey.generate()
    write_private(tmp_path / "key", key.to_jwk())
    (tmp_path / "client.toml").write_text('[login]\nproof_key_file = "key"\n')
    for name, audience in (("access", RELAY_AUDIENCE), ("id", CLUSTER_AUDIENCE)):
        token = world.issuer.mint(
            sub=ALICE.name, aud=[audience, key.audience()], groups=list(ALICE.groups), email=ALICE.email
        )
        (tmp_path / name).write_text(token)
    files = ("--access-token-file", str(tmp_path / "access"), "--id-token-file", str(tmp_path / "id"))
    mark, before, forwards = world.relay.mark(), counted(world), []
    while {one["worker"] for one in records(world.relay, "joined", after=mark, bound="audience")} != {0, 1}:
        assert len(forwards) < 20
        process, port = world.start_forward("talk", ALICE, "--config", str(tmp_path / "client.toml"), *files)
        forwards.append(process)
        talk = Talk(port, 50 + len(forwards), pause=0.002)
        talk.wait_moves(20_000)
        server.check(talk)
        talk.close()
    name = 'tokens_accepted_total{bound="audience"}'
    until(lambda: counted(world)[name] == len(forwards), "each was accepted once")
    seen = counted(world)
    assert sum(value for name, value in seen.items() if name.startswith("proofs_refused_total")) == 0
    for process in forwards:
        process.stop()
    until(lambda: counted(world)["pumps_open"] == before["pumps_open"], "the sessions have ended")


def sessions(world: World) -> list[dict[str, object]]:
    """What `session list` shows."""
    listed = run(arcbridge("--role", "relay", "session", "list", "-o", "json", "--config", str(world.relay_config)))
    found: list[dict[str, object]] = json.loads(listed.stdout)
    return found


def test_one_session_is_ended_at_whichever_worker_has_it(world: World, server: TalkServer) -> None:
    """`session end` reaches every worker, and the agent is told: the client does not resume."""
    for number in (300, 301):
        process, port = world.start_forward("talk", BOB)
        talk = Talk(port, number, pause=0.002)
        talk.wait_moves(20_000)
        (found,) = [one for one in sessions(world) if one["user"] == BOB.email]
        command(world, "session", "end", str(found["session"]), "--reason", "maintenance tonight")
        talk.wait_end(timeout=10)
        process.wait_for_line("maintenance tonight", timeout=15)
        until(lambda: not [one for one in sessions(world) if one["user"] == BOB.email], "it is gone")
        process.stop()


def test_a_killed_worker(world: World, server: TalkServer) -> None:
    """A killed worker's sessions resume at the other one, it is started again, and its counts are kept."""
    before, talks = counted(world), list[Talk]()
    # Sessions of clients that have just ended may still be there, and do not come back.
    earlier = {one["session"] for one in sessions(world)}
    while {one["worker"] for one in sessions(world) if one["session"] not in earlier} != {0, 1}:
        _, port = world.start_forward("talk")
        talks.append(Talk(port, 100 + len(talks), pause=0.002))
        talks[-1].wait_moves(20_000)

    def as_counted() -> list[dict[str, object]]:
        """The sessions, once as many are counted: the former is asked for now, the latter may be a second old."""
        found = sessions(world)
        return found if len(found) == counted(world)["pumps_open"] else []

    listed = until(as_counted, "as many sessions are listed as are counted", timeout=60)
    assert {one["worker"] for one in listed} == {0, 1}
    assert {one["user"] for one in listed} == {ALICE.email}
    mark = world.relay.mark()
    victim = workers(world)[0]
    os.kill(victim, signal.SIGKILL)
    for talk in talks:
        talk.wait_moves(50_000)
    for talk in talks:
        server.check(talk)
    until(lambda: counted(world)["workers_serving"] == 2, "the worker is back", timeout=60)
    # What was resumed has another id, and says under which one it began.
    resumed = until(lambda: {one["first_session"] for one in sessions(world)} - {""}, "sessions are resumed")
    assert resumed <= {one["session"] for one in listed}
    after = counted(world)
    assert after["worker_restarts_total"] == before["worker_restarts_total"] + 1
    wait_for_record(world.relay, "worker died", after=mark)
    assert after['joins_total{result="ok"}'] >= before['joins_total{result="ok"}']
    assert workers(world)[0] != victim
    (died,) = records(world.relay, "worker died", after=mark)
    assert (died["index"], died["pid"], died["reason"]) == (0, victim, "signal SIGKILL")
    assert page(world.relay_observe, "/readyz") == "ok\n"
