"""Messages and descriptors over one channel: order, full sockets, descriptors that do not arrive, strangers."""

from __future__ import annotations

import array
import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator

import pytest

from arcbridge.relay.siblings import channel as module
from arcbridge.relay.siblings.channel import MAX_MESSAGE, Channel, ChannelClosed, Received, check_peer, pair
from tests.support.eventually import until


class End:
    """A channel and what came out of it."""

    def __init__(self, sock: socket.socket) -> None:
        self.messages: list[Received] = []
        self.closed = 0
        self.channel = Channel(sock, self.messages.append, self._closed)
        self.channel.start()

    def _closed(self) -> None:
        self.closed += 1


@pytest.fixture
async def ends() -> AsyncIterator[tuple[End, End]]:
    one, other = (End(sock) for sock in pair())
    yield one, other
    one.channel.close()
    other.channel.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_messages_in_order_with_their_bodies(ends: tuple[End, End]) -> None:
    one, other = ends
    for number in range(100):
        one.channel.send({"n": number}, bytes([number]) * number)
    await until(lambda: len(other.messages) == 100)
    assert [(m.head["n"], len(m.body), m.sock) for m in other.messages] == [(n, n, None) for n in range(100)]


async def test_a_body_may_hold_anything(ends: tuple[End, End]) -> None:
    body = bytes(range(256)) * 256
    ends[0].channel.send({"t": "x"}, body)
    await until(lambda: ends[1].messages)
    assert ends[1].messages[0].body == body


async def test_a_socket_arrives_and_stays_the_senders_too(ends: tuple[End, End]) -> None:
    near, far = socket.socketpair()
    with near, far:
        ends[0].channel.send({"t": "socket"}, b"left over", far)
        await until(lambda: ends[1].messages)
        message = ends[1].messages[0]
        with message.sock:
            assert not os.get_inheritable(message.sock.fileno())
            message.sock.sendall(b"here")
            assert near.recv(10) == b"here"
        assert far.fileno() >= 0


async def test_a_given_socket_is_closed_here_once_it_has_left(ends: tuple[End, End]) -> None:
    near, far = socket.socketpair()
    with near:
        ends[0].channel.send({"t": "socket"}, sock=far, keep=False)
        assert far.fileno() < 0
        await until(lambda: ends[1].messages)
        sock = ends[1].messages[0].sock
        sock.close()


async def test_a_full_socket_makes_messages_wait_and_none_is_lost(ends: tuple[End, End]) -> None:
    one, other = ends
    asyncio.get_running_loop().remove_reader(other.channel._sock.fileno())
    body = b"x" * 60_000
    near, far = socket.socketpair()
    with near, far:
        for number in range(200):
            one.channel.send({"n": number}, body, far if number % 10 == 9 else None)
        assert one.channel._waiting
        other.channel.start()
        await until(lambda: len(other.messages) == 200)
    assert [message.head["n"] for message in other.messages] == list(range(200))
    assert [message.sock is not None for message in other.messages] == [n % 10 == 9 for n in range(200)]
    for message in other.messages:
        if message.sock is not None:
            message.sock.close()


async def test_a_socket_that_was_closed_while_it_waited_is_left_out(ends: tuple[End, End]) -> None:
    """The closed socket's number may belong to another socket by then (docs/threats.md#R4)."""
    one, other = ends
    asyncio.get_running_loop().remove_reader(other.channel._sock.fileno())
    near, far = socket.socketpair()
    with near:
        while not one.channel._waiting:
            one.channel.send({"t": "filler"}, b"x" * 60_000)
        one.channel.send({"t": "socket"}, sock=far)
        one.channel.send({"t": "last"})
        far.close()
        other.channel.start()
        await until(lambda: other.messages and other.messages[-1].head["t"] == "last")
        assert all(message.sock is None and message.head["t"] != "socket" for message in other.messages)


async def test_who_never_reads_is_taken_for_dead(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE", 300_000)
    one, other = ends
    asyncio.get_running_loop().remove_reader(other.channel._sock.fileno())
    near, far = socket.socketpair()

    def fill() -> None:
        for _ in range(100):
            one.channel.send({"t": "x"}, b"x" * 60_000)

    with pytest.raises(ChannelClosed, match="does not read"):
        fill()
    assert one.closed == 1
    with pytest.raises(ChannelClosed):
        one.channel.send({"t": "x"}, sock=far, keep=False)
    assert far.fileno() < 0
    near.close()


async def test_an_ancillary_buffer_that_is_too_short(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#R7: the message arrives without its socket, and what did arrive is not lost."""
    monkeypatch.setattr(module, "_SPARE_DESCRIPTORS", 0)
    monkeypatch.setattr(socket, "CMSG_SPACE", lambda length: 0)
    near, far = socket.socketpair()
    with near, far:
        before = descriptors()
        ends[0].channel.send({"t": "socket"}, b"body", far)
        await until(lambda: ends[1].messages)
        message = ends[1].messages[0]
        assert (message.sock, message.body) == (None, b"body")
        assert descriptors() == before


async def test_a_receiver_without_descriptors_is_told_so(ends: tuple[End, End]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    near, far = socket.socketpair()
    with near, far:
        # The highest number in use is all there is.
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        held = []
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            ends[0].channel.send({"t": "socket"}, b"", far)
            await until(lambda: ends[1].messages)
        finally:
            for number in held:
                os.close(number)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert ends[1].messages[0].sock is None


async def test_more_sockets_than_were_agreed_end_the_channel_and_none_leaks(ends: tuple[End, End]) -> None:
    near, far = socket.socketpair()
    with near, far:
        before = descriptors()
        numbers = array.array("i", [near.fileno(), far.fileno()])
        ends[0].channel._sock.sendmsg([b"{}\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        await until(lambda: ends[1].closed and ends[0].closed)
        assert ends[1].messages == []
        assert descriptors() == before - 2  # the channel's own ends


@pytest.mark.parametrize("bytes_", [b"no json\n", b"[]\n", b"\xff\xfe\n"])
async def test_what_is_no_message_ends_the_channel(ends: tuple[End, End], bytes_: bytes) -> None:
    ends[0].channel._sock.send(bytes_)
    await until(lambda: ends[1].closed)
    assert ends[1].messages == []
    await until(lambda: ends[0].closed)


async def test_a_message_that_cannot_fit_is_refused_here(ends: tuple[End, End]) -> None:
    with pytest.raises(ChannelClosed, match="too long"):
        ends[0].channel.send({"t": "x"}, b"x" * MAX_MESSAGE)
    ends[0].channel.send({"t": "y"}, b"x" * (MAX_MESSAGE - 100))
    await until(lambda: ends[1].messages)


async def test_the_end_of_the_other_is_told_once(ends: tuple[End, End]) -> None:
    ends[0].channel.close()
    ends[0].channel.close()
    await until(lambda: ends[1].closed)
    with pytest.raises(ChannelClosed):
        ends[1].channel.send({"t": "x"})
    assert (ends[0].closed, ends[1].closed) == (1, 1)


async def test_another_users_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair()
    with one, other:
        check_peer(one)
        monkeypatch.setattr(os, "getuid", lambda: 12_345_678)
        with pytest.raises(ChannelClosed, match="another user"):
            Channel(one, lambda message: None, lambda: None)


async def test_last_words_are_heard(ends: tuple[End, End]) -> None:
    one, other = ends
    for number in range(200):
        one.channel.send({"n": number})
    one.channel.close()
    other.channel.read_rest()
    assert (len(other.messages), other.closed) == (200, 1)
