from __future__ import annotations

import asyncio

from arcbridge.mux.socket_error_poll import SocketErrorPoll, socket_error_poll


class Socket:
    def __init__(self, poll: SocketErrorPoll) -> None:
        self.poll = poll
        self.polled = asyncio.Event()

    def poll_error(self) -> None:
        self.polled.set()


async def test_a_socket_that_was_read_is_polled_once() -> None:
    poll = socket_error_poll()
    assert socket_error_poll() is poll, "one per loop"
    one, other = Socket(poll), Socket(poll)
    poll.add(one)
    poll.add(one)
    poll.add(other)
    poll.remove(other)
    await asyncio.wait_for(one.polled.wait(), 10)
    assert not other.polled.is_set()
    assert poll._timer is None, "no socket is left to poll"


async def test_no_socket_means_no_timer() -> None:
    poll = socket_error_poll()
    one = Socket(poll)
    poll.add(one)
    assert poll._timer is not None
    poll.remove(one)
    assert poll._timer is None
    poll.remove(one)
    poll.add(one)
    await asyncio.wait_for(one.polled.wait(), 10)


async def test_one_that_is_read_meanwhile_is_polled_again() -> None:
    poll = socket_error_poll()

    class Reading(Socket):
        left = 3

        def poll_error(self) -> None:
            self.left -= 1
            if self.left:
                self.poll.add(self)
            else:
                self.polled.set()

    one = Reading(poll)
    poll.add(one)
    await asyncio.wait_for(one.polled.wait(), 10)
    assert one.left == 0


async def test_one_that_raises_takes_nothing_from_the_others() -> None:
    poll = socket_error_poll()
    loop = asyncio.get_running_loop()
    told: list[object] = []
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))

    class Broken(Socket):
        def poll_error(self) -> None:
            raise RuntimeError("broken")

    others = [Socket(poll) for _ in range(20)]
    for one in (*others[:10], Broken(poll), *others[10:]):
        poll.add(one)
    for one in others:
        await asyncio.wait_for(one.polled.wait(), 10)
    assert [str(error) for error in told] == ["broken"]
