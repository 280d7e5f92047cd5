"""TCP targets through `forward`: bytes, half-close, refusals."""

from __future__ import annotations

import hashlib
import os
import socket
from typing import Any

import pytest

from arcbridge.errors import ExitCode
from tests.e2e.test_upgrades import exchange
from tests.support.reports import until
from tests.support.world import ALICE, BOB, CLUSTER, User, World


@pytest.fixture(scope="module")
def port(world: World) -> int:
    """The local end of a forward to the echo server."""
    return world.start_forward("echo")[1]


def test_bytes_pass_both_ways_and_half_close_passes(port: int) -> None:
    data = os.urandom(5_000_000)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        assert hashlib.sha256(exchange(sock, data)).digest() == hashlib.sha256(data).digest()


def test_many_connections_share_one_session(port: int, world: World) -> None:
    earlier = {record["request"] for record in world.audit_records()}
    socks = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(50)]
    for index, sock in enumerate(socks):
        sock.sendall(f"hello {index}".encode())
    for index, sock in enumerate(socks):
        wanted = f"hello {index}".encode()
        assert sock.recv(len(wanted), socket.MSG_WAITALL) == wanted
        sock.close()

    def recorded() -> list[dict[str, Any]]:
        ours = [record for record in world.audit_records() if record.get("target") == "tcp:echo"]
        return [record for record in ours if record["request"] not in earlier]

    until(lambda: len(recorded()) >= len(socks), "the agent has recorded each")
    assert len({record["session"] for record in recorded()}) == 1
    assert {(record["user"], record["bytes_up"] > 0) for record in recorded()} == {(ALICE.email, True)}


@pytest.mark.parametrize(
    ("user", "target", "there"),
    [(ALICE, "nosuch", "you may use closed, echo"), (BOB, "echo", "there is none for you")],
    ids=["none of this name", "none for this user"],
)
def test_a_target_that_is_none_is_said_before_a_port_is_served(
    world: World, user: User, target: str, there: str
) -> None:
    done = world.run_client(user, "forward", target)
    assert (done.returncode, done.stdout) == (ExitCode.DENIED, "")
    assert done.stderr.splitlines()[-1] == (
        f'error: the agent of cluster "{CLUSTER}" has no target {target!r} for you; {there} ([targets] in its settings)'
    )


def test_a_target_that_is_down_resets_the_connection(world: World) -> None:
    process, port = world.start_forward("closed")
    # The reset may come while `connect` still waits for the handshake's end.
    with pytest.raises(ConnectionResetError), socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.recv(1)
    process.wait_for_line("the agent cannot connect to 'closed'", stream="stderr")
