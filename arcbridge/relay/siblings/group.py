"""The other workers of this relay, as one of them sees them: a channel to each, and who handles which message.

The supervisor makes the channels, anew when a worker was restarted, and anew when one broke between two that live
(`on_lost` tells it). A worker that comes is heard of in order: first its HELLO, then what each part of this process
and of that one has to say (`on_joined`), and all of it before the first message that depends on it.

A message is an order, or a question (`Sibling.ask`): its number is in `answer`, and in `forget` where the asking
process does not wait for the answer any more. Invariant: what one process still asks of another ends with the channel
between them.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import structlog

from arcbridge.relay.siblings.channel import Channel, ChannelClosed, Head, Received

log = structlog.get_logger("arcbridge.relay")


class Sibling:
    """Another worker, for as long as one channel to it lives."""

    def __init__(self, index: int, pair: int) -> None:
        self.index = index
        self.pair = pair
        """Which of the channels that the two ever had this is."""
        self.worker_id = ""
        """Of that process, once it has said HELLO."""
        self.channel: Channel
        self.asked: dict[int, asyncio.Future[Received]] = {}
        """Questions to that process, by number."""
        self.serving: dict[int, asyncio.Task[None]] = {}
        """Questions of that process, by its number."""
        self._numbers = itertools.count(1)

    def __repr__(self) -> str:
        return f"Sibling({self.index}, pair {self.pair})"

    async def ask(self, head: Head, body: bytes = b"", sock: socket.socket | None = None) -> Received:
        """Put a question and return the answer; see `Channel.send`. Raises `ChannelClosed`, also once it is lost."""
        number = next(self._numbers)
        answer: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
        self.asked[number] = answer
        try:
            self.channel.send({**head, "n": number}, body, sock)
            return await answer
        finally:
            del self.asked[number]
            if not answer.done() or answer.cancelled():
                self.tell({"t": "forget", "n": number})

    def answer(self, question: Received, head: Head, body: bytes = b"") -> None:
        """Answer a question of that process, if it is still there."""
        self.tell({**head, "t": "answer", "n": question.head["n"]}, body)

    def tell(self, head: Head, body: bytes = b"") -> None:
        """Send what need not arrive: a sibling that is gone has forgotten everything anyway."""
        self.channel.tell(head, body)


Handler = Callable[[Sibling, Received], None]
Answerer = Callable[[Sibling, Received], Coroutine[Any, Any, tuple[Head, bytes]]]


class Siblings:
    """`connect` for each channel that the supervisor gives; `handlers` and all that follows before the first."""

    def __init__(self, on_lost: Callable[[int, int], None] = lambda index, pair: None) -> None:
        """`on_lost(index, pair)`: the channel to that worker broke, and there is no newer one."""
        self.worker_id = secrets.token_hex(8)
        """This process, for dial tokens; another one after a restart."""
        self.handlers: dict[str, Handler] = {}
        self.answerers: dict[str, Answerer] = {}
        """Of questions whose answer takes a while."""
        self.on_joined: list[Callable[[Sibling], None]] = []
        self.on_left: list[Callable[[Sibling], None]] = []
        self._on_lost = on_lost
        self._connected: dict[int, Sibling] = {}
        self._complete: set[Sibling] = set()
        self._closing = False
        self._synced = asyncio.Event()

    def __iter__(self) -> Iterator[Sibling]:
        """Iterate over the siblings that can be sent to."""
        return iter(list(self._connected.values()))

    def __len__(self) -> int:
        return len(self._connected)

    def connect(self, index: int, pair: int, sock: socket.socket) -> None:
        """Talk to worker `index` over `sock`, which is ours from now on, and no more over what there was before."""
        older = self._connected.pop(index, None)
        if older is not None:
            older.channel.close()
        sibling = Sibling(index, pair)
        try:
            sibling.channel = Channel(
                sock, lambda message: self._received(sibling, message), lambda: self._left(sibling)
            )
        except ChannelClosed:
            sock.close()
            raise
        self._connected[index] = sibling
        sibling.channel.start()
        sibling.tell({"t": "hello", "id": self.worker_id})
        for joined in self.on_joined:
            joined(sibling)
        sibling.tell({"t": "synced"})

    def of_id(self, worker_id: str) -> Sibling | None:
        return (
            next((one for one in self._connected.values() if one.worker_id == worker_id), None) if worker_id else None
        )

    async def synced(self, count: int, timeout: float) -> bool:
        """Return whether `count` siblings have said all that they had to say at the beginning, within `timeout`
        seconds."""
        try:
            async with asyncio.timeout(timeout):
                while len(self._complete) < count:
                    self._synced.clear()
                    await self._synced.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self._closing = True
        for sibling in self:
            sibling.channel.close()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _received(self, sibling: Sibling, message: Received) -> None:
        kind = str(message.head.get("t"))
        number = int(message.head.get("n", 0))
        if kind == "hello":
            sibling.worker_id = str(message.head.get("id", ""))
        elif kind == "synced":
            self._complete.add(sibling)
            self._synced.set()
        elif kind == "answer":
            answer = sibling.asked.get(number)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif kind == "forget":
            if (task := sibling.serving.get(number)) is not None:
                task.cancel()
        elif kind in self.answerers:
            task = asyncio.get_running_loop().create_task(self._answer(sibling, message, self.answerers[kind]))
            sibling.serving[number] = task
            task.add_done_callback(lambda _: sibling.serving.pop(number, None))
        elif kind in self.handlers:
            self.handlers[kind](sibling, message)
        elif message.sock is not None:
            message.sock.close()

    async def _answer(self, sibling: Sibling, message: Received, answerer: Answerer) -> None:
        try:
            sibling.answer(message, *await answerer(sibling, message))
        except Exception:
            # The other process waits until its deadline.
            log.exception("a question of another worker was not answered", question=message.head.get("t"))

    def _left(self, sibling: Sibling) -> None:
        self._complete.discard(sibling)
        if self._connected.get(sibling.index) is sibling:
            del self._connected[sibling.index]
            if not self._closing:
                self._on_lost(sibling.index, sibling.pair)
        for answer in sibling.asked.values():
            if not answer.done():
                answer.set_exception(ChannelClosed())
        for task in sibling.serving.values():
            task.cancel()
        for left in self.on_left:
            left(sibling)
