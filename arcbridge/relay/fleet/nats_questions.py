"""A question to all relays of a fleet, an operator's or how many agents there are: one message to all, and the rows of
each that answers.

Who is there is not known, so the asking relay waits until each that began to answer has ended, and nothing more came
for `SILENCE`; at most `DEADLINE`. A relay that is frozen is missing from the answer then, and nothing else is wrong.
Subjects, behind the fleet's prefix: `relay.questions` to all, `inbox.NAME.askID.*` for what comes back.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from arcbridge.relay.nats import NatsConnection, NatsUnavailable, Subscription
from arcbridge.relay.operations import Question, Row, parts, rows_of
from arcbridge.tasks import TaskSet
from arcbridge.untrusted_json import read_json

if TYPE_CHECKING:
    from nats.aio.msg import Msg

DEADLINE: Final = 3.0
SILENCE: Final = 1.0
"""Seconds without another answer after which no other relay is expected to begin one: many times what a busy relay
takes, because one that is left out makes `session end` say that there is no such session."""
_PARTS: Final = 100_000


class NatsQuestions:
    """Asks and answers. The caller starts and closes `connection`."""

    def __init__(
        self, connection: NatsConnection, relay_id: str, answer: Callable[[Question], list[Row]], tasks: TaskSet
    ) -> None:
        """`relay_id`: this process, which does not answer itself. `tasks`: those of the fleet."""
        self._nats = connection
        self._id = relay_id
        self._answer = answer
        self._tasks = tasks
        self._to_all = f"{connection.prefix}.relay.questions"
        self._inbox = f"{connection.prefix}.inbox.{connection.name}.ask{relay_id}"
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Queue[tuple[str, bool, list[Row]]]] = {}

    async def start(self) -> list[Subscription]:
        """Listen; the subscriptions are the caller's to end."""
        return [
            await self._nats.subscribe(self._to_all, self._asked),
            await self._nats.subscribe(f"{self._inbox}.*", self._answered),
        ]

    async def ask(self, question: Question, deadline: float | None = None, silence: float = SILENCE) -> list[Row]:
        """Ask the other relays; return the rows of all that answer within `deadline` seconds (None: `DEADLINE`).
        `silence`: seconds without another answer, once there was one, after which there is none."""
        number = str(next(self._numbers))
        answers = self._waiting[number] = asyncio.Queue(maxsize=_PARTS)
        rows: list[Row] = []
        answering: set[str] = set()
        wait = SILENCE
        try:
            message = json.dumps({"from": self._id, "question": dict(question)}).encode()
            await self._nats.publish(self._to_all, message, f"{self._inbox}.{number}")
            async with asyncio.timeout(DEADLINE if deadline is None else deadline):
                while True:
                    try:
                        async with asyncio.timeout(None if answering else wait):
                            relay, last, part = await answers.get()
                    except TimeoutError:
                        break
                    wait = silence
                    rows += part
                    (answering.discard if last else answering.add)(relay)
        except (TimeoutError, NatsUnavailable):
            # What has come is what there is.
            pass
        finally:
            del self._waiting[number]
        return rows

    def _asked(self, message: Msg) -> None:
        try:
            asked = read_json(message.data)
            question = asked["question"]
            if asked["from"] == self._id or not isinstance(question, dict) or not message.reply:
                return
        except (ValueError, TypeError, KeyError):
            return
        self._tasks.start(self._tell(message.reply, self._answer(question)))

    async def _tell(self, to: str, rows: list[Row]) -> None:
        for part, last in parts(rows):
            head = json.dumps({"from": self._id, "last": last}).encode()
            try:
                await self._nats.publish(to, head + b"\n" + part)
            except NatsUnavailable:
                return

    def _answered(self, message: Msg) -> None:
        waiting = self._waiting.get(message.subject.rpartition(".")[2])
        if waiting is None or waiting.full():
            return
        if not message.data:
            # The server's word that there is no other relay.
            waiting.put_nowait(("", True, []))
            return
        head, _, body = bytes(message.data).partition(b"\n")
        try:
            said = read_json(head)
            waiting.put_nowait((str(said["from"]), bool(said["last"]), rows_of(body)))
        except (ValueError, TypeError, KeyError):
            # No relay of this version: another program writes to this inbox.
            return
