"""Descriptors that go from one process to another over a Unix socket."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arcbridge.client.background import handover
from arcbridge.errors import StateError


def listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


def test_what_waits_at_a_listener_is_accepted_by_the_next_one(tmp_path: Path) -> None:
    former, following = socket.socketpair()
    control, first, second = listening(), listening(), listening()
    leash, far = socket.socketpair()
    lock = os.open(tmp_path, os.O_RDONLY)
    with former, following, control, first, second, leash, far, socket.create_connection(first.getsockname()) as caller:
        given = handover.Inheritance(
            control.fileno(),
            lock,
            [({"arguments": ["a"]}, [first.fileno(), second.fileno()]), ({"arguments": []}, [second.fileno()])],
            [leash.fileno()],
        )
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(handover.send, former, given)
            taken = handover.receive(following)
            sent.result()
        assert [(about["arguments"], len(sockets)) for about, sockets in taken.clusters] == [(["a"], 2), ([], 1)]
        assert os.fstat(taken.lock).st_ino == tmp_path.stat().st_ino
        with socket.socket(fileno=taken.clusters[0][1][0]) as again, socket.socket(fileno=taken.leashes[0]) as kept:
            connection, _ = again.accept()
            caller.sendall(b"x")
            assert connection.recv(1) == b"x"
            connection.close()
            kept.sendall(handover.END)
            assert far.recv(10) == handover.END
        for descriptor in (lock, taken.control, taken.lock, taken.clusters[0][1][1], taken.clusters[1][1][0]):
            os.close(descriptor)


@pytest.mark.parametrize(
    "line",
    [
        b'{"clusters": [{}], "leashes": 0}',
        b'{"clusters": [], "leashes": 1}',
        b'{"clusters": [], "leashes": "x"}',
        b"{}",
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_hand_over_that_breaks_off_leaves_no_descriptor(line: bytes, count: int) -> None:
    former, following = socket.socketpair()
    with following:
        with former:
            former.sendall(line + b"\n")
            socket.send_fds(former, [b"+"], [0] * count)
        before = os.listdir("/proc/self/fd")
        with pytest.raises((OSError, StateError)):
            handover.receive(following)
        assert os.listdir("/proc/self/fd") == before


def test_without_an_answer_nothing_is_given_away(tmp_path: Path) -> None:
    former, following = socket.socketpair()
    with listening() as control, former:
        lock = os.open(tmp_path, os.O_RDONLY)
        following.close()
        with pytest.raises((OSError, StateError)):
            handover.send(former, handover.Inheritance(control.fileno(), lock))
        assert control.fileno() >= 0
        os.close(lock)


@pytest.mark.parametrize("line", [b'{"error": "no"}\n', b"[]\n", b"not json\n", b""])
def test_a_former_process_that_does_not_hand_over(line: bytes) -> None:
    former, following = socket.socketpair()
    with former, following:
        former.sendall(line)
        former.shutdown(socket.SHUT_WR)
        with pytest.raises(StateError):
            handover.receive(following)
