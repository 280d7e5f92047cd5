"""Processes that start, end, come back and live side by side."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from arcbridge.errors import ExitCode
from arcbridge.pki.credentials import CERTIFICATE
from tests.support.cluster import Cluster
from tests.support.processes import ManagedProcess, run
from tests.support.reports import agent_again, until, wait_for_record
from tests.support.world import ALICE, CLUSTER, ApiServer, World, arcbridge

NAMESPACE = "lifecycle"


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation of this module's own, since its parts are stopped and started."""
    with World(api, directory=tmp_path_factory.mktemp("lifecycle")) as world:
        yield world.start()


@pytest.fixture(scope="module")
def pod(cluster: Cluster) -> Iterator[str]:
    cluster.add_pod("till", NAMESPACE)
    yield "till"
    cluster.delete_pod("till", NAMESPACE)


def relay_command(world: World, *words: str) -> str:
    return run(arcbridge("--role", "relay", *words, "--config", str(world.relay_config))).stdout.decode()


def listed(world: World) -> dict[str, dict[str, Any]]:
    """The clusters as the relay's operator sees them, by name."""
    return {row["name"]: row for row in json.loads(relay_command(world, "cluster", "list", "-o", "json"))}


def test_the_printed_command_starts_an_agent(world: World, tmp_path: Path) -> None:
    """As it is printed, in an empty directory of a machine that is no pod."""
    api = world.api
    flags = ("--kube-server", api.url, "--kube-ca-file", str(api.ca_file), "--kube-token-file", str(api.token_file))
    text = relay_command(world, "token", "create", "--cluster", "printed", *flags)
    *lines, last = text.partition("install.md#packages):\n")[2].split("\n  ")[1:]
    script = "\n".join([*lines, f"exec {last}"])
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with ManagedProcess(
        ["sh", "-ec", script], log_dir=world.logs, name="agent-printed", cwd=tmp_path, env=environment
    ) as agent:
        wait_for_record(agent, "control connection up")
        until(lambda: listed(world)["printed"]["agents"] == 1, "the relay has the agent")
        agent.signal(signal.SIGTERM)
        assert agent.wait(30) == 0


def test_the_list_of_clusters_says_at_once_that_an_agent_has_gone(world: World) -> None:
    """The operator's list and the user's say the same; what a program reads has times of RFC 3339."""
    moment = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    before = listed(world)[CLUSTER]
    assert all(re.fullmatch(moment, before[name]) for name in ("created", "last_seen", "certificate_expires"))
    assert (before["state"], before["agents"], before["revoked"], before["revoked_at"]) == ("Connected", 1, False, None)
    assert "labels" not in before
    (token, *_) = json.loads(relay_command(world, "token", "list", "-o", "json"))
    assert all(re.fullmatch(moment, token[name]) for name in ("created", "expires_at"))

    def gone() -> bool:
        rows = json.loads(world.run_client(ALICE, "clusters", "-o", "json", check=True).stdout)
        (shown,) = (row for row in rows if row["name"] == CLUSTER)
        return (listed(world)[CLUSTER]["state"], shown["state"], shown["agents"]) == ("Offline", "Offline", 0)

    assert world.agent.stop() == 0
    try:
        until(gone, "both lists say so")
        relay_command(world, "cluster", "revoke", CLUSTER)
        assert listed(world)[CLUSTER]["state"] == "Revoked"
        relay_command(world, "cluster", "restore", CLUSTER)
        assert gone()

        def missing() -> bool:
            done = world.run_client(ALICE, "run", "--", "true")
            return f'error: cluster "{CLUSTER}" has no connected agent' in done.stderr

        # A relay hears within seconds of what a command of its operator has changed.
        until(missing, "the user is told the same", timeout=30)
    finally:
        agent_again(world)


def test_sigterm_to_the_only_relay_lets_a_running_exec_finish(world: World, cluster: Cluster, pod: str) -> None:
    """The same of an agent is in test_reload.py."""
    client = world.start_client(ALICE)
    gate, relay = world.directory / "gate", world.relay
    os.mkfifo(gate)
    with cluster.kubectl_for(kubeconfig=client.kubeconfig).start(
        "exec", "-n", NAMESPACE, pod, "--", "sh", "-c", f"echo started; cat {gate}; echo finished; exit 4"
    ) as shell:
        shell.wait_for_line("started", stream="stdout")
        relay.signal(signal.SIGTERM)
        wait_for_record(relay, "relay stopping", step="draining")
        assert relay.running
        gate.write_text("go\n")
        assert shell.wait(20) == 4
        assert "finished" in shell.output("stdout")
    relay.signal(signal.SIGTERM)  # the session is idle now, which a relay cannot see
    assert relay.wait(10) == 0
    assert "Traceback" not in relay.output()
    world.start_relay()
    until(lambda: cluster.kubectl_for(kubeconfig=client.kubeconfig).works(), "kubectl works again", timeout=40)
    assert client.process.stop() == 0


def test_a_lapsed_agent_comes_back_with_a_join_token(
    api: ApiServer, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its certificate lived four seconds. The cluster is not made anew: its CA, and who trusts it, stay."""
    with World(api, directory=tmp_path_factory.mktemp("lapsed")) as world:
        world.start_issuer()
        world.relay_settings = "agent_certificate_life = 4"
        world.start_relay()
        # Nothing is asked of this agent but a credential: on a busy machine it may lapse before the agent is ready.
        agent = world.start_agent(wait=False)
        pin = wait_for_record(agent, "enrolled", timeout=30)["cluster_ca_pin"]
        agent.stop()
        state = json.loads((world.agent_config.parent / "state" / "credential.json").read_text())
        certificate = x509.load_pem_x509_certificate(base64.b64decode(state["data"][CERTIFICATE]))
        ends = certificate.not_valid_after_utc
        until(lambda: datetime.now(UTC) > ends, "the certificate has lapsed")
        world.stop_relay()
        world.relay_settings = ""
        world.start_relay()
        join_token = world.agent_config.parent / "join-token"
        join_token.unlink()
        again = agent_again(world, wait=False)
        assert again.wait() == ExitCode.USAGE
        (line,) = [line for line in again.output("stderr").splitlines() if line.startswith("error: ")]
        assert "certificate has lapsed" in line
        assert "make one with `arcbridge --role relay token create`" in line
        token, _ = world.join_token()
        join_token.write_text(token)
        back = agent_again(world)
        record = wait_for_record(back, "enrolled")
        assert record["cluster_ca_pin"] == pin
        client = world.start_client(ALICE)
        assert cluster.kubectl_for(kubeconfig=client.kubeconfig).works()
        client.process.stop()  # first: a relay waits for sessions
