"""Descriptors that go from one process to another over a Unix socket."""

from __future__ import annotations

import os
import socket
import threading
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
    control, lock, first, second = listening(), os.open(tmp_path, os.O_RDONLY), listening(), listening()
    leash, far = socket.socketpair()
    caller = socket.create_connection(first.getsockname())
    given = handover.Inheritance(
        control.fileno(),
        lock,
        [
            ({"arguments": ["--cluster", "a"]}, [first.fileno(), second.fileno()]),
            ({"arguments": []}, [second.fileno()]),
        ],
        [leash.fileno()],
    )
    errors: list[BaseException] = []

    def hand_over() -> None:
        try:
            handover.send(former, given)
        except BaseException as error:
            errors.append(error)
        for sock in (control, first, second, leash):
            sock.close()
        os.close(lock)

    thread = threading.Thread(target=hand_over)
    thread.start()
    taken = handover.receive(following)
    thread.join()
    assert errors == []
    assert [about["arguments"] for about, _ in taken.clusters] == [["--cluster", "a"], []]
    with socket.socket(fileno=taken.clusters[0][1][0]) as again:
        connection, _ = again.accept()
        caller.sendall(b"x")
        assert connection.recv(1) == b"x"
        connection.close()
    assert os.fstat(taken.lock).st_ino == tmp_path.stat().st_ino
    with socket.socket(fileno=taken.leashes[0]) as kept:
        kept.sendall(handover.END)
        assert far.recv(10) == handover.END
    for descriptor in (taken.control, taken.lock, taken.clusters[0][1][1], taken.clusters[1][1][0]):
        os.close(descriptor)
    for sock in (former, following, caller, far):
        sock.close()


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
