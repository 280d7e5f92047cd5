from __future__ import annotations

import asyncio

from arcbridge.mux.socket_error_poll import SocketErrorPoll, lookout


class Socket:
    def __init__(self, lookout: SocketErrorPoll) -> None:
        self.lookout = lookout
        self.looked = asyncio.Event()

    def look(self) -> None:
        self.looked.set()


async def test_whoever_was_read_is_asked_once() -> None:
    out = lookout()
    assert lookout() is out, "one per loop"
    one, other = Socket(out), Socket(out)
    out.add(one)
    out.add(one)
    out.add(other)
    out.remove(other)
    await asyncio.wait_for(one.looked.wait(), 10)
    assert not other.looked.is_set()
    assert out._timer is None, "nobody is left to ask"


async def test_nobody_left_means_no_timer() -> None:
    out = lookout()
    one = Socket(out)
    out.add(one)
    assert out._timer is not None
    out.remove(one)
    assert out._timer is None
    out.remove(one)
    out.add(one)
    await asyncio.wait_for(one.looked.wait(), 10)


async def test_one_that_is_read_meanwhile_is_asked_again() -> None:
    out = lookout()

    class Reading(Socket):
        left = 3

        def look(self) -> None:
            self.left -= 1
            if self.left:
                self.lookout.add(self)
            else:
                self.looked.set()

    one = Reading(out)
    out.add(one)
    await asyncio.wait_for(one.looked.wait(), 10)
    assert one.left == 0


async def test_one_that_raises_takes_nothing_from_the_others() -> None:
    out = lookout()
    loop = asyncio.get_running_loop()
    told: list[object] = []
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))

    class Broken(Socket):
        def look(self) -> None:
            raise RuntimeError("broken")

    others = [Socket(out) for _ in range(20)]
    for one in (*others[:10], Broken(out), *others[10:]):
        out.add(one)
    for one in others:
        await asyncio.wait_for(one.looked.wait(), 10)
    assert [str(error) for error in told] == ["broken"]
