"""One worker's process: a whole relay but for its lock, its metrics' port and its signals, led by the supervisor.

The messages on the channel that the process inherits; `t` of a head is the message, `n` the number of a question, which
the answer repeats:

    message    direction     meaning
    assign     to worker     the first: settings, index, number of workers, address
    peer       to worker     a channel to a sibling
    serve      to worker     that was all of them; open the port when they have been heard
    metrics    both          send your metrics; here they are
    ask        to worker     an operator's question; `answered` has its rows, in parts
    reload     to worker     other settings; `reloaded` says what came of it
    toggle     to worker     switch the log's level
    stop       to worker     drain
    hurry      to worker     drain no longer
    close      to worker     all are ready: close the port
    serving    to supervisor the port is open, at this address
    failed     to supervisor it cannot serve, and why
    beat       to supervisor it lives, and which checks fail
    lost       to supervisor the channel to a sibling broke
    idle       to supervisor ready to close the port

A supervisor that is gone ends its workers at once: they would not be started again, counted or ended any more, and
their port and lock are needed by the next one. Their sessions resume there.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
from dataclasses import asdict, dataclass
from typing import Final

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError, StateError
from arcbridge.net.address import Address
from arcbridge.observe import logging as logs
from arcbridge.relay.operations import Question, parts
from arcbridge.relay.service import RelayInfo, serve
from arcbridge.relay.settings import required
from arcbridge.relay.siblings.channel import Channel, ChannelClosed, Received
from arcbridge.relay.siblings.group import Siblings
from arcbridge.relay.siblings.worker_membership import WorkerMembership
from arcbridge.settings.config import RelayConfig

BEAT: Final = 1.0
"""Seconds between two `beat`s."""
ANSWERS: Final = 1024 * 1024
"""Bytes of answers to operators' questions that wait for the supervisor, above which no more are added."""

log = structlog.get_logger("arcbridge.relay")


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told first. It travels pickled: from the supervisor to a process of its own and nowhere else."""

    config: RelayConfig
    index: int
    count: int
    host: str
    port: int


class _Worker:
    """The worker's side of the supervisor's channel."""

    def __init__(self, parent: socket.socket, stopping: asyncio.Event, hurry: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        self.assigned: asyncio.Future[Assignment] = loop.create_future()
        self.told_to_serve = asyncio.Event()
        self.membership: WorkerMembership
        self._may_close = asyncio.Event()
        self._stopping = stopping
        self._hurry = hurry
        self._siblings = Siblings(self._lost)
        self._settings = bytearray()
        """What has come of settings whose last part has not."""
        self._answering = asyncio.Lock()
        self._answers: set[asyncio.Task[None]] = set()
        self.channel = Channel(parent, self._received, self._orphaned)
        self.channel.start()

    async def wait_for_all(self, hurry: asyncio.Event) -> None:
        """Say that this worker is ready to close the port, and wait until all are, or until `hurry`."""
        self.channel.tell({"t": "idle"})
        waiting = [asyncio.get_running_loop().create_task(event.wait()) for event in (self._may_close, hurry)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    async def beat(self) -> None:
        """Tell the supervisor each second that this process lives."""
        while True:
            self.channel.tell({"t": "beat", "failures": self.membership.failures()})
            await asyncio.sleep(BEAT)

    def close(self) -> None:
        """Cancel the answers under way and close the channels to the siblings."""
        for answer in list(self._answers):
            answer.cancel()
        self._siblings.close()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _received(self, message: Received) -> None:
        head = message.head
        match head["t"]:
            case "assign" | "reload" if not head["last"]:
                self._settings += message.body
            case "assign":
                assigned: Assignment = pickle.loads(self._whole(message.body))
                listen = Address(assigned.host, assigned.port)
                self.membership = WorkerMembership(
                    assigned.index, assigned.count, listen, self._siblings, self.wait_for_all
                )
                self.assigned.set_result(assigned)
            case "peer" if message.sock is not None:
                self._siblings.connect(int(head["worker"]), int(head["pair"]), message.sock)
            case "serve":
                self.membership.expected = int(head["siblings"])
                self.told_to_serve.set()
            case "metrics":
                self.channel.tell({"t": "metrics", "n": head["n"]}, self.membership.snapshot())
            case "ask":
                answer = asyncio.get_running_loop().create_task(self._answer(int(head["n"]), head["question"]))
                self._answers.add(answer)
                answer.add_done_callback(self._answers.discard)
            case "reload":
                self._reload(int(head["n"]), pickle.loads(self._whole(message.body)))
            case "toggle":
                logs.toggle_debug()
            case "stop":
                self._stopping.set()
            case "hurry":
                self._stopping.set()
                self._hurry.set()
            case "close":
                self._may_close.set()
            case _:
                if message.sock is not None:
                    message.sock.close()

    def _whole(self, last: bytes) -> bytes:
        """Return the settings of which this is the last part."""
        whole = bytes(self._settings) + last
        self._settings.clear()
        return whole

    async def _answer(self, number: int, question: Question) -> None:
        """Answer an operator's question, one after the other, as fast as the supervisor takes it.

        All at once they could be more than the channel holds, which would be taken for a supervisor that is dead.
        """
        async with self._answering:
            service = self.membership.service if hasattr(self, "membership") else None
            rows = [] if service is None else service.operations.answer(question)
            for part, last in parts(rows):
                try:
                    await self.channel.room(ANSWERS)
                except ChannelClosed:
                    return
                self.channel.tell({"t": "answered", "n": number, "last": last}, part)
                # What this worker is for goes on in between.
                await asyncio.sleep(0)

    def _reload(self, number: int, config: RelayConfig) -> None:
        """Put other settings in force, and send the result. One that does not serve yet reports that it failed."""
        service, head = self.membership.service, dict[str, object](t="reloaded", n=number)
        try:
            if service is None:
                raise StateError("the worker does not serve yet")
            outcome = service.apply(required(config))
            head.update(taken=outcome.taken, needs_restart=outcome.needs_restart)
        except ArcbridgeError as error:
            head["error"] = error.message
        except Exception as error:
            log.error("settings not reloaded", reason=type(error).__name__, exc_info=True)
            head["error"] = f"internal error ({type(error).__name__})"
        self.channel.tell(head)

    def _lost(self, index: int, pair: int) -> None:
        self.channel.tell({"t": "lost", "worker": index, "pair": pair})

    def _orphaned(self) -> None:
        self._stopping.set()
        self._hurry.set()
        self.told_to_serve.set()
        if not self.assigned.done():
            self.assigned.set_exception(ChannelClosed("the supervisor is gone"))


async def work(parent: socket.socket, stopping: asyncio.Event, hurry: asyncio.Event) -> None:
    """Be one worker until told to stop, or until the supervisor is gone. `parent`: the channel to it.

    An error at the start is the supervisor's to tell: it is sent there and not raised. Raises what ends a worker that
    serves.
    """
    worker = _Worker(parent, stopping, hurry)
    serving = False

    def ready(info: RelayInfo) -> None:
        nonlocal serving
        serving = True
        worker.channel.tell({"t": "serving", **asdict(info)})

    try:
        assigned = await worker.assigned
        config = assigned.config
        logs.configure("relay", config.observe.log_level, config.observe.log_format, worker=assigned.index)
        await worker.told_to_serve.wait()
        beating = asyncio.get_running_loop().create_task(worker.beat())
        try:
            await serve(config, ready, stopping, hurry, worker.membership)
        finally:
            beating.cancel()
    except ArcbridgeError as error:
        if serving:
            raise
        worker.channel.tell({"t": "failed", "message": error.message, "usage": isinstance(error, ConfigError)})
    finally:
        worker.close()
