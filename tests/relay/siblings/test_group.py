"""Channels between workers: who hears what first, who is gone, what replaces what."""

from __future__ import annotations

import asyncio
import socket

from arcbridge.relay.siblings.channel import Received, pair
from arcbridge.relay.siblings.group import Sibling, Siblings
from tests.support.eventually import until


def joined(one: Siblings, other: Siblings, number: int = 1, indexes: tuple[int, int] = (0, 1)) -> None:
    """A channel between the workers with these indexes."""
    ends = pair()
    one.connect(indexes[1], number, ends[0])
    other.connect(indexes[0], number, ends[1])


async def test_hello_then_what_there_is_then_synced() -> None:
    one, other = Siblings(), Siblings()
    heard: list[str] = []

    def handler(sibling: Sibling, message: Received) -> None:
        assert sibling.worker_id == one.worker_id
        heard.append(message.head["what"])

    other.handlers["x"] = handler
    one.on_joined.append(lambda sibling: [sibling.tell({"t": "x", "what": n}) for n in range(3)])
    joined(one, other)
    assert await other.synced(1, 5)
    assert heard == [0, 1, 2]
    found = other.of_id(one.worker_id)
    assert found.index == 0
    assert other.of_id("") is None
    assert other.of_id("f" * 16) is None
    one.close()
    other.close()


async def test_no_sibling_comes() -> None:
    assert not await Siblings().synced(1, 0.01)
    assert await Siblings().synced(0, 0.01)


async def test_the_end_of_one_is_told_and_may_be_repaired() -> None:
    lost: list[tuple[int, int]] = []
    left: list[int] = []
    one, other = Siblings(), Siblings(lambda index, number: lost.append((index, number)))
    other.on_left.append(lambda sibling: left.append(sibling.pair))
    joined(one, other, 7)
    await other.synced(1, 5)
    one.close()
    await until(lambda: lost)
    assert (lost, left, len(other)) == ([(0, 7)], [7], 0)
    again = Siblings()
    joined(again, other, 8)
    assert await other.synced(1, 5)
    # A replaced sibling is no loss: the supervisor has replaced it.
    joined(again, other, 9)
    assert await other.synced(1, 5)
    assert (lost, left, len(other)) == ([(0, 7)], [7, 8], 1)
    again.close()
    other.close()
    assert lost == [(0, 7)]


async def test_a_socket_without_a_handler_is_closed() -> None:
    one, other = Siblings(), Siblings()
    joined(one, other)
    await other.synced(1, 5)
    near, far = socket.socketpair()
    near.settimeout(5)
    with near:
        (sibling,) = list(one)
        sibling.channel.send({"t": "unheard of"}, sock=far)
        far.close()
        assert await asyncio.to_thread(near.recv, 1) == b""
    one.close()
    other.close()
