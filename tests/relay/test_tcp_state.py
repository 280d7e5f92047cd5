from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from arcbridge.net.sockets import reset
from arcbridge.relay.tcp_state import has_ended, round_trip
from tests.net.ends import tcp_pair
from tests.support.eventually import until


@pytest.mark.parametrize("end", [lambda sock: sock.shutdown(socket.SHUT_WR), socket.socket.close, reset])
async def test_an_end_shows_in_front_of_unread_bytes(end: Callable[[socket.socket], None]) -> None:
    near, far = await tcp_pair()
    with near, far:
        assert not has_ended(near)
        far.send(b"unread")
        end(far)
        await until(lambda: has_ended(near))


async def test_where_the_system_cannot_tell_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = await tcp_pair()
    with near:
        far.close()
        monkeypatch.delattr(socket, "TCP_INFO")
        assert not has_ended(near)


async def test_the_round_trip_of_a_connection() -> None:
    near, far = await tcp_pair()
    with near, far:
        near.send(b"a byte that is confirmed")
        assert 0 < round_trip(near) < 1
    assert round_trip(near) == 0, "it is closed"
