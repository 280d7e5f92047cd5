"""A policy that is valid and not meant: real processes, an emptied file, and the operator's command."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support.cluster import KUBECTL_MINORS, Cluster
from tests.support.processes import run
from tests.support.reports import metrics, rewrite, until, wait_for_record
from tests.support.world import ALICE, ApiServer, World, arcbridge


def policy(world: World, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run one of the operator's commands about the policy."""
    return run([*arcbridge("--role", "relay", "policy", *words, "--config", str(world.relay_config))], check=False)


@pytest.mark.timeout(300)
def test_an_emptied_policy_cuts_nobody_until_it_is_accepted(api: ApiServer, cluster: Cluster) -> None:
    """docs/threats.md#V19. With two workers, of which each holds it back and one command accepts it at both."""
    with World(api) as world:
        world.relay_settings = "workers = 2"
        world.start()
        client = world.start_client(ALICE)
        kubectl = cluster.kubectl_for(KUBECTL_MINORS[0], client.kubeconfig)
        kubectl.run("get", "namespace", "default")
        file = world.relay_config.parent / "policy.toml"
        mark = world.relay.mark()
        rewrite(file, "# everything was deleted\n")
        held = wait_for_record(world.relay, "policy held back", after=mark)
        assert (held["level"], held["users_lost"]) == ("error", held["sessions_lost"])
        assert "it has no rule" in held["reason"]
        kubectl.run("get", "namespace", "default")

        def listed() -> list[dict[str, object]]:
            return list(json.loads(policy(world, "list", "-o", "json").stdout))

        until(lambda: [row["held"] for row in listed()] == [held["hash"]] * 2, "both workers hold it back")
        until(
            lambda: metrics(world.relay_observe)['arcbridge_relay_check_ok{check="policy"}'] == 0,
            "the metric says so",
            timeout=30,
        )
        refused = policy(world, "accept", "0" * 12)
        assert refused.returncode
        assert b"is held back: 'policy list' shows what is in force" in refused.stderr
        accepted = policy(world, "accept", str(held["hash"]))
        assert accepted.stdout.decode() == f"version {held['hash']} of the policy counts from now on\n"
        taken = wait_for_record(world.relay, "policy taken over", after=mark)
        assert (taken["hash"], taken["rules"]) == (held["hash"], 0)
        wait_for_record(world.relay, "sessions cut off", after=mark)
        assert [row["held"] for row in listed()] == ["", ""]
