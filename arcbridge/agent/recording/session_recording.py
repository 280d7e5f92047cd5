"""Records one session: takes the bytes of both directions as they pass, and has a thread write them.

It gathers what passes for a second, or up to 64 KiB, and then a segment is sealed and written. It changes no byte; the
notice for the user is a message of its own before the first. Invariants: what waits for the thread is bounded, for each
session and for all, because both sides of a session are held while there is more; a failure ends the recording once,
and with it the session where the recording is required.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from arcbridge.agent.recording import cast, channels
from arcbridge.agent.recording.cast import CastWriter, Event
from arcbridge.agent.recording.channels import ChannelReader, Unreadable
from arcbridge.agent.recording.rules import Demand
from arcbridge.agent.recording.sealed_file import FinishedFile, RecordingFile, reason_of
from arcbridge.agent.recording.spool import Spool
from arcbridge.errors import ArcbridgeError
from arcbridge.untrusted_json import read_json_object

INTERVAL: Final = 1.0
"""Seconds for which a segment gathers: what an agent that is killed takes with it."""
SEGMENT: Final = 64 * 1024
"""Bytes at which a segment is written before that."""
EVENT_COST: Final = 64
"""Bytes as which an event counts besides its data."""
WAITING: Final = 1024 * 1024
"""Bytes of one session that wait for the thread, above which the session is held."""
WAITING_OF_ALL: Final = 16 * 1024 * 1024
"""Bytes of all sessions that wait for the thread, above which each is held that has a segment there."""
STALL: Final = 10.0
"""Seconds for which a session is held while the thread writes nothing of any; then the recording has failed."""
MAX_STATUS: Final = 64 * 1024
"""Bytes of the status at a session's end that are read; of more there is no exit code."""
_CODES: Final = {channels.STDOUT: cast.OUTPUT, channels.STDERR: cast.ERRORS}


class SessionControl(Protocol):
    """What a recording may do to its session."""

    def hold(self) -> None:
        """Read neither side for now."""

    def let_go(self) -> None:
        """Read on."""

    def end(self, reason: str) -> None:
        """End it, for a reason that its record has."""


class Writer(Protocol):
    """The recorder's thread (`writer_thread.WriterThread`)."""

    waiting: int
    """Bytes of all sessions that are not written yet."""
    progress: float
    """When the thread last finished something, in monotonic seconds."""

    def submit(self, work: Callable[..., Any], *arguments: Any, user: str) -> asyncio.Future[Any]:
        """Run a function in the thread, when it is the turn of the user."""


class SessionRecording:
    """The recording of one session, which runs from `start` to `finish`."""

    def __init__(
        self, demand: Demand, file: RecordingFile, spool: Spool, text: CastWriter, writer: Writer, most: int, user: str
    ) -> None:
        """`text` has made the header, which is in `file`. `most`: bytes of the file. `user`: whose turn it takes."""
        self.demand = demand
        self.file = file
        """Its file, which the caller publishes, or leaves, behind `finish`."""
        self._spool = spool
        self._text = text
        self._writer = writer
        self._most = most
        self.user = user
        self.began = time.monotonic()
        self.failure = ""
        """Why no more is recorded; empty while all is."""
        self.output = 0
        """Bytes that went to the caller on standard output and error."""
        self.on_failure: Callable[[str], None] = lambda _: None
        self._session: SessionControl | None = None
        self._from_cluster = ChannelReader(self._take_output)
        self._from_caller: ChannelReader | None = ChannelReader(self._take_input, from_caller=True)
        self._events: list[Event] = []
        self._gathered = 0
        """Bytes of `_events`, as they count."""
        self._now = 0.0
        self._waiting = 0
        """Bytes that the thread has not written yet."""
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._status = bytearray()
        self._resize = bytearray()
        self._stopped = ""
        """In the thread: why a segment could not be written; empty while all were."""

    def start(self, session: SessionControl, notice: bytes) -> None:
        """Begin behind the 101; `notice` is a message that the caller gets before all others."""
        self._session = session
        if notice:
            self.from_cluster(memoryview(notice))

    def from_cluster(self, view: memoryview) -> None:
        """Take bytes that went to the caller."""
        if self.failure:
            return
        self._now = time.monotonic()
        try:
            self._from_cluster.feed(view)
        except Unreadable as error:
            self.fail(f"the output cannot be read: {error}")

    def from_caller(self, view: memoryview) -> None:
        """Take bytes that went to the API server. Where they cannot be read, sizes of the terminal are missing from
        then on, unless what is typed is recorded too."""
        if self.failure or self._from_caller is None:
            return
        self._now = time.monotonic()
        try:
            self._from_caller.feed(view)
        except Unreadable as error:
            self._from_caller = None
            if self.demand.typed_input:
                self.fail(f"the input cannot be read: {error}")

    def fail(self, reason: str) -> None:
        """Record no more; a session that must be recorded ends."""
        if self.failure:
            return
        self.failure = reason
        self._cancel_timers()
        self.on_failure(reason)
        if self._session is not None:
            self._session.let_go()
            if self.demand.required:
                self._session.end(f"the recording failed: {reason}")

    async def finish(self) -> FinishedFile:
        """End the recording; return its `file`, once it is whole, which the caller publishes. Raises OSError."""
        self._cancel_timers()
        self._session = None
        events, self._events = self._events, []
        mark = _missing(self.failure) if self.failure else "the session was cut"
        status = None if self.failure else self.exit_code
        finished: FinishedFile = await self._in_thread(self._write_end, events, time.monotonic(), status, mark)
        if self._stopped:
            self.fail(self._stopped)
        return finished

    async def discard(self) -> None:
        """Remove the file: the session did not begin. Raises OSError."""
        self._cancel_timers()
        await self._in_thread(self._spool.discard, self.file)

    @property
    def exit_code(self) -> int | None:
        """What the command ended with; None where that is not known."""
        status = read_json_object(self._status)
        if status.get("status") == "Success":
            return 0
        details = status.get("details")
        causes = details.get("causes") if isinstance(details, dict) else None
        for cause in causes if isinstance(causes, list) else ():
            if isinstance(cause, dict) and cause.get("reason") == "ExitCode":
                text = str(cause.get("message"))
                return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
        return None

    # -- events ---------------------------------------------------------------------------------------------------

    def _take_output(self, channel: int, data: bytes) -> None:
        if code := _CODES.get(channel):
            self.output += len(data)
            self._add(code, data)
        elif channel == channels.STATUS and len(self._status) <= MAX_STATUS:
            self._status += data

    def _take_input(self, channel: int, data: bytes) -> None:
        if channel == channels.STDIN:
            if self.demand.typed_input:
                self._add(cast.INPUT, data)
        elif channel == channels.RESIZE:
            # The last object that ends here counts. Each byte is parsed once, however many frames bring it.
            text, end, rest = (self._resize + data).rpartition(b"}")
            self._resize = rest[-512:]
            size = read_json_object(text[text.rfind(b"{") :] + end) if end else {}
            match size.get("Width"), size.get("Height"):
                case int(columns), int(rows) if 0 < columns < 65536 and 0 < rows < 65536:
                    self._add(cast.RESIZE, f"{int(columns)}x{int(rows)}".encode())

    def _add(self, code: str, data: bytes) -> None:
        last = self._events[-1] if self._events else None
        if last is not None and last.at == self._now and last.code == code and code != cast.RESIZE:
            assert isinstance(last.data, bytearray)
            last.data.extend(data)
        else:
            self._events.append(Event(self._now, code, bytearray(data)))
            self._gathered += EVENT_COST
        self._gathered += len(data)
        if self._gathered >= SEGMENT:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._flush)

    # -- segments -------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Have the thread write what was gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._events:
            return
        events, size = self._events, self._gathered
        self._events, self._gathered = [], 0
        self._waiting += size
        self._writer.waiting += size
        self._in_thread(self._write, events).add_done_callback(lambda done: self._written(done, size))
        over = self._waiting > WAITING or self._writer.waiting > WAITING_OF_ALL
        if over and self._stalled is None and self._session is not None:
            self._session.hold()
            self._stalled = asyncio.get_running_loop().call_later(STALL, self._look_for_stall)

    def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return self._writer.submit(work, *arguments, user=self.user)

    def _look_for_stall(self) -> None:
        """Fail where the thread writes nothing; while it writes for others, this session waits for its turn."""
        if time.monotonic() - self._writer.progress < STALL:
            self._stalled = asyncio.get_running_loop().call_later(STALL, self._look_for_stall)
        else:
            self.fail("the directory of recordings takes no data")

    def _written(self, done: asyncio.Future[None], size: int) -> None:
        self._waiting -= size
        self._writer.waiting -= size
        error = done.exception()
        if error is not None:
            self.fail(reason_of(error))
        room = self._writer.waiting <= WAITING_OF_ALL or not self._waiting
        if self._stalled is not None and room and self._waiting <= WAITING // 2:
            self._stalled.cancel()
            self._stalled = None
            if self._session is not None:
                self._session.let_go()

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        self._timer = self._stalled = None

    # -- in the thread --------------------------------------------------------------------------------------------

    def _write(self, events: list[Event]) -> None:
        if self._stopped:  # nothing stands behind what could not be written
            return
        try:
            text = self._text.lines(events)
            if self.file.size + len(text) > self._most:
                raise ArcbridgeError(f"it has more than {self._most} bytes (recording.session_bytes)")
            self._spool.make_room(len(text))
            self._spool.append(self.file, text)
        except BaseException as error:
            self._stopped = reason_of(error)
            raise

    def _write_end(self, events: list[Event], at: float, status: int | None, mark: str) -> FinishedFile:
        text = b""
        if self._stopped:
            status, mark = None, _missing(self._stopped)
        else:
            text = self._text.lines(events)
        try:
            self._spool.append(self.file, text + self._text.end(at, status, mark))
        except (ArcbridgeError, OSError) as error:  # without its last line the file says that it broke off
            self._stopped = reason_of(error)
            return self.file.finish(whole=False)
        return self.file.finish()


def _missing(reason: str) -> str:
    return f"no more was recorded: {reason}"
