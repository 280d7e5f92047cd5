"""The supervisor of a relay with several processes: it starts the workers, and speaks for the relay to the operator.

It holds the data directory's lock and the port's number, but accepts nothing and sees no session. It gives each worker
a channel to itself and one to each sibling (`channel.pair`), starts one again that died, passes on the drain, answers
/metrics, /livez and /readyz for all, and is ready once all of them serve.

Rules:

1. A worker that fails while the relay starts ends the relay, with that worker's error, told once.
2. A worker that dies later is started again: at once the first time, then after longer and longer, at most `LONGEST`.
   The others go on; the relay is ready as long as one serves, for the kernel brings connections to those that live.
3. A worker that has been silent for `SILENT` is killed: its loop hangs, and with it a part of the port.
4. No worker outlives the supervisor. They inherit its lock, so that a next relay on the same data waits for the last.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import asdict
from enum import Enum
from typing import Final

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError, StateError
from arcbridge.net.address import Address, parse_listen
from arcbridge.observe import logging as logs
from arcbridge.observe.aggregated_metrics import AggregatedMetrics, Snapshot
from arcbridge.observe.health import Checks
from arcbridge.observe.reloads import Outcome, merged
from arcbridge.observe.server import ObserveServer
from arcbridge.relay.audit.log import RelayAudit
from arcbridge.relay.data_dir import instance_lock
from arcbridge.relay.listener import bind
from arcbridge.relay.membership import enter_audit, log_warnings, open_to_operator, record_start
from arcbridge.relay.operations import Question, Row, rows_of
from arcbridge.relay.processes.worker import Assignment, send_rows
from arcbridge.relay.reload import RELOADABLE
from arcbridge.relay.service import RelayInfo
from arcbridge.relay.settings import required, worker_count
from arcbridge.relay.siblings.channel import Channel, Head, Received, in_parts, pair
from arcbridge.settings.config import RelayConfig
from arcbridge.tasks import TaskSet, cancel_and_wait, in_time, within

START_DEADLINE: Final = 60.0
"""Seconds for a worker to serve. It takes one; a busy machine, or a lock that an operator holds, makes it more."""
FIRST_DELAY: Final = 0.1
LONGEST: Final = 30.0
HEALTHY: Final = 60.0
"""Seconds of life after which the next death is a new story."""
SILENT: Final = 30.0
DRAIN_DEADLINE: Final = 28.0
"""Seconds for the workers to go away: above what a drain takes, and below the 30 after which service managers kill."""
ASK_DEADLINE: Final = 5.0
"""Seconds for the workers to answer an operator's question; one that does not is missing from the answer."""
GATHER_DEADLINE: Final = 1.0
"""Seconds for the workers to tell their metrics; of one that does not, those of the last time are shown."""
RELOAD_DEADLINE: Final = 10.0
"""Seconds for the workers to put other settings in force, which takes milliseconds."""
_LOOK: Final = 1.0

_PREFIX: Final = "arcbridge_relay_"
_RULES: Final[dict[str, Callable[..., float]]] = {
    f"{_PREFIX}draining": max,
    f"{_PREFIX}check_ok": min,
    f"{_PREFIX}revocations_missing": max,
    f"{_PREFIX}ledger_left_out": max,
    f"{_PREFIX}clusters_awaited": max,
    f"{_PREFIX}certificate_expires_timestamp_seconds": min,
    f"{_PREFIX}ca_rotation_step_timestamp_seconds": max,
    f"{_PREFIX}users_revoked": max,
    f"{_PREFIX}cluster_check_ok": min,
    f"{_PREFIX}cluster_certificate_expires_timestamp_seconds": max,
    f"{_PREFIX}clusters_without_metrics": max,
}
_CODE: Final = (
    "import sys; sys.path[:] = sys.argv[4].split(chr(0x1f)); from arcbridge.cli.worker import main; "
    "sys.exit(main(sys.argv[1:]))"
)

log = structlog.get_logger("arcbridge.relay")


class WorkerState(Enum):
    """Of one worker's process."""

    STARTING = "starting"
    SERVING = "serving"
    GONE = "gone"


async def supervise(
    config: RelayConfig,
    ready: Callable[[RelayInfo], None],
    stopping: asyncio.Event,
    hurry: asyncio.Event,
    *,
    reread: Callable[[], RelayConfig] | None = None,
) -> None:
    """Serve as `relay.service.serve` does, with several processes: the same arguments, errors and end."""
    checked = required(config)
    log_warnings(checked.problems)
    count = worker_count(config)
    async with AsyncExitStack() as stack:
        lock = stack.enter_context(instance_lock(config.data_dir))
        held = _hold(checked.listen)
        stack.callback(held.close)
        audit = enter_audit(checked, stack)
        supervisor = Supervisor(config, count, held.getsockname()[1], lock, audit)
        stack.push_async_callback(supervisor.kill)
        await supervisor.start()
        metrics = supervisor.metrics
        observe = ObserveServer(
            config.observe.listen,
            metrics,
            supervisor.checks,
            gather=supervisor.gather,
            toggled=lambda: supervisor.tell_all({"t": "toggle"}),
        )
        observing = await open_to_operator(
            config, observe, metrics, audit, supervisor.ask, supervisor.reload, reread, stack
        )
        first = supervisor.info
        info = RelayInfo(str(first["address"]), str(first["public_address"]), str(first["relay_ca_pin"]), observing)
        log.info("relay serving", **asdict(info), workers=count)
        record_start(audit, checked, info.address, count)
        ready(info)
        await stopping.wait()
        await supervisor.stop(hurry)
    log.info("relay stopped", step="gone")


class _WorkerHandle:
    """One process, from its start to its end; its successor is another object."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = WorkerState.STARTING
        self.process: Process
        self.channel: Channel
        self.began = self.heard = time.monotonic()
        self.served_since = 0.0
        self.info: Head = {}
        self.error: ArcbridgeError | None = None
        """What it said before it ended without having served."""
        self.failures: dict[str, str] = {}
        self.snapshot: Snapshot = []
        self.gathered, self.parts = 0, b""
        """Of the snapshot that comes now: the number of the question, and the parts so far."""
        self.pairs: dict[int, int] = {}
        """The number of its channel to each sibling."""
        self.idle = False
        self.settings: RelayConfig | None = None
        """The supervisor's settings as of the last time this worker was told; identity compares."""

    @property
    def lives(self) -> bool:
        return self.state is not WorkerState.GONE

    def send(self, head: Head, body: bytes = b"") -> None:
        """`body` may be longer than a message: settings have as many users and groups as an operator likes."""
        for part, last in in_parts(body):
            self.channel.tell({**head, "last": last}, part)


class _WorkerAnswer:
    """What a worker answers to one question."""

    def __init__(self) -> None:
        self.whole: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        """The head of the last message, once that has come."""
        self.rows: list[Row] = []


class Supervisor:
    """`start`, then `stop`; `kill` in any case."""

    def __init__(self, config: RelayConfig, count: int, port: int, lock: int, audit: RelayAudit | None = None) -> None:
        """`port`: the one to listen on, which the caller holds. `lock`: a descriptor for the workers to inherit.
        `audit`: the log that workers' records are for."""
        self._audit = audit or RelayAudit("")
        self._audit_failure = ""
        """Why it cannot be written, as workers were told last."""
        self._config = config
        self._count = count
        self._listen = Address(parse_listen(config.listen).host, port)
        self._lock = lock
        self._workers: dict[int, _WorkerHandle] = {}
        self._pairs = 0
        self._started = False
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks = TaskSet()
        self._attempts = [0] * count
        self._asked = 0
        self._answers: dict[int, _WorkerAnswer] = {}
        """Those that workers have not sent whole, by the number of the question."""
        self._gathering: asyncio.Task[list[_WorkerAnswer]] | None = None
        self.restarts = 0
        self.info: Head = {}
        """What the first worker said when it served."""
        self.metrics = AggregatedMetrics(
            "relay",
            lambda: [worker.snapshot for worker in self._alive()],
            rules=_RULES,
            own=frozenset({f"{_PREFIX}ready", f"{_PREFIX}reloads_total"}),
        )
        self.checks = Checks()
        self._register()

    def _register(self) -> None:
        gauge = self.metrics.gauge
        gauge("workers", "Processes that this relay is to have.", None, lambda: self._count)
        gauge("workers_serving", "Processes that serve.", None, lambda: len(self._serving()))
        self.metrics.counter("worker_restarts_total", "Workers that were started again after they had died.", None,
                             lambda: self.restarts)  # fmt: skip
        gauge(
            "worker_sessions",
            "Sessions that are being pumped, by worker.",
            {"worker": tuple(str(index) for index in range(self._count))},
            lambda: {str(worker.index): _read(worker.snapshot, f"{_PREFIX}pumps_open") for worker in self._alive()},
        )
        self.checks.add("workers", lambda: None if self._serving() else "no worker serves")
        self.checks.add("registry", lambda: self._failure("registry"))
        self.checks.add("draining", lambda: "this relay is going away" if self._stopping.is_set() else None)

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all workers and wait until all serve. Raises the error of the first that cannot."""
        for index in range(self._count):
            await self._launch(index)
        self._introduce(range(self._count))
        self._tasks.start(self._look())
        async with within(START_DEADLINE, StateError(f"not all workers served within {START_DEADLINE:.0f} s")):
            while len(self._serving()) < self._count:
                for worker in self._workers.values():
                    if not worker.lives:
                        raise worker.error or StateError(
                            f"worker {worker.index} ended while the relay started ({_how(worker.process)}): "
                            "its log has the cause"
                        )
                await self._change()
        self._started = True
        self.info = self._workers[0].info

    async def stop(self, hurry: asyncio.Event) -> None:
        """Have all workers drain, together; kill those that do not end."""
        self._stopping.set()
        self.tell_all({"t": "stop"})
        hurrying = asyncio.get_running_loop().create_task(self._pass_on(hurry))
        try:
            async with asyncio.timeout(DRAIN_DEADLINE):
                while any(worker.lives for worker in self._workers.values()):
                    self._close_together()
                    await self._change()
        except TimeoutError:
            log.error("workers did not go away in time", workers=[worker.index for worker in self._alive()])
        finally:
            hurrying.cancel()

    async def kill(self) -> None:
        """End every process that is left, and wait for it."""
        self._stopping.set()
        for worker in self._alive():
            _kill(worker.process)
        for worker in self._workers.values():
            await worker.process.wait()
            worker.channel.close()
        await cancel_and_wait(*self._tasks)

    def tell_all(self, head: Head) -> None:
        for worker in self._alive():
            worker.channel.tell(head)

    # -- one worker ------------------------------------------------------------------------------------------------

    async def _launch(self, index: int) -> None:
        """Start a process and tell it what it is; it serves once it was introduced."""
        worker = _WorkerHandle(index)
        try:
            ours, theirs = pair()
        except OSError as error:  # no descriptor is left: it is tried again
            raise StateError(f"a worker cannot be started: {error.strerror}") from error
        worker.channel = Channel(
            ours, lambda message: self._received(worker, message), lambda: self._channel_closed(worker)
        )
        arguments = ("arcbridge-relay-worker", str(index), str(theirs.fileno()), chr(0x1F).join(sys.path))
        try:
            worker.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _CODE, *arguments),
                stdin=DEVNULL,
                pass_fds=(theirs.fileno(), self._lock),
                # A terminal's Ctrl-C is for the supervisor, which passes it on once.
                start_new_session=True,
            )
        except BaseException as error:
            worker.channel.close()
            if isinstance(error, OSError):
                raise StateError(f"a worker cannot be started: {error.strerror}") from error
            raise
        finally:
            theirs.close()
        self._workers[index] = worker
        worker.channel.start()
        assignment = Assignment(self._config, index, self._count, self._listen.host, self._listen.port)
        worker.settings = self._config
        worker.send({"t": "assign"}, pickle.dumps(assignment))
        self._tasks.start(self._watch(worker))

    def _introduce(self, new: Iterable[int]) -> None:
        """Connect these workers with all others, then tell them to serve."""
        workers = [self._workers[index] for index in new]
        for worker in workers:
            for other in self._alive():
                if other is not worker and other.index not in worker.pairs:
                    self._connect(worker, other)
        for worker in workers:
            worker.channel.tell({"t": "serve", "siblings": len(worker.pairs)})

    def _connect(self, one: _WorkerHandle, other: _WorkerHandle) -> None:
        self._pairs += 1
        ends = pair()
        for worker, peer, end in ((one, other, ends[0]), (other, one, ends[1])):
            worker.pairs[peer.index] = self._pairs
            worker.channel.tell({"t": "peer", "worker": peer.index, "pair": self._pairs}, give=end)

    async def _watch(self, worker: _WorkerHandle) -> None:
        """Wait for a worker's end, and start another in its place."""
        await worker.process.wait()
        # Its last words may not have been heard yet.
        worker.channel.read_rest()
        worker.state = WorkerState.GONE
        worker.channel.close()
        self.metrics.keep(worker.snapshot)
        worker.snapshot = []
        self._changed.set()
        for other in self._workers.values():
            if other.pairs.get(worker.index) == worker.pairs.get(other.index):
                other.pairs.pop(worker.index, None)
        if self._stopping.is_set() or not self._started:
            return
        how = _how(worker.process)
        lasted = time.monotonic() - worker.served_since if worker.served_since else 0.0
        if lasted >= HEALTHY:
            self._attempts[worker.index] = 0
        delay = min(FIRST_DELAY * 2.0 ** self._attempts[worker.index], LONGEST)
        self._attempts[worker.index] = min(self._attempts[worker.index] + 1, 32)
        reason = worker.error.message if worker.error is not None else how
        log.error("worker died", index=worker.index, pid=worker.process.pid, reason=reason, restart_in=delay)
        while True:
            await asyncio.sleep(delay)
            if self._stopping.is_set():
                return
            try:
                await self._launch(worker.index)
                break
            except StateError as error:
                log.error("worker not started again", index=worker.index, reason=error.message)
                delay = LONGEST
        self.restarts += 1
        self._introduce([worker.index])
        if self._stopping.is_set():  # while it was being launched, so that it has not heard of that
            self._workers[worker.index].channel.tell({"t": "stop"})

    async def _look(self) -> None:
        """Kill workers that are silent, or do not come to serve."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK)
            if (failure := self._audit.failure) != self._audit_failure:
                self._audit_failure = failure
                self.tell_all({"t": "audit", "failure": failure})
            now = time.monotonic()
            # In a container that was paused the clock went on, and this process may look before a worker could send.
            stood_still, looked = max(now - looked - _LOOK, 0.0), now
            for worker in self._alive():
                worker.heard = min(worker.heard + stood_still, now)
                worker.began = min(worker.began + stood_still, now)
                if worker.state is WorkerState.SERVING and now - worker.heard > SILENT:
                    log.error("worker killed", index=worker.index, pid=worker.process.pid, reason="silent")
                    _kill(worker.process)
                elif worker.state is WorkerState.STARTING and now - worker.began > START_DEADLINE:
                    log.error("worker killed", index=worker.index, pid=worker.process.pid, reason="does not serve")
                    _kill(worker.process)

    # -- what workers say ------------------------------------------------------------------------------------------

    def _received(self, worker: _WorkerHandle, message: Received) -> None:
        head = message.head
        worker.heard = time.monotonic()
        match head["t"]:
            case "serving":
                worker.info = head
                worker.state = WorkerState.SERVING
                worker.served_since = worker.heard
                if self._audit_failure:
                    worker.channel.tell({"t": "audit", "failure": self._audit_failure})
                if worker.settings is not self._config:
                    # A reload came while it started, and does not wait for its answer.
                    self._asked += 1
                    worker.send({"t": "reload", "n": self._asked}, pickle.dumps(self._config))
                    worker.settings = self._config
                if self._started:
                    log.info("worker serves again", index=worker.index, pid=worker.process.pid)
            case "failed":
                kind = ConfigError if head["usage"] else StateError
                worker.error = kind(str(head["message"]))
            case "audit":
                self._record(worker, int(head["n"]), message.body.decode("utf-8", "replace"))
            case "beat":
                worker.failures = dict(head["failures"])
            case "metrics":
                if head["n"] != worker.gathered:
                    worker.gathered, worker.parts = head["n"], b""
                worker.parts += message.body
                if head["last"]:
                    worker.snapshot, worker.parts = json.loads(worker.parts), b""
                    self._answered(head)
            case "answered":
                self._answered(head, rows_of(message.body), last=head["last"])
            case "question":
                self._tasks.start(self._reply(worker, int(head["n"]), head["question"]))
            case "reloaded":
                if not self._answered(head) and "error" in head:
                    # No reload waits for this answer: the worker started during one, or answered too late.
                    log.error("settings not reloaded", index=worker.index, reason=head["error"])
            case "lost":
                self._reconnect(worker, int(head["worker"]), int(head["pair"]))
            case "idle":
                worker.idle = True
                if not self._stopping.is_set():
                    # It goes away alone: an operator has sent it a signal.
                    worker.channel.tell({"t": "close"})
        if message.sock is not None:
            message.sock.close()
        self._changed.set()

    def _channel_closed(self, worker: _WorkerHandle) -> None:
        """Bury a worker whose channel has closed: it is dying, or cannot be told anything any more."""
        process = getattr(worker, "process", None)
        if process is not None and worker.lives and process.returncode is None:
            self._tasks.start(self._bury(worker))

    async def _bury(self, worker: _WorkerHandle) -> None:
        if not await in_time(worker.process.wait(), _LOOK):
            _kill(worker.process)

    def _record(self, worker: _WorkerHandle, number: int, line: str) -> None:
        """Write a worker's line, and answer where it waits for that."""
        if not number:
            self._audit.put(line)
            return
        self._audit.put_before(
            lambda: line,
            lambda refusal: worker.channel.tell({"t": "recorded", "n": number, "refusal": refusal}),
            lambda _: None,
        )

    def _reconnect(self, worker: _WorkerHandle, index: int, number: int) -> None:
        """Give two workers another channel when theirs broke, if both live."""
        other = self._workers.get(index)
        if other is None or not other.lives or worker.pairs.get(index) != number:
            return
        if other.process.returncode is None and not self._stopping.is_set():
            self._tasks.start(self._reconnect_later(worker, other, number))

    async def _reconnect_later(self, worker: _WorkerHandle, other: _WorkerHandle, number: int) -> None:
        """Wait a moment first: mostly the other one is dying, and that is just not known yet."""
        await asyncio.sleep(_LOOK)
        if worker.lives and other.lives and worker.pairs.get(other.index) == number:
            log.warning("workers connected anew", workers=[worker.index, other.index])
            self._connect(worker, other)

    # -- all of them -----------------------------------------------------------------------------------------------

    async def gather(self) -> None:
        """Have the workers tell their metrics, at most once at a time; takes at most `GATHER_DEADLINE`."""
        if self._gathering is None or self._gathering.done():
            asking = self._ask_all({"t": "metrics"}, GATHER_DEADLINE)
            self._gathering = asyncio.get_running_loop().create_task(asking)
        await asyncio.shield(self._gathering)

    async def ask(self, question: Question) -> list[Row]:
        """Put an operator's question to all workers that serve; the rows of all."""
        answers = await self._ask_all({"t": "ask", "question": dict(question)}, ASK_DEADLINE)
        return [row for answer in answers for row in answer.rows]

    async def _reply(self, worker: _WorkerHandle, number: int, question: Question) -> None:
        """Answer a worker, which asks for an administrator."""
        await send_rows(worker.channel, {"t": "reply", "n": number}, await self.ask(question))

    async def reload(self, reread: Callable[[], RelayConfig]) -> Outcome:
        """Read the settings again and have every worker put them in force; those that start later begin with them.

        The settings are checked here first: a mistake is logged once and reaches no worker. Raises `ArcbridgeError`.
        """
        config = reread()
        log_warnings(required(config).problems)
        self._config = merged(self._config, config, RELOADABLE)
        for worker in self._serving():
            worker.settings = self._config
        logs.reconfigure_level(config.observe.log_level)
        answers = await self._ask_all({"t": "reload"}, RELOAD_DEADLINE, pickle.dumps(config))
        heads = [answer.whole.result() for answer in answers if answer.whole.done()]
        failed = [str(head["error"]) for head in heads if "error" in head]
        if stayed := len(answers) - len(heads) + len(failed):
            why = failed[0] if failed else "no answer; look for `worker died`"
            raise StateError(f"{stayed} of {len(answers)} workers did not take them over, the others did: {why}")
        taken = dict.fromkeys(name for head in heads for name in head["taken"])
        restart = dict.fromkeys(name for head in heads for name in head["needs_restart"])
        return Outcome(tuple(taken), tuple(restart))

    async def _ask_all(self, head: Head, deadline: float, body: bytes = b"") -> list[_WorkerAnswer]:
        """Ask all workers that serve; return what each answers within `deadline` seconds. Sends before it waits."""
        asked: dict[int, _WorkerAnswer] = {}
        for worker in self._serving():
            self._asked += 1
            asked[self._asked] = self._answers[self._asked] = _WorkerAnswer()
            worker.send({**head, "n": self._asked}, body)
        try:
            if asked:
                await asyncio.wait([answer.whole for answer in asked.values()], timeout=deadline)
            return list(asked.values())
        finally:
            for number in asked:
                del self._answers[number]

    def _answered(self, head: Head, rows: Iterable[Row] = (), *, last: bool = True) -> bool:
        """Note what a worker has answered; return whether something waits for it."""
        answer = self._answers.get(int(head["n"]))
        if answer is not None:
            answer.rows += rows
            if last and not answer.whole.done():
                answer.whole.set_result(head)
        return answer is not None

    def _close_together(self) -> None:
        alive = self._alive()
        if alive and all(worker.idle for worker in alive):
            self.tell_all({"t": "close"})

    async def _pass_on(self, hurry: asyncio.Event) -> None:
        await hurry.wait()
        self.tell_all({"t": "hurry"})

    def _alive(self) -> list[_WorkerHandle]:
        return [worker for worker in self._workers.values() if worker.lives]

    def _serving(self) -> list[_WorkerHandle]:
        return [worker for worker in self._workers.values() if worker.state is WorkerState.SERVING]

    def _failure(self, name: str) -> str | None:
        return next((worker.failures[name] for worker in self._serving() if name in worker.failures), None)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _hold(listen: Address) -> socket.socket:
    """Hold a port that no other process has: bind it alone, which fails also where another relay of this user shares
    it, then bind it as a shared one, without listening.

    Raises `ConfigError` that names the setting.
    """
    alone = bind(listen)
    port = alone.getsockname()[1]
    alone.close()
    return bind(Address(listen.host, port), shared=True, accept=False)


def _kill(process: Process) -> None:
    try:
        process.kill()
    except ProcessLookupError:
        # It has just ended.
        pass


def _how(process: Process) -> str:
    code = process.returncode
    if code is None:
        return "still running"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _read(snapshot: Snapshot, name: str) -> float:
    series = [entry["series"] for entry in snapshot if entry["name"] == name]
    return float(series[0][0][1]) if series else 0.0
