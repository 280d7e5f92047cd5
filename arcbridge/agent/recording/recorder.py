"""Decides which sessions are recorded, begins and ends their recordings, and writes the index: a record in the audit.

A session that must be recorded and cannot is refused here, before anything leaves for the API server; so is what could
run a command past the recording: SPDY, other protocols, and a kubelet's own paths. One thread seals and writes for all
sessions. Invariant: a file gets its name only behind the record that has its SHA-256, so that a file without a record
is one that the next start of an agent finishes and records.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from arcbridge.agent.audit.record import AuditRecord, left_behind_line
from arcbridge.agent.kube.channel_splice import message
from arcbridge.agent.kube.request_info import RequestInfo, is_true, query_values
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upgrade import CHANNELS, chosen_protocol
from arcbridge.agent.recording.cast import CastWriter
from arcbridge.agent.recording.channels import STDERR, STDOUT
from arcbridge.agent.recording.recorded_splice import RecordedSplice
from arcbridge.agent.recording.rules import RecordingRules
from arcbridge.agent.recording.sealed_file import ENDING, FinishedFile, RecordingFile, reason_of
from arcbridge.agent.recording.session_recording import SessionRecording
from arcbridge.agent.recording.spool import Spool
from arcbridge.agent.recording.writer_thread import WriterThread
from arcbridge.errors import ArcbridgeError
from arcbridge.mux.splice import SpliceResult
from arcbridge.mux.stream import StreamTransport
from arcbridge.sealing.age import parse_recipient
from arcbridge.tasks import TaskSet

if TYPE_CHECKING:
    from arcbridge.agent.audit import AuditLog
    from arcbridge.agent.kube.authorize import Plan
    from arcbridge.agent.kube.caller import Caller
    from arcbridge.agent.kube.upgrade import UpgradeRequest
    from arcbridge.agent.recording.bucket import RecordingBucket
    from arcbridge.identity.claims import Identity
    from arcbridge.observe.metrics import Metrics
    from arcbridge.settings.config import RecordingConfig

BEGIN_DEADLINE: Final = 5.0
"""Seconds for the first write of a recording, for which a session waits."""
CLOSE_DEADLINE: Final = 5.0
"""Seconds for the last writes when the agent stops."""
MAX_COMMAND: Final = 4096
"""Characters of a command line in a recording's header."""
REFUSALS: Final = ("fault", "client")
"""Why a session is refused: its recording cannot be written, or what its client asks for cannot be recorded."""
_NOTICE: Final = "arcbridge: this session is recorded"
_UNSUITABLE: Final = (
    "this session has to be recorded, and a recording needs WebSocket with v5.channel.k8s.io or v4.channel.k8s.io: use "
    "kubectl 1.31 or newer, or set KUBECTL_REMOTE_COMMAND_WEBSOCKETS=true for 1.29 and 1.30"
)
_KUBELET: Final = (
    "sessions of this user have to be recorded, and what a kubelet runs for a request through nodes/proxy is not: use "
    "`kubectl exec` or `kubectl attach`"
)

log = structlog.get_logger("arcbridge.recording")


class Recorder:
    """The recordings of one agent. Made in the event loop; `close()` must be awaited before the audit log's."""

    def __init__(self, config: RecordingConfig, audit: AuditLog) -> None:
        """Raises SealingError."""
        assert config.directory is not None  # `agent.settings` has looked
        self._rules = RecordingRules(config.rules)
        recipients = [parse_recipient(one) for one in config.recipients]
        self._spool = Spool(config.directory, config.directory_bytes, recipients)
        self._most = config.session_bytes
        self._audit = audit
        self._thread = WriterThread()
        self._tasks = TaskSet()
        """What `close` waits for."""
        self._failure = ""
        """Why the last recording could not begin; empty where it could."""
        self.recorded = 0
        self.open = 0
        self.failed = 0
        self.unrecorded = 0
        """Sessions that went on without a recording that they were to have."""
        self.refused = dict.fromkeys(REFUSALS, 0)
        """Sessions by why they were refused."""
        self.bucket: RecordingBucket | None = None
        if config.bucket.endpoint:
            from arcbridge.agent.recording.bucket import RecordingBucket

            self.bucket = RecordingBucket(config.bucket, self._spool)
        self._tasks.start(self._recover())

    def register(self, metrics: Metrics) -> None:
        """Tell `metrics` where to read."""
        counter, gauge = metrics.counter, metrics.gauge
        counter("recordings_total", "Recordings of exec and attach that are finished.", None, lambda: self.recorded)
        gauge("recordings_open", "Sessions that are being recorded.", None, lambda: self.open)
        counter("recordings_failed_total", "Recordings that failed, broke off, or could not be finished.", None,
                lambda: self.failed + self._spool.unfinished)  # fmt: skip
        counter("recordings_refused_total", "Sessions refused because they must be recorded and could not be.",
                {"reason": REFUSALS}, lambda: self.refused)  # fmt: skip
        counter("recordings_missing_total", "Sessions that went on without the recording that they were to have.",
                None, lambda: self.unrecorded)  # fmt: skip
        gauge("recordings_directory_bytes", "Bytes of recordings in the agent's directory, as far as it knows.", None,
              lambda: self._spool.used)  # fmt: skip
        if self.bucket is not None:
            self.bucket.register(metrics)

    # -- before a request leaves ----------------------------------------------------------------------------------

    def check(self, caller: Caller, record: AuditRecord, plan: Plan) -> None:
        """Refuse what has to be recorded and cannot be. Raises RequestRefusal."""
        info, upgrade = plan.wanted.info, plan.upgrade
        if _reaches_kubelet(info) and (upgrade is not None or plan.facts.method not in ("GET", "HEAD")):
            demand = self._rules.of(_recorded_as(caller, record), None)
            if demand is not None and demand.required:
                raise self._refuse("client", 403, _KUBELET)
        elif upgrade is not None and _is_session(info) and not _is_suitable(upgrade):
            demand = self._rules.of(_recorded_as(caller, record), info.namespace)
            if demand is None:
                return
            if demand.required:
                if not self._failure:
                    raise self._refuse("client", 403, _UNSUITABLE)
                # kubectl's try by WebSocket has counted as a fault, and SPDY never finds out that the fault is over.
                raise self._cannot("client", self._failure)
            self._goes_without(record, "its protocol cannot be recorded")

    async def begin(self, caller: Caller, record: AuditRecord, plan: Plan) -> RecordedSession | None:
        """Begin the recording of a session that is about to leave; None where it has none. Raises RequestRefusal."""
        info, upgrade = plan.wanted.info, plan.upgrade
        if upgrade is None or not _is_session(info) or not _is_suitable(upgrade):
            return None
        identities = _recorded_as(caller, record)
        demand = self._rules.of(identities, info.namespace)
        if demand is None:
            return None
        text = CastWriter(time.monotonic())
        query = plan.facts.target.partition("?")[2]
        command = shlex.join(query_values(query, "command"))[:MAX_COMMAND].encode(errors="replace").decode()
        header = text.header(time.time(), f"{identities[0].username} in {info.namespace}/{info.name}", command)
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{record.request}"
        created = self._thread.submit(self._create, name, header, urgent=True)
        try:
            async with asyncio.timeout(BEGIN_DEADLINE):
                file = await asyncio.shield(created)
        except (ArcbridgeError, OSError) as error:  # TimeoutError is an OSError
            created.add_done_callback(self._drop)
            self._failure = self._late() if isinstance(error, TimeoutError) else reason_of(error)
            log.warning("recording cannot begin", reason=self._failure, required=demand.required)
            if demand.required:
                raise self._cannot("fault", self._failure) from error
            self._goes_without(record, self._failure)
            return None
        except BaseException:
            created.add_done_callback(self._drop)
            raise
        self._failure = ""
        self.open += 1
        recording = SessionRecording(demand, file, self._spool, text, self._thread, self._most, identities[0].username)
        recording.on_failure = lambda reason: self._note_failure(record, reason)
        return RecordedSession(recording, query)

    # -- the end --------------------------------------------------------------------------------------------------

    def finish(self, session: RecordedSession, record: AuditRecord) -> None:
        """End the recording of a session that is over, and write its record; of one that did not begin there is
        none."""
        self.open -= 1
        if session.began:
            self._tasks.start(self._finish(session.recording, record))
        else:
            self._tasks.start(_logged(session.recording.discard()))

    async def close(self) -> None:
        """Wait until what has ended is written, a while; the next agent process finishes the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_DEADLINE)
        if self.bucket is not None:
            await asyncio.to_thread(self.bucket.close)
        self._thread.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _create(self, name: str, header: bytes) -> RecordingFile:
        file = self._spool.create(name)
        try:
            self._spool.append(file, header)
        except BaseException:
            self._spool.discard(file)
            raise
        return file

    def _late(self) -> str:
        """Return why a recording could not begin in time."""
        if time.monotonic() - self._thread.progress < BEGIN_DEADLINE:
            return "it has more to record at once than it can write"
        return "its directory takes no data"

    def _drop(self, created: asyncio.Future[RecordingFile]) -> None:
        """Remove a file that came too late."""
        if not created.cancelled() and created.exception() is None:
            self._tasks.start(_logged(self._thread.submit(self._spool.discard, created.result())))

    async def _finish(self, recording: SessionRecording, record: AuditRecord) -> None:
        try:
            finished = await recording.finish()
        except (ArcbridgeError, OSError) as error:  # the next start of an agent finishes the file
            if not recording.failure:
                self._note_failure(record, reason_of(error))
            self._audit.put(record.recorded_line({"failure": reason_of(error)}))
            self._thread.submit(recording.file.leave, user=recording.user)
            return
        self.recorded += 1
        seconds = round(time.monotonic() - recording.began, 3)
        fields: dict[str, object] = {"seconds": seconds, "output_bytes": recording.output}
        if (code := recording.exit_code) is not None:
            fields["exit"] = code
        if recording.failure:
            fields["failure"] = recording.failure
        await self._index(
            recording.file,
            finished,
            lambda found: record.recorded_line({**found, **fields}),
            counted=bool(recording.failure),
            user=recording.user,
        )

    async def _recover(self) -> None:
        """Finish what a former process left, and index it; in a thread of its own, because whole files are read."""
        thread = WriterThread()
        try:
            # Listed before the first session makes a file: what this process leaves is for the next one.
            parts = await self._thread.submit(self._spool.left, urgent=True)
            await self._thread.submit(self._spool.measure)
            for part in parts:
                if (found := await thread.submit(self._spool.recover, part)) is not None:
                    await self._index_left(*found)
        except (ArcbridgeError, OSError) as error:
            self.failed += 1
            log.warning("recordings not looked through", reason=reason_of(error))
        finally:
            thread.close()

    async def _index_left(self, file: RecordingFile, finished: FinishedFile) -> None:
        request = finished.name.partition("-")[2].removesuffix(ENDING)
        fields = {} if file.whole else {"failure": "the agent ended"}
        if fields:
            self.failed += 1
            log.warning("recording broke off", file=finished.name)
        await self._index(
            file, finished, lambda found: left_behind_line(request, {**found, **fields}), counted=bool(fields)
        )

    async def _index(
        self,
        file: RecordingFile,
        finished: FinishedFile,
        line: Callable[[dict[str, object]], str],
        *,
        counted: bool,
        user: str = "",
    ) -> None:
        """Write the record of a file, and then give it its name. `counted`: it counts as one that failed already.
        `user`: whose turn it takes, so that the ends of one user's sessions hold up no other's."""
        where = finished.name if self.bucket is None else self.bucket.url(finished.name)
        found: dict[str, object] = {"file": where, "sha256": finished.sha256, "bytes": finished.size}
        try:
            await self._audit.put_and_wait(lambda: line(found))
            await self._thread.submit(file.publish, user=user)
        except (ArcbridgeError, OSError) as error:
            self.failed += not counted
            log.warning("recording not finished", file=finished.name, reason=reason_of(error))
            self._thread.submit(file.leave, user=user)
            return
        if self.bucket is not None:
            self.bucket.look_soon()

    def _note_failure(self, record: AuditRecord, reason: str) -> None:
        self.failed += 1
        log.warning("recording failed", session=record.subject.session, request=record.request, reason=reason)

    def _goes_without(self, record: AuditRecord, reason: str) -> None:
        self.unrecorded += 1
        self._audit.put(record.recorded_line({"failure": reason}))
        log.info("session not recorded", request=record.request, namespace=record.namespace, reason=reason)

    def _cannot(self, cause: str, reason: str) -> RequestRefusal:
        sentence = f"this session has to be recorded, and the agent cannot write its recording ({reason})"
        return self._refuse(cause, 503, f"{sentence}: tell the operator of this cluster's agent")

    def _refuse(self, cause: str, code: int, sentence: str) -> RequestRefusal:
        """`cause`: of REFUSALS."""
        self.refused[cause] += 1
        return RequestRefusal(code, sentence)


class RecordedSession:
    """A session that is recorded, from its request to its end."""

    def __init__(self, recording: SessionRecording, query: str) -> None:
        """`query`: of the request."""
        self.recording = recording
        self._query = query
        self.began = False
        """The API server has switched protocols."""

    def splice(
        self,
        upstream: asyncio.Transport,
        ended: Callable[[SpliceResult], None],
        stream: StreamTransport,
        record: AuditRecord,
        answer: bytes,
    ) -> tuple[RecordedSplice, bytes]:
        """Return what joins both sides, and what the caller gets behind the 101: a notice, on standard error or on the
        terminal. `answer`: header lines of the 101."""
        self.began = True
        protocol = chosen_protocol(answer)
        splice = RecordedSplice(upstream, ended, self.recording, stream, record, protocol)
        notice = self._notice()
        self.recording.start(splice, notice)
        if protocol not in CHANNELS:
            self.recording.fail("the API server chose a protocol that cannot be recorded")
        return splice, notice

    def _notice(self) -> bytes:
        text = _NOTICE + (", and what is typed in it" if self.recording.demand.typed_input else "")
        if is_true(self._query, "tty"):
            return message(STDOUT, (text + "\r\n").encode()) if is_true(self._query, "stdout") else b""
        return message(STDERR, (text + "\n").encode()) if is_true(self._query, "stderr") else b""


async def _logged(work: Awaitable[None]) -> None:
    try:
        await work
    except (ArcbridgeError, OSError) as error:
        log.warning("recording not removed", reason=reason_of(error))


def _is_session(info: RequestInfo) -> bool:
    return info.resource == "pods" and not info.group and info.subresource in ("exec", "attach")


def _reaches_kubelet(info: RequestInfo) -> bool:
    """Return whether a request goes to a kubelet, of which some paths run commands."""
    return info.resource == "nodes" and not info.group and (info.subresource == "proxy" or info.verb == "proxy")


def _is_suitable(upgrade: UpgradeRequest) -> bool:
    """Return whether whatever of the offers the API server takes can be recorded."""
    offered = upgrade.subprotocols
    return upgrade.protocol == "websocket" and bool(offered) and {name.encode() for name in offered} <= {*CHANNELS}


def _recorded_as(caller: Caller, record: AuditRecord) -> list[Identity]:
    """Return the identities by which rules are asked: the user's, with the groups that are lent for a time, and the one
    of `--as`, so that a rule for a group records each session that has it."""
    own = caller.identity if caller.lent is None else caller.lent.identity
    return [own, replace(own, username=record.as_user, groups=record.as_groups)] if record.as_user else [own]
