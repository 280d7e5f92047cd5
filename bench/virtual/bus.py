"""The fleet's messages without NATS: subjects, queue groups, and a server that says when no relay listens."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arcbridge.relay.nats import NatsConnection, NatsUnavailable, NoReply, NoResponder, Subscription
from arcbridge.settings.config import RelayFleetConfig

HALF_WAY = 0.02
"""Seconds from a relay to the server, and from there to another relay."""


@dataclass(slots=True)
class Message:
    """A message, as the fleet reads one of the library's."""

    subject: str
    data: bytes
    reply: str


class Bus:
    """The server: who listens to what."""

    def __init__(self) -> None:
        self.listeners: dict[str, dict[int, tuple[VirtualNats, Subscription]]] = {}
        self.inboxes: dict[str, asyncio.Future[bytes]] = {}
        self.numbers = itertools.count()

    def to(self, subject: str) -> list[tuple[VirtualNats, Subscription]]:
        """Return who gets a message: each listener, and of those in one queue group one at random."""
        known = self.listeners.get(subject) or self.listeners.get(f"{subject.rpartition('.')[0]}.*") or {}
        grouped = [one for one in known.values() if one[1].queue]
        return [one for one in known.values() if not one[1].queue] + ([random.choice(grouped)] if grouped else [])

    def deliver(self, subject: str, data: bytes, reply: str) -> bool:
        """Pass a message on; return whether any relay listens."""
        waiting = self.inboxes.get(subject)
        if waiting is not None:
            asyncio.get_running_loop().call_later(HALF_WAY, _answer, waiting, data)
            return True
        found = self.to(subject)
        for connection, subscription in found:
            asyncio.get_running_loop().call_later(
                HALF_WAY, connection.take, subscription, Message(subject, data, reply)
            )
        return bool(found)


class VirtualNats(NatsConnection):
    """One relay's connection to the bus."""

    def __init__(self, bus: Bus, name: str) -> None:
        super().__init__(RelayFleetConfig(name=name))
        self._bus = bus
        self._held: set[tuple[str, int]] = set()
        self.gone = False
        """Whether the relay's process is gone."""

    @property
    def connected(self) -> bool:
        return not self.gone

    def drop(self) -> None:
        """Forget what the relay listened to, because its process is gone."""
        self.gone = True
        for subject, number in list(self._held):
            self._forget(subject, number)

    def take(self, subscription: Subscription, message: Any) -> None:
        """Hand a message to its handler."""
        if not self.gone:
            subscription.handler(message)

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        reply = f"{self.prefix}.inbox.{self.name}.{next(self._bus.numbers)}"
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._bus.inboxes[reply] = answer
        try:
            await self._pass_on(subject, payload, reply)
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError as error:
            raise NoReply(f"no answer on {subject}") from error
        finally:
            del self._bus.inboxes[reply]

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        try:
            await self._pass_on(subject, payload, reply)
        except NoResponder:
            pass

    async def subscribe(self, subject: str, handler: Callable[[Any], None], queue: str = "") -> Subscription:
        subscription = Subscription(subject, queue, handler)
        if not self.gone:
            self._bus.listeners.setdefault(subject, {})[id(subscription)] = (self, subscription)
            self._held.add((subject, id(subscription)))
        return subscription

    async def unsubscribe(self, subscription: Subscription) -> None:
        self._forget(subscription.subject, id(subscription))

    async def flush(self, timeout: float) -> None:
        await asyncio.sleep(2 * HALF_WAY)

    async def _pass_on(self, subject: str, payload: bytes, reply: str) -> None:
        if self.gone:
            raise NatsUnavailable("NATS does not answer")
        await asyncio.sleep(HALF_WAY)
        if not self._bus.deliver(subject, payload, reply):
            raise NoResponder(f"no relay listens to {subject}")

    def _forget(self, subject: str, number: int) -> None:
        self._held.discard((subject, number))
        listeners = self._bus.listeners.get(subject, {})
        listeners.pop(number, None)
        if not listeners:
            self._bus.listeners.pop(subject, None)


def _answer(waiting: asyncio.Future[bytes], data: bytes) -> None:
    if not waiting.done():
        waiting.set_result(data)
