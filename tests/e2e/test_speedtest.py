"""`speedtest` against a real API server: it measures something, and says what."""

from __future__ import annotations

import json

from tests.support.world import ALICE, World


def test_a_measurement(world: World) -> None:
    done = world.run_client(ALICE, "speedtest", world.cluster, "--seconds", "1", "-o", "json", check=True)
    found = json.loads(done.stdout)
    assert (found["cluster"], found["relay"]["address"]) == (world.cluster, world.client_routes[0])
    for hop in ("relay", "agent", "api_server"):
        assert found[hop]["round_trip"] > 0
    reading = found["from_cluster"]
    assert (reading["path"], reading["not_measured"]) == ("/openapi/v2", "")
    assert reading["bytes"] > 1_000_000
    assert reading["seconds"] >= 1
    assert found["to_cluster"]["not_measured"]


def test_a_cluster_is_needed_and_must_be_there(world: World) -> None:
    done = world.run_client(ALICE, "speedtest", "no-such-cluster")
    assert done.returncode == 3
    assert "does not exist or you may not reach it" in done.stderr
    assert world.run_client(ALICE, "speedtest", "--seconds", "0").returncode == 2
