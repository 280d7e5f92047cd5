"""The fault proxy does what its plan says, and only that."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.fault_proxy import Direction, FaultProxy, How, Plan
from tests.support.world import fixed_port


class Ends:
    """A listening target: a test holds both ends of a connection through the proxy."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.target = ("127.0.0.1", int(self._listening.getsockname()[1]))
        self._socks: list[socket.socket] = []

    def connect(self, proxy: FaultProxy) -> tuple[socket.socket, socket.socket]:
        """Connect through the proxy; return the dialling end and the target's end."""
        near = socket.create_connection((proxy.host, proxy.port), timeout=10)
        self._listening.settimeout(10)
        far, _ = self._listening.accept()
        far.settimeout(10)
        self._socks += [near, far]
        return near, far

    def close(self) -> None:
        for sock in [self._listening, *self._socks]:
            sock.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def sides(pair: tuple[socket.socket, socket.socket], direction: Direction) -> tuple[socket.socket, socket.socket]:
    """Source and sink of a direction."""
    near, far = pair
    return (near, far) if direction == "up" else (far, near)


def read_all(sock: socket.socket) -> tuple[bytes, str]:
    """Read until the end; return the bytes and whether a FIN or a RST ended them."""
    received = bytearray()
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        return bytes(received), "rst"
    return bytes(received), "fin"


def exactly(sock: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count and (data := sock.recv(count - len(received))):
        received += data
    return bytes(received)


def test_without_a_plan_every_byte_and_both_ends_pass(ends: Ends) -> None:
    data = os.urandom(3_000_000)
    with FaultProxy(ends.target) as proxy:
        near, far = ends.connect(proxy)

        def send() -> None:
            near.sendall(data)
            near.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert read_all(far) == (data, "fin")
        sender.join()
        far.sendall(b"after the half-close")
        far.close()
        assert read_all(near) == (b"after the half-close", "fin")
        proxy.wait(lambda: proxy.passages[0].end)
        passage = proxy.passages[0]
        assert (passage.up, passage.down, passage.open, passage.end) == (len(data), 20, False, "both ended")


def test_a_reset_passes_as_a_reset(ends: Ends) -> None:
    with FaultProxy(ends.target) as proxy:
        near, far = ends.connect(proxy)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        near.close()
        assert read_all(far) == (b"", "rst")


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("at", [0, 1, 17, 100_000])
def test_a_cut_is_at_its_byte_and_ends_both_sides(ends: Ends, direction: Direction, how: How, at: int) -> None:
    plan = Plan(cut_up=at, how=how) if direction == "up" else Plan(cut_down=at, how=how)
    data = os.urandom(at + 50)
    with FaultProxy(ends.target, plan=lambda number: plan) as proxy:
        source, sink = sides(ends.connect(proxy), direction)
        source.sendall(data)
        got, end = read_all(sink)
        assert end == how
        # A RST overtakes bytes that the receiver has not read: then there are fewer, never others.
        assert got == data[: len(got)]
        assert len(got) == at if how == "fin" else len(got) <= at
        assert read_all(source)[1] == how
        proxy.wait(lambda: proxy.passages[0].end)
        passage = proxy.passages[0]
        assert (passage.up if direction == "up" else passage.down) == at
        assert passage.end == "planned"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_frozen_direction_holds_its_bytes_while_the_other_moves(ends: Ends, direction: Direction) -> None:
    with FaultProxy(ends.target) as proxy:
        pair = ends.connect(proxy)
        source, sink = sides(pair, direction)
        source.sendall(b"before")
        assert exactly(sink, 6) == b"before"
        proxy.freeze(direction)
        source.sendall(b"queued")
        sink.sendall(b"other way")
        assert exactly(source, 9) == b"other way"
        sink.setblocking(False)
        with pytest.raises(BlockingIOError):
            sink.recv(1)
        sink.settimeout(10)
        proxy.thaw()
        assert exactly(sink, 6) == b"queued"


def test_a_planned_freeze_stops_at_its_byte_and_a_frozen_source_feels_it(ends: Ends) -> None:
    with FaultProxy(ends.target, plan=lambda number: Plan(freeze_up=4)) as proxy:
        near, far = ends.connect(proxy)
        near.settimeout(0.2)
        sent = 0
        with contextlib.suppress(TimeoutError):  # the proxy does not read: the kernel's buffers fill up
            while sent < 100_000_000:
                sent += near.send(bytes(65536))
        assert sent < 100_000_000
        assert exactly(far, 4) == bytes(4)
        proxy.wait(lambda: proxy.passages[0].up == 4)
        proxy.thaw()
        near.settimeout(10)
        assert len(exactly(far, sent - 4)) == sent - 4


@pytest.mark.parametrize("direction", ["up", "down"])
def test_one_bit_of_one_byte_is_flipped(ends: Ends, direction: Direction) -> None:
    data = bytes(1000)
    plan = Plan(flip_up=700) if direction == "up" else Plan(flip_down=700)
    with FaultProxy(ends.target, plan=lambda number: plan) as proxy:
        source, sink = sides(ends.connect(proxy), direction)
        source.sendall(data[:650])
        source.sendall(data[650:])
        got = exactly(sink, 1000)
        assert [at for at in range(1000) if got[at]] == [700]
        assert got[700].bit_count() == 1


def test_a_target_that_is_down_resets_who_dialled(ends: Ends) -> None:
    with FaultProxy(("127.0.0.1", 9)) as proxy:
        # The reset may come while the connection is made.
        with (
            pytest.raises(ConnectionResetError),
            socket.create_connection((proxy.host, proxy.port), timeout=10) as sock,
        ):
            sock.recv(1)
        assert proxy.passages[0].end.startswith("unreachable")


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_command_cuts_what_is_open(ends: Ends, how: How) -> None:
    with FaultProxy(ends.target) as proxy:
        pairs = [ends.connect(proxy) for _ in range(2)]
        proxy.wait(lambda: proxy.passing == 2)
        assert proxy.cut(how) == 2
        assert [read_all(sock)[1] for pair in pairs for sock in pair] == [how] * 4
        near, far = ends.connect(proxy)
        near.sendall(b"a new one")
        assert exactly(far, 9) == b"a new one"
        assert [passage.end for passage in proxy.passages] == ["commanded", "commanded", ""]


def test_a_port_that_refuses_keeps_what_is_open_and_listens_again(ends: Ends) -> None:
    with FaultProxy(ends.target, listen=("127.0.0.1", fixed_port())) as proxy:
        near, far = ends.connect(proxy)
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            ends.connect(proxy)
        near.sendall(b"still here")
        assert exactly(far, 10) == b"still here"
        proxy.accept_again()
        ends.connect(proxy)


def test_nothing_is_left_after_the_end(ends: Ends) -> None:
    before = set(threading.enumerate())
    with FaultProxy(ends.target, listen=("127.0.0.1", fixed_port())) as proxy:
        near, far = ends.connect(proxy)
        proxy.freeze()
    assert read_all(near)[1] == "rst"
    assert read_all(far)[1] == "rst"
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port), timeout=10)
