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
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
STATUS = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
_CHUNK = 32 * 1024


@dataclass(slots=True)
class Pod:
    """One pod of the demonstration, with its log; readers of the log may wait for further lines."""

    name: str
    namespace: str
    directory: Path
    """Where its commands run."""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    written: int = 0
    """Lines ever written."""
    _grown: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def live(self) -> None:
        """Write the log until cancelled."""
        await self.write(f"the {self.name} is open")
        number = 0
        while True:
            await asyncio.sleep(SALE_EVERY)
            number += 1
            await self.write(f"sale {number}")

    async def write(self, text: str) -> None:
        """Add a line to the log."""
        async with self._grown:
            self.lines.append(text)
            self.written += 1
            self._grown.notify_all()

    async def read(self, *, tail: int = LOG_LINES, follow: bool = False) -> AsyncIterator[str]:
        """Yield the last `tail` lines, and with `follow` each further one, without an end."""
        seen = self.written - min(tail, len(self.lines))
        while True:
            fresh = list(self.lines)[max(len(self.lines) - (self.written - seen), 0) :]
            seen = self.written
            for line in fresh:
                yield line
            if not follow:
                return
            async with self._grown:
                while self.written == seen:
                    await self._grown.wait()


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
            await pod.write(f"{user} runs {' '.join(command)}"[:500])
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
            process = await start(command, pod, terminal=terminal)
        except OSError as error:
            message = f'exec: "{command[0]}": {error.strerror}'
            await socket.send_bytes(bytes([STDERR]) + f"{message}\n".encode())
            return failure(message, 127 if isinstance(error, FileNotFoundError) else 126)

        feeding = asyncio.create_task(_feed(socket, process))
        sending = asyncio.gather(*(_send(socket, channel, output) for channel, output in process.outputs.items()))
        try:
            await asyncio.wait({feeding, sending}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():  # the connection ended first: kubectl was ended, and nothing may keep the command
                sending.cancel()
                process.kill()
            code = await process.process.wait()
        finally:
            feeding.cancel()
            sending.cancel()
            process.kill()
            await asyncio.gather(feeding, sending, return_exceptions=True)
            process.close()
        code = code if code >= 0 else 128 - code  # as a shell counts: 128 and the number of the signal that ended it
        if code == 0:
            return {**STATUS, "status": "Success"}
        return failure(f"command terminated with non-zero exit code: exit status {code}", code)


async def _send(socket: web.WebSocketResponse, channel: int, output: asyncio.StreamReader) -> None:
    """Send what the process writes, until it has closed this output."""
    with contextlib.suppress(OSError):  # EIO: no process has the terminal open any more
        while data := await output.read(_CHUNK):
            await socket.send_bytes(bytes([channel]) + data)


async def _feed(socket: web.WebSocketResponse, process: Process) -> None:
    """Give the process what the client sends, until the connection ends."""
    async for message in socket:
        if message.type is not WSMsgType.BINARY or not message.data:
            continue
        channel, data = message.data[0], bytes(message.data[1:])
        if channel == STDIN:
            process.input.write(data)
            with contextlib.suppress(ConnectionError):  # what the command does not want any more is dropped
                await process.input.drain()
        elif channel == CLOSE and data[:1] == bytes([STDIN]):
            process.end_input()
        elif channel == RESIZE:
            size = json.loads(data)
            process.resize(int(size["Height"]), int(size["Width"]))


def failure(message: str, code: int) -> dict[str, object]:
    """The Status of a command that ended with a code other than 0; kubectl takes its own exit code from it."""
    causes = [{"reason": "ExitCode", "message": str(code)}]
    return {**STATUS, "reason": "NonZeroExitCode", "message": message, "details": {"causes": causes}}


@dataclass(slots=True)
class Process:
    """One command, on pipes or on a terminal."""

    process: asyncio.subprocess.Process
    input: asyncio.StreamWriter
    outputs: dict[int, asyncio.StreamReader]
    """What it writes, by channel."""
    terminal: asyncio.ReadTransport | None = None
    """The near end of its terminal."""

    def end_input(self) -> None:
        """End the command's input; on a terminal, type Ctrl-D."""
        if self.terminal is None:
            self.input.close()
        else:
            self.input.write(b"\x04")

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the terminal."""
        if self.terminal is not None:
            size = struct.pack("HHHH", rows, columns, 0, 0)
            fcntl.ioctl(self.terminal.get_extra_info("pipe"), termios.TIOCSWINSZ, size)

    def close(self) -> None:
        """Give back the pipes or the terminal."""
        self.input.close()
        if self.terminal is not None:
            self.terminal.close()

    def kill(self) -> None:
        """Kill the command and what it has started, unless it has ended."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


async def start(command: list[str], pod: Pod, *, terminal: bool) -> Process:
    """Start a command in a pod's directory. Raises OSError if it cannot be started."""
    environment = {
        "PATH": f"{os.environ.get('PATH', '')}:{os.defpath}",
        "HOME": str(pod.directory),
        "HOSTNAME": pod.name,
        "PS1": f"{pod.name} (demonstration) $ ",
        **({"TERM": "xterm-256color"} if terminal else {}),
    }
    end: Any = asyncio.subprocess.PIPE
    with contextlib.ExitStack() as stack:
        if terminal:
            master, end = pty.openpty()
            stack.callback(os.close, end)
            near = stack.enter_context(os.fdopen(master, "rb", buffering=0))
            far = stack.enter_context(os.fdopen(os.dup(master), "wb", buffering=0))
        process = await asyncio.create_subprocess_exec(
            *command,
            **dict.fromkeys(("stdin", "stdout", "stderr"), end),
            cwd=pod.directory,
            env=environment,
            start_new_session=True,
            preexec_fn=prepare_child(signal.SIGKILL, terminal),
        )
        if not terminal:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            return Process(process, process.stdin, {STDOUT: process.stdout, STDERR: process.stderr})
        stack.pop_all()
        os.close(end)
    loop = asyncio.get_running_loop()
    output = asyncio.StreamReader()
    reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(output), near)
    writing, protocol = await loop.connect_write_pipe(lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), far)
    return Process(process, asyncio.StreamWriter(writing, protocol, None, loop), {STDOUT: output}, reading)
