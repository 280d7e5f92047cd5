"""Who is at the other end of a loopback connection, asked of a real kernel about processes of real users."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.net import peer_user
from tests.support.second_user import OTHER, OWNER, as_user, require_users

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LEFT OUT: the kernel of Linux is asked")

SERVER = """
import os, socket, sys
from arcbridge.net import peer_user
table = sys.argv[2] == "table"
if table:
    peer_user._by_netlink = lambda *_: (False, 0)
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family) as listening:
    listening.bind((sys.argv[1], 0))
    listening.listen()
    print(listening.getsockname()[1], flush=True)
    while True:
        sock, _ = listening.accept()
        if sock.recv(1) == b"q":
            break
        print(peer_user.peer_user(sock), flush=True)
        sock.close()
"""
CALLER = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as sock:
    sock.sendall(b"x")
    if sys.argv[3] == "half":
        sock.shutdown(socket.SHUT_WR)
    if sys.argv[3] != "gone":
        sock.recv(1)
"""


@pytest.fixture(params=["127.0.0.1 netlink", "127.0.0.1 table", "::1 netlink", "::1 table"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """Address and port of a server of one user, and the server, which prints what it finds about each caller."""
    require_users()
    host, way = request.param.split()
    if ":" in host and not Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 loopback")
    process = subprocess.Popen(
        [*as_user(OWNER), sys.executable, "-c", SERVER, host, way],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    port = process.stdout.readline().strip()
    yield host, port, process
    with socket.create_connection((host, int(port))) as last:
        last.sendall(b"q")
    assert process.wait(30) == 0


def called(server: tuple[str, str, subprocess.Popen[str]], prefix: tuple[str, ...], how: str) -> str:
    host, port, process = server
    subprocess.run([*prefix, sys.executable, "-c", CALLER, host, port, how], check=True, timeout=30)
    return process.stdout.readline().strip()


def test_w12_processes_of_three_users(server: tuple[str, str, subprocess.Popen[str]]) -> None:
    for how in ("waits", "half"):
        assert called(server, as_user(OWNER), how) == "own"
        assert called(server, as_user(OTHER), how) == "other"
        assert called(server, (), how) == "own", "root"


def test_w12_one_that_has_closed_already_is_told_apart(server: tuple[str, str, subprocess.Popen[str]]) -> None:
    """The kernel would say root, whichever user it was."""
    host, port, process = server
    assert process.stdout is not None
    process.send_signal(19)  # SIGSTOP: the caller is gone when the server looks
    subprocess.run([*as_user(OTHER), sys.executable, "-c", CALLER, host, port, "gone"], check=True, timeout=30)
    process.send_signal(18)
    assert process.stdout.readline().strip() == "gone"


def test_another_machine_is_no_user_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OWNER)
    monkeypatch.setattr(peer_user, "_by_netlink", lambda *_: (True, OTHER))

    class Far:
        family = socket.AF_INET

        def getsockname(self) -> tuple[str, int]:
            return "192.0.2.1", 1

        def getpeername(self) -> tuple[str, int]:
            return "192.0.2.2", 2

    assert peer_user.peer_user(Far()) is peer_user.PeerUser.OWN
