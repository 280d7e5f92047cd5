"""Two teams administer their own clusters over HTTPS: real processes, a relay of two workers, tokens of the issuer."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.errors import ExitCode
from tests.support.processes import run
from tests.support.reports import agent_again, rewrite, until, wait_for_record
from tests.support.targets import EchoServer
from tests.support.world import ALICE, MALLORY, ApiServer, User, World, arcbridge, fixed_port

SHOP, BANK = User("sam", ("shop-operators",)), User("bea", ("bank-operators",))
RULES = '[[allow]]\ngroups = ["platform"]\nclusters = ["*"]\n'
TEAM = """
[[admin]]
groups = ["{0}-operators"]
clusters = ["{0}-*"]
what = ["tokens", "sessions", "revocations"]
"""
REFUSED = "you may not do this, or there is no such thing"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "unused-token").write_text("an-unused-token")
    api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=tmp_path / "unused-token")
    with EchoServer() as echo, World(api, cluster="shop-1", directory=tmp_path / "world", agents=2) as world:
        world.agent_clusters[1] = "bank-1"
        world.targets["echo"] = (echo.address, ALICE.groups)
        world.relay_settings = "workers = 2"
        world.policy = RULES + TEAM.format("shop") + TEAM.format("bank")
        yield world.start()


def admin(world: World, user: User, *words: str) -> subprocess.CompletedProcess[str]:
    return world.run_client(user, "admin", *words)


def rows(world: World, user: User, *words: str) -> list[dict[str, object]]:
    done = admin(world, user, *words, "-o", "json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def refused(world: World, user: User, *words: str, why: str = REFUSED) -> bool:
    done = admin(world, user, *words)
    return done.returncode == ExitCode.DENIED and why in done.stderr and not done.stdout


@pytest.mark.timeout(600)
def test_each_team_runs_its_own_clusters_and_no_other(world: World, tmp_path: Path) -> None:
    """docs/threats.md#K5 and #K7."""
    sockets = {}
    for cluster in ("shop-1", "bank-1"):
        world.cluster = cluster
        _, port = world.start_forward("echo")
        sockets[cluster] = socket.create_connection(("127.0.0.1", port), timeout=60)
        sockets[cluster].sendall(b"x")
        assert sockets[cluster].recv(1) == b"x"

    # Each worker answers for both: several connections, of which the kernel chooses the worker.
    for user, cluster in ((SHOP, "shop-1"), (BANK, "bank-1")) * 3:
        (session,) = rows(world, user, "session", "list")
        assert (session["cluster"], session["user"]) == (cluster, ALICE.email)
        (found,) = rows(world, user, "cluster", "list")
        assert (found["name"], found["state"], found["agents"]) == (cluster, "Connected", 1)
    assert "ROUND TRIP" in admin(world, SHOP, "cluster", "list", "-o", "wide").stdout

    # A session.
    (session,) = rows(world, SHOP, "session", "list")
    assert refused(world, BANK, "session", "end", str(session["session"]))
    ended = admin(world, SHOP, "session", "end", str(session["session"]), "--reason", "maintenance")
    assert ended.stdout == f"session {session['session']} of {ALICE.email} with cluster shop-1 ends within seconds\n"
    sockets["shop-1"].settimeout(30)
    with contextlib.suppress(ConnectionError):
        assert sockets["shop-1"].recv(1) == b""

    # A join token, with which a cluster enrols.
    mark = world.relay.mark()
    made = json.loads(admin(world, SHOP, "token", "create", "--cluster", "shop-2", "-o", "json").stdout)
    assert "--set relayCAPin=" + world.relay_pin in made["command"]
    act = wait_for_record(world.relay, "administrator's command", after=mark, command="token create")
    assert (act["user"], act["outcome"]) == (SHOP.email, "done")
    assert act["arguments"]["cluster"] == "shop-2"
    (tmp_path / "join").write_text(made["token"])
    flags = ["--relay", world.relay_url, "--relay-ca-pin", made["relay_ca_pin"], "--state-dir", str(tmp_path / "new")]
    config = world.agent_config.with_name("enrol.toml")
    config.write_text("")
    run(
        arcbridge("--role", "agent", "enroll", "--config", str(config), *flags, "--join-token-file", f"{tmp_path}/join")
    )
    assert [row["name"] for row in rows(world, SHOP, "cluster", "list")] == ["shop-1", "shop-2"]
    assert [row["state"] for row in rows(world, SHOP, "token", "list")] == ["used up", "used up"]
    assert refused(world, BANK, "token", "create", "--cluster", "shop-3")
    assert refused(world, BANK, "token", "delete", made["id"])
    assert admin(world, SHOP, "token", "delete", made["id"]).stdout.startswith(f"join token {made['id']} is deleted")

    # A cluster is shut out and comes back.
    assert refused(world, BANK, "cluster", "revoke", "shop-1")
    assert "is revoked" in admin(world, SHOP, "cluster", "revoke", "shop-1").stdout
    world.agent.wait_for_line("revoked", timeout=30)
    assert [row["state"] for row in rows(world, SHOP, "cluster", "list")] == ["Revoked", "Connecting"]
    assert "is restored" in admin(world, SHOP, "cluster", "restore", "shop-1").stdout
    world.agent.kill()  # it would come back within a minute
    agent_again(world, wait=False)
    until(lambda: rows(world, SHOP, "cluster", "list")[0]["state"] == "Connected", "the cluster comes back", timeout=60)
    assert "is forgotten" in admin(world, SHOP, "cluster", "delete", "shop-2").stdout

    # What is the whole relay's, and who administers nothing.
    assert refused(world, SHOP, "user", "revoke", ALICE.email)
    assert refused(world, SHOP, "policy", "list")
    assert refused(world, MALLORY, "cluster", "list")
    mistake = admin(world, SHOP, "cluster", "revoke", "Shop")
    assert (mistake.returncode, "cluster name" in mistake.stderr) == (ExitCode.USAGE, True)
    log = "".join(path.read_text() for path in world.logs.glob("relay*"))
    assert made["token"].partition(".")[2] not in log
    assert made["id"] in log

    # A right ends at once: by a revocation, and by the policy.
    command = ("--role", "relay", "user", "revoke", SHOP.email, "--before", "2099-01-01", "--reason", "left")
    run(arcbridge(*command, "--config", str(world.relay_config)))
    until(lambda: refused(world, SHOP, "cluster", "list", why="(left)"), "a revoked administrator is refused")
    assert rows(world, BANK, "cluster", "list")
    rewrite(world.relay_config.parent / "policy.toml", RULES)
    wait_for_record(world.relay, "policy taken over", after=mark)
    until(lambda: refused(world, BANK, "cluster", "list"), "who is an administrator no more is refused", timeout=20)
    assert sockets["bank-1"].send(b"y") == 1, "its own session goes on"
    assert sockets["bank-1"].recv(1) == b"y"
    for sock in sockets.values():
        sock.close()
