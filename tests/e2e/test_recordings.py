"""Recorded sessions before a real API server: relays and the agent are killed, and an auditor follows the how-to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.recording.keys import RECIPIENT, events_of, output_of
from tests.e2e.test_survival_kubectl import BACK, Ticks, pumping
from tests.readme.blocks import Block, blocks
from tests.readme.machines import ROOT, Machines
from tests.sealing.keys import X25519_IDENTITY
from tests.support.cluster import KUBECTL_MINORS, Cluster, Kubectl, kubectl_binary
from tests.support.processes import ManagedProcess, run
from tests.support.reports import agent_again, until, wait_for_record
from tests.support.world import ALICE, ApiServer, Client, World, arcbridge

PAGE = ROOT / "docs" / "how-to" / "recordings.md"
NAMESPACE = "production"
EXAMPLE = re.compile(r'"age1[^"]+"')


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two relays, and an agent with the settings of the page."""
    (settings,) = (block.text for block in blocks(PAGE) if "[recording]" in block.text)
    settings = EXAMPLE.sub(f'"{RECIPIENT}"', settings).replace("/var/lib/arcbridge-recordings", "recordings")
    with World(api, cluster="berlin", directory=tmp_path_factory.mktemp("recorded"), relays=2) as world:
        world.agent_audit = settings
        yield world.start()


@pytest.fixture(scope="module")
def alice(world: World) -> Client:
    return world.start_client(ALICE)


@pytest.fixture(scope="module")
def kubectl(cluster: Cluster, alice: Client) -> Kubectl:
    return cluster.kubectl_for(KUBECTL_MINORS[0], alice.kubeconfig)


@pytest.fixture(scope="module")
def pod(cluster: Cluster) -> Iterator[str]:
    cluster.add_pod("web", NAMESPACE)
    yield "web"
    cluster.delete_pod("web", NAMESPACE)


def recorded(world: World, count: int) -> list[dict[str, object]]:
    """The index, once it has so many recordings."""

    def look() -> list[dict[str, object]]:
        found = [one for one in world.audit_lines() if one.get("stage") == "recorded"]
        return found if len(found) >= count else []

    return until(look, f"{count} recordings are in the audit log", timeout=30)


def newest(world: World) -> tuple[dict[str, object], Path]:
    before = len([one for one in world.audit_lines() if one.get("stage") == "recorded"])
    index = recorded(world, max(1, before))[-1]["recording"]
    assert isinstance(index, dict)
    path = world.agent_config.parent / "recordings" / str(index["file"])
    until(path.exists, "the file has its name, which it gets behind its record")
    return index, path


def shell_of(kubectl: Kubectl, pod: str, stop: Path) -> ManagedProcess:
    """A shell on a terminal that counts until `stop` is there."""
    shell = kubectl.start("exec", "-it", "-n", NAMESPACE, pod, "--", "sh", terminal=(24, 80))
    shell.send(f"stty -echo; STOP={stop}; {Ticks.SCRIPT}; exit 3\n")
    return shell


@pytest.mark.timeout(300)  # on a busy machine
def test_six_relays_are_killed_and_the_recording_is_what_the_terminal_has(
    world: World, alice: Client, kubectl: Kubectl, pod: str, tmp_path: Path
) -> None:
    shell = shell_of(kubectl, pod, tmp_path / "stop")
    ticks = Ticks(shell)
    ticks.wait_moves()
    for _ in range(6):
        (relay,) = until(lambda: pumping(world), "the session has a relay")
        mark = alice.process.mark()
        world.kill_relay(relay)
        wait_for_record(alice.process, BACK, after=mark, timeout=60)
        world.start_relay(relay)
    ticks.wait_moves()
    (tmp_path / "stop").touch()
    ticks.check()
    assert shell.wait(30) == 3
    recorded(world, 1)
    index, path = newest(world)
    assert index["exit"] == 3
    assert output_of(path).decode().replace("\r\n", "\n") in shell.output("stdout")
    assert "this session is recorded" in shell.output("stdout")
    assert ("r", b"80x24") in events_of(path)


def test_a_killed_agent_loses_a_second_at_most_and_the_file_says_that_it_broke_off(
    world: World, kubectl: Kubectl, pod: str, tmp_path: Path
) -> None:
    shell = shell_of(kubectl, pod, tmp_path / "stop")
    Ticks(shell).wait_moves()
    until(lambda: "tick-60" in shell.output("stdout"), "three seconds have passed", timeout=60)
    count = len([one for one in world.audit_lines() if one.get("stage") == "recorded"])
    world.agent.kill()
    agent_again(world)
    shell.wait(60)  # its client hears from the next agent that the session is gone
    (tmp_path / "stop").touch()
    recorded(world, count + 1)
    index, path = newest(world)
    assert index["failure"] == "the agent ended"
    shown = re.findall(r"tick-(\d+)", shell.output("stdout"))
    kept = re.findall(rb"tick-(\d+)", output_of(path))
    assert [int(one) for one in kept] == list(range(len(kept)))
    # Twenty in a second; as many again for a machine on which the agent's timer and its disk were late.
    assert len(shown) - len(kept) <= 40
    key = tmp_path / "key"
    key.write_text(X25519_IDENTITY)
    done = run(arcbridge("recording", "open", "--identity", str(key), "--text", str(path)), check=False)
    assert done.returncode == 1
    assert b"the recording broke off here: the agent ended" in done.stdout
    assert b"broke off" in done.stderr


def test_spdy_is_refused_with_a_sentence_and_another_namespace_is_not_recorded(
    world: World, kubectl: Kubectl, cluster: Cluster, pod: str
) -> None:
    spdy = {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false"}
    done = kubectl.run("exec", "-n", NAMESPACE, pod, "--", "true", env=spdy, check=False)
    assert done.returncode != 0
    assert "this session has to be recorded, and a recording needs WebSocket" in done.stderr
    cluster.add_pod("other", "default")
    try:
        done = kubectl.run("exec", "-n", "default", "other", "--", "true", env=spdy)
        assert "recorded" not in done.stderr
    finally:
        cluster.delete_pod("other", "default")


def test_an_auditor_follows_the_page(world: World, pod: str, tmp_path: Path) -> None:
    """docs/how-to/recordings.md, on a workstation that is logged in and on the auditor's machine."""
    login = world.client_environment(ALICE, tmp_path)
    with Machines(
        tmp_path,
        kubectl_binary("1.36"),
        dialled="workstation",
        replaced={},
        names=("workstation", "auditor"),
        environment=login,
    ) as machines:
        desk = machines.at("auditor")
        (desk / "auditor.key").write_text(X25519_IDENTITY)
        (desk / "audit.jsonl").symlink_to(world.audit_log)
        (desk / "recordings").symlink_to(world.agent_config.parent / "recordings")
        count = len([one for one in world.audit_lines() if one.get("stage") == "recorded"])
        try:
            for block in blocks(PAGE):
                machines.run(block)
                if "kubectl exec" in block.text:
                    recorded(world, count + 1)
        finally:
            machines.run(Block("the end", 0, "run", "arcbridge stop", "workstation"))
    index, _ = newest(world)
    assert json.dumps(index).count("sha256") == 1
