"""The pods of the demonstration API: a log that grows, and commands that run as processes of this machine.

A pod here is no container: a command of `kubectl exec` runs as the user of the demonstration, in a directory of its own
and with a small environment, and ends with its connection. Bounds: `EXECS` commands at once, `LOG_LINES` lines a log.
The protocol is Kubernetes' remote command over WebSocket, `v5.channel.k8s.io` (KEP-4006): each binary message begins
with the number of a channel. SPDY is not spoken; kubectl asks for it only where WebSocket is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import termios
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from aiohttp import WSMsgType, web

from tests.support.processes import prepare_child

PROTOCOL = "v5.channel.k8s.io"
STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
"""Channels of the protocol. A message on CLOSE names the channel that its sender has closed."""
EXECS = 8
"""Commands that may run at once, in all pods."""
LOG_LINES = 1000
"""Lines that a log keeps."""
SALE_EVERY = 2.0
"""Seconds between two lines that a pod logs by itself."""
_CHUNK = 32 * 1024

Send = Callable[[int, bytes], Awaitable[None]]


@dataclass(slots=True)
class Log:
    """The lines of a pod, each with its time; readers may wait for further ones."""

    lines: deque[tuple[datetime, str]] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    written: int = 0
    """Lines ever written."""
    _grown: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def write(self, text: str) -> None:
        """Add a line."""
        async with self._grown:
            self.lines.append((datetime.now(UTC), text))
            self.written += 1
            self._grown.notify_all()

    async def read(self, *, tail: int | None = None, follow: bool = False) -> AsyncIterator[tuple[datetime, str]]:
        """Yield the last `tail` lines (None: all that are kept), and with `follow` each further one, without an end."""
        kept = list(self.lines)
        seen = self.written
        for line in kept[max(len(kept) - tail, 0) :] if tail is not None else kept:
            yield line
        while follow:
            async with self._grown:
                while self.written == seen:
                    await self._grown.wait()
                fresh = list(self.lines)[-(self.written - seen) :]
                seen = self.written
            for line in fresh:
                yield line


@dataclass(slots=True)
class Pod:
    """One pod of the demonstration."""

    name: str
    namespace: str
    directory: Path
    """Where its commands run."""
    log: Log = field(default_factory=Log)

    async def live(self) -> None:
        """Write the log until cancelled."""
        await self.log.write(f"the {self.name} is open")
        number = 0
        while True:
            await asyncio.sleep(SALE_EVERY)
            number += 1
            await self.log.write(f"sale {number}")


class Executions:
    """The commands that run in the pods."""

    def __init__(self) -> None:
        self._running = 0

    async def serve(self, request: web.Request, pod: Pod, user: str) -> web.WebSocketResponse:
        """Run the command of an exec request over its WebSocket, to its end or to that of the connection.

        Raises HTTPBadRequest for a request without a command or another protocol, HTTPTooManyRequests beyond `EXECS`.
        """
        command = request.query.getall("command", [])
        offered = [name.strip() for name in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        if self._running >= EXECS:
            raise web.HTTPTooManyRequests(text=f"the demonstration runs {EXECS} commands at once")
        if not command or PROTOCOL not in offered:
            raise web.HTTPBadRequest(text=f"the demonstration runs a command over WebSocket with {PROTOCOL} only")
        socket = web.WebSocketResponse(protocols=(PROTOCOL,), compress=False)
        await socket.prepare(request)
        self._running += 1
        try:
            await pod.log.write(f"{user} runs {' '.join(command)}"[:500])
            status = await self._run(socket, pod, command, request.query)
            with contextlib.suppress(ConnectionError):
                await socket.send_bytes(bytes([ERROR]) + json.dumps(status).encode())
                await socket.close()
        finally:
            self._running -= 1
        return socket

    async def _run(
        self, socket: web.WebSocketResponse, pod: Pod, command: list[str], query: Mapping[str, str]
    ) -> dict[str, object]:
        """Run one command and return the Status with which it ended."""
        terminal = query.get("tty") in ("true", "1")
        try:
            process = await Process.start(command, pod, terminal=terminal)
        except OSError as error:
            message = f'exec: "{command[0]}": {error.strerror}'
            await socket.send_bytes(bytes([STDERR]) + f"{message}\n".encode())
            return failure(message, 127 if isinstance(error, FileNotFoundError) else 126)

        async def send(channel: int, data: bytes) -> None:
            await socket.send_bytes(bytes([channel]) + data)

        feeding = asyncio.create_task(_feed(socket, process))
        sending = asyncio.create_task(process.send_output(send))
        try:
            await asyncio.wait({feeding, sending}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():  # the connection ended first: kubectl was ended, and nothing may keep the command
                sending.cancel()
                process.kill()
            code = await process.wait()
        finally:
            feeding.cancel()
            sending.cancel()
            process.kill()
            await asyncio.gather(feeding, sending, return_exceptions=True)
            process.close()
        if code == 0:
            return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return failure(f"command terminated with non-zero exit code: exit status {code}", code)


async def _feed(socket: web.WebSocketResponse, process: Process) -> None:
    """Give the process what the client sends, until the connection ends."""
    async for message in socket:
        if message.type is not WSMsgType.BINARY or not message.data:
            continue
        channel, data = message.data[0], bytes(message.data[1:])
        if channel == STDIN:
            await process.write(data)
        elif channel == CLOSE and data[:1] == bytes([STDIN]):
            process.end_input()
        elif channel == RESIZE:
            size = json.loads(data)
            process.resize(int(size["Height"]), int(size["Width"]))


def failure(message: str, code: int) -> dict[str, object]:
    """The Status of a command that ended with a code other than 0; kubectl takes its own exit code from it."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": message,
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


class Process:
    """One command, on pipes or on a terminal."""

    def __init__(self, process: asyncio.subprocess.Process, master: int | None) -> None:
        self._process = process
        self._master = master
        """The near end of its terminal, or None."""

    @classmethod
    async def start(cls, command: list[str], pod: Pod, *, terminal: bool) -> Process:
        """Start a command in a pod's directory. Raises OSError if it cannot be started."""
        environment = {
            "PATH": f"{os.environ.get('PATH', '')}:{os.defpath}",
            "HOME": str(pod.directory),
            "HOSTNAME": pod.name,
            "PS1": f"{pod.name} (demonstration) $ ",
        }
        if not terminal:
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                cwd=pod.directory,
                env=environment,
                start_new_session=True,
                preexec_fn=prepare_child(signal.SIGKILL, False),
            )
            return cls(process, None)
        master, slave = pty.openpty()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=pod.directory,
                env={**environment, "TERM": "xterm-256color"},
                start_new_session=True,
                preexec_fn=prepare_child(signal.SIGKILL, True),
            )
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        os.set_blocking(master, False)
        return cls(process, master)

    async def send_output(self, send: Send) -> None:
        """Send what the command writes, until it has closed its outputs."""
        if self._master is not None:
            while data := await self._read_terminal(self._master):
                await send(STDOUT, data)
            return
        assert self._process.stdout is not None
        assert self._process.stderr is not None

        async def copy(channel: int, source: asyncio.StreamReader) -> None:
            while data := await source.read(_CHUNK):
                await send(channel, data)

        await asyncio.gather(copy(STDOUT, self._process.stdout), copy(STDERR, self._process.stderr))

    async def write(self, data: bytes) -> None:
        """Give the command input; what it does not want any more is dropped."""
        if self._master is not None:
            while data:
                try:
                    data = data[os.write(self._master, data) :]
                except BlockingIOError:
                    await _until(self._master, writable=True)
                except OSError:
                    return  # the terminal has no process any more
            return
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(data)
            await self._process.stdin.drain()

    def end_input(self) -> None:
        """End the command's input; on a terminal, type Ctrl-D."""
        if self._master is not None:
            with contextlib.suppress(OSError):
                os.write(self._master, b"\x04")
        elif self._process.stdin is not None:
            self._process.stdin.close()

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the terminal."""
        if self._master is not None:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def kill(self) -> None:
        """Kill the command and what it has started, unless it has ended."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Return the exit code, as a shell counts: 128 and the number of the signal that ended it."""
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    def close(self) -> None:
        """Give back the terminal."""
        if self._master is not None:
            os.close(self._master)
            self._master = None

    async def _read_terminal(self, master: int) -> bytes:
        while True:
            try:
                return os.read(master, _CHUNK)
            except BlockingIOError:
                await _until(master)
            except OSError:
                return b""  # EIO: no process has the terminal open any more


async def _until(descriptor: int, *, writable: bool = False) -> None:
    """Wait until a descriptor can be read, or with `writable` written."""
    loop = asyncio.get_running_loop()
    add, remove = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add(descriptor, wake)
    try:
        await ready
    finally:
        remove(descriptor)
