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
    audit      both          a line for the audit log, whose `n` is 0 where no answer is awaited; why that log cannot be
                             written, empty where it can
    recorded   to worker     the line is written, or why what waits for it must not go on
    lost       to supervisor the channel to a sibling broke
    idle       to supervisor ready to close the port
    question   to supervisor a question of an administrator, for all workers; `reply` to worker: its rows

A supervisor that is gone ends its workers at once: they would not be started again, counted or ended any more, and
their port and lock are needed by the next one. Their sessions resume there.

`WorkerMembership` is what the service asks: it shares the limits out, waits for the siblings before the port opens, and
keeps what the supervisor asks for.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import pickle
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from typing import Final

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError, StateError
from arcbridge.net.address import Address
from arcbridge.observe import logging as logs
from arcbridge.observe.aggregated_metrics import snapshot
from arcbridge.observe.server import ObserveServer
from arcbridge.relay.audit.log import WorkerAudit
from arcbridge.relay.fleet.workers import WorkersFleet
from arcbridge.relay.membership import Membership, Service
from arcbridge.relay.operations import Question, Row, parts, rows_of
from arcbridge.relay.service import RelayInfo, serve
from arcbridge.relay.settings import CheckedRelay, required
from arcbridge.relay.siblings.channel import Channel, ChannelClosed, Head, Received, in_parts
from arcbridge.relay.siblings.group import Siblings
from arcbridge.relay.siblings.handover import Handovers
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig, RelayUserLimitsConfig
from arcbridge.tasks import TaskSet, in_time

BEAT: Final = 1.0
"""Seconds between two `beat`s."""
DEADLINE: Final = 8.0
"""Seconds for an answer of all workers; the supervisor waits five for each of them."""
ANSWERS: Final = 1024 * 1024
"""Bytes of answers to operators' questions that wait for the supervisor, above which no more are added."""

OF_ALL: Final = ("unauthenticated", "unauthenticated_per_address", "sessions", "agents", "pending_joins",
                 "agents_per_second", "connections_per_second_per_address")  # fmt: skip
"""Limits of which each worker has an equal part."""
OF_ONE_USER: Final = ("sessions_per_user", "joins_per_minute_per_user", "requests_per_minute_per_user")
"""Limits of one user, of which each worker has a part that is larger by what chance takes."""

log = structlog.get_logger("arcbridge.relay")


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told first. It travels pickled: from the supervisor to a process of its own and nowhere else."""

    config: RelayConfig
    index: int
    count: int
    host: str
    port: int


class WorkerMembership(Membership):
    """One of `count` processes that listen on `listen`."""

    serves = "worker serving"
    shares_port = True
    siblings_deadline = 2.0
    """Seconds for the siblings to send which agents they have: without them a client would be refused for want of
    one."""

    def __init__(
        self,
        index: int,
        count: int,
        listen: Address,
        siblings: Siblings,
        wait_to_close: Callable[[asyncio.Event], Awaitable[None]],
        record: Callable[[str, int], None] = lambda line, number: None,
    ) -> None:
        """`wait_to_close`: see `Membership.wait_to_close`. `record`: gives the supervisor a line for the audit log."""
        super().__init__()
        self._record = record
        self.index = index
        self.count = count
        self.siblings = siblings
        self.fleet = WorkersFleet(siblings)
        self.detour = Handovers(siblings)
        self.expected = 0
        """Siblings that lived when this one was started."""
        self.service: Service | None = None
        """What the supervisor asks for; None until this process serves."""
        self.ask_supervisor: Callable[[Question], Awaitable[list[Row]]]
        """Asks all workers."""
        self._listen = listen
        self._wait_to_close = wait_to_close

    def enter(self, checked: CheckedRelay, stack: AsyncExitStack) -> None:
        """Record through the supervisor, which has logged the warnings, and holds the lock."""
        assert self.index is not None
        self.audit: WorkerAudit = WorkerAudit(
            self._record, on_failure=checked.config.audit.on_failure, worker=self.index
        )

    def serving(self, checked: CheckedRelay, address: str) -> None:
        """Do nothing: the supervisor records that the relay serves."""

    def address(self, configured: Address) -> Address:
        return self._listen

    async def wait_to_close(self, hurry: asyncio.Event) -> None:
        await self._wait_to_close(hurry)

    def share(self, limits: RelayLimitsConfig) -> RelayLimitsConfig:
        """Return this process' part of what the whole relay may hold: an equal one, rounded up, because the kernel
        spreads connections evenly; shared counters would cost a message between processes for each connection.

        A user's few connections are spread less evenly than those of all, so a user's part has three standard
        deviations more: a user within the limit is hardly ever refused because the kernel chose one worker too often.
        At all workers together a user may have more than the limit says, by as much as these deviations at most.
        """

        def part(of: int) -> int:
            return max(-(-of // self.count), 1)

        def user_part(of: int) -> int:
            return min(part(of) + math.ceil(3 * math.sqrt(of / self.count)), of)

        def parts(of: dict[str, RelayUserLimitsConfig]) -> dict[str, RelayUserLimitsConfig]:
            return {
                name: RelayUserLimitsConfig(user_part(one.sessions), user_part(one.joins_per_minute))
                for name, one in of.items()
            }

        shared = {name: part(getattr(limits, name)) for name in OF_ALL}
        shared |= {name: user_part(getattr(limits, name)) for name in OF_ONE_USER}
        groups, users, actors = parts(limits.groups), parts(limits.users), parts(limits.actors)
        return replace(limits, **shared, groups=groups, users=users, actors=actors)

    async def siblings_ready(self) -> None:
        if not await self.siblings.synced(self.expected, self.siblings_deadline):
            log.warning("not all other workers have answered yet", expected=self.expected, found=len(self.siblings))

    async def ask(self, service: Service, question: Question) -> list[Row]:
        return await self.ask_supervisor(question)

    async def publish(self, service: Service, stack: AsyncExitStack) -> str:
        """Keep what the supervisor asks for: it answers the operator for all processes."""
        observe = ObserveServer("", service.metrics, service.checks)
        await observe.start()
        stack.push_async_callback(observe.stop)
        self.service = service
        return ""

    def snapshot(self) -> bytes:
        """Return the metrics, as JSON of an `observe.aggregated_metrics.Snapshot`."""
        return json.dumps([] if self.service is None else snapshot(self.service.metrics)).encode()

    def failures(self) -> dict[str, str]:
        """Return the readiness checks that fail now."""
        return {} if self.service is None else self.service.checks.failures()


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
        self._answers = TaskSet()
        self._asked: dict[int, tuple[list[Row], asyncio.Future[None]]] = {}
        """Questions to all workers, by number: the rows that have come, and whether that is all."""
        self._numbers = itertools.count()
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

    def record(self, line: str, number: int) -> None:
        """Give the supervisor a line for the audit log; with a number it answers once that is written."""
        self.channel.tell({"t": "audit", "n": number}, line.encode("utf-8", "replace"))

    async def ask(self, question: Question) -> list[Row]:
        """Put a question to all workers, through the supervisor; return the rows of all. Raises `StateError`."""
        number, rows = next(self._numbers), list[Row]()
        complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked[number] = rows, complete
        try:
            self.channel.tell({"t": "question", "n": number, "question": dict(question)})
            if not await in_time(complete, DEADLINE):
                raise StateError("the other processes of the relay do not answer: try again in some seconds")
        finally:
            del self._asked[number]
        return rows

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
                    assigned.index, assigned.count, listen, self._siblings, self.wait_for_all, self.record
                )
                self.membership.ask_supervisor = self.ask
                self.assigned.set_result(assigned)
            case "peer" if message.sock is not None:
                self._siblings.connect(int(head["worker"]), int(head["pair"]), message.sock)
            case "serve":
                self.membership.expected = int(head["siblings"])
                self.told_to_serve.set()
            case "metrics":
                for part, last in in_parts(self.membership.snapshot()):
                    self.channel.tell({"t": "metrics", "n": head["n"], "last": last}, part)
            case "ask":
                self._answers.start(self._answer(int(head["n"]), head["question"]))
            case "reply" if (asked := self._asked.get(int(head["n"]))) is not None:
                asked[0].extend(rows_of(message.body))
                if head["last"] and not asked[1].done():
                    asked[1].set_result(None)
            case "reload":
                self._reload(int(head["n"]), pickle.loads(self._whole(message.body)))
            case "audit":
                # One that does not serve yet is told once it does.
                audit = self.membership.audit if hasattr(self, "membership") else None
                if isinstance(audit, WorkerAudit):
                    audit.supervisors_failure = str(head["failure"])
            case "recorded":
                self.membership.audit.recorded(int(head["n"]), str(head["refusal"]))
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
            await send_rows(self.channel, {"t": "answered", "n": number}, rows)

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


async def send_rows(channel: Channel, head: Head, rows: Sequence[Row]) -> None:
    """Send the rows of an answer, as fast as the other process reads; what this one is for goes on in between."""
    for part, last in parts(rows):
        try:
            await channel.room(ANSWERS)
        except ChannelClosed:
            return
        channel.tell({**head, "last": last}, part)
        await asyncio.sleep(0)
