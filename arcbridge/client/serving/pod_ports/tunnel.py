"""Carries one local connection to one port of one pod: a stream to the API server, upgraded to its port-forward.

`open` asks for `pods/portforward` over SPDY with the user's rights and has read nothing of the local connection; `run`
then moves bytes both ways, half-close included. Invariants: neither side is read while the other one is full, so that a
connection holds a few chunks at most; only an end in order returns, and whatever else happens is raised; a way that no
longer answers is found within PING_INTERVAL × 2 seconds, where it is not the session's own that is silent.
"""

from __future__ import annotations

import asyncio
import io
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any, cast

from arcbridge import __version__
from arcbridge.client.serving.pod_ports.collection import refusal
from arcbridge.client.serving.pod_ports.spdy import CHUNK, PodReader, SpdyError, opening, payload, ping
from arcbridge.client.session.session_manager import TARGET
from arcbridge.errors import ArcbridgeError, ConnectionLost, RemoteProtocolError
from arcbridge.mux.session import MuxSession
from arcbridge.tasks import first_error

if TYPE_CHECKING:
    import socket

OPEN_TIMEOUT = 20.0
"""Seconds for the answer to the upgrade."""
PING_INTERVAL = 40.0
"""Seconds for the answer to a PING. The session finds out within less (`ping_interval` + `ping_timeout` of its limits)
that its own way is cut, and is resumed: then the pod's node is not to blame."""
LINGER = 10.0
"""Seconds without a byte in which the local program may end its side when the pod has ended: a reset would overtake
what it has not read, and a pod that has ended its own side alone still reads."""


class LocalLost(Exception):
    """The local program has ended the connection, which is its own business."""


class DialRefused(RemoteProtocolError):
    """Nothing listens at the pod's port, so that nothing that was sent has arrived anywhere."""


class Program:
    """The local side. What it has sent is kept until the pod has sent something, for another try at a pod."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.sent = b""
        self.repeatable = True
        """Whether all that it has sent is in `sent`."""
        self._reader = reader

    async def read(self) -> bytes:
        """Read a chunk; empty at its end. Raises LocalLost."""
        try:
            data = await self._reader.read(CHUNK)
        except OSError as error:
            raise LocalLost from error
        self.repeatable = self.repeatable and len(self.sent) + len(data) <= CHUNK
        self.sent = self.sent + data if self.repeatable else b""
        return data

    async def write(self, data: bytes) -> None:
        """Hand over bytes of the pod; without any: its end. Raises LocalLost."""
        self.repeatable, self.sent = False, b""
        if self.writer.is_closing():  # uvloop raises RuntimeError
            raise LocalLost
        try:
            if data:
                self.writer.write(data)
                await self.writer.drain()
            else:
                self.writer.write_eof()
        except OSError as error:
            raise LocalLost from error


class Tunnel:
    """One connection; `open`, then `run`, then `close`."""

    def __init__(self, session: MuxSession) -> None:
        """Open a stream of the session. Raises ArcbridgeError."""
        loop = asyncio.get_running_loop()
        self._session = session
        self._reader = asyncio.StreamReader(CHUNK)
        protocol = asyncio.StreamReaderProtocol(self._reader)
        self._transport = session.open(TARGET, protocol)
        self._writer = asyncio.StreamWriter(self._transport, protocol, self._reader, loop)
        self._pod = PodReader(self._reader, self._transport)
        self._blocked = False
        """Whether the local program does not read."""
        self.bytes_to_cluster = self.bytes_from_cluster = 0

    async def open(self, namespace: str, pod: str, port: int) -> None:
        """Open a pod's port. Raises ArcbridgeError."""
        self._writer.write(
            f"POST /api/v1/namespaces/{namespace}/pods/{pod}/portforward HTTP/1.1\r\nHost: kubernetes\r\n"
            f"User-Agent: arcbridge/{__version__} forward\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
            "X-Stream-Protocol-Version: portforward.k8s.io\r\nContent-Length: 0\r\n\r\n".encode()
        )
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                head = await self._reader.readuntil(b"\r\n\r\n")
                answer = _parsed(head)
                if answer.status != 101 or answer.getheader("Upgrade", "").lower() != "spdy/3.1":
                    raise await self._refusal(head)
        except TimeoutError as error:
            raise ConnectionLost(f"pod {pod} was not opened within {OPEN_TIMEOUT:.0f} s") from error
        except (EOFError, asyncio.LimitOverrunError, HTTPException, OSError, ValueError) as error:
            raise RemoteProtocolError(
                "the API server's answer to a port-forward is not whole, or is no HTTP"
            ) from error
        self._writer.write(opening(port))

    async def _refusal(self, head: bytes) -> ArcbridgeError:
        """Return the error of an answer that refuses; the stream ends behind it."""
        body = b""
        while len(body) < CHUNK and (part := await self._reader.read(CHUNK)):
            body += part
        answer = _parsed(head + body)
        return refusal(answer.status, answer.read(), "pods/portforward")

    async def run(self, program: Program) -> None:
        """Move bytes until both directions have ended in order. Raises ArcbridgeError, LocalLost."""
        try:
            async with asyncio.TaskGroup() as group:
                sending, pinging = group.create_task(self._send(program)), group.create_task(self._ping())
                await self._receive(program)
                pinging.cancel()
                moved = -1
                while not sending.done() and moved != self.bytes_to_cluster:
                    moved = self.bytes_to_cluster
                    await asyncio.wait((sending,), timeout=LINGER)
                if not sending.done() and self._transport.get_write_buffer_size():
                    raise ConnectionLost("the pod has ended its side, and does not take what is still sent")
                sending.cancel()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors

    def close(self) -> None:
        """End the stream, which the API server needs no more."""
        self._transport.abort()

    async def _send(self, program: Program) -> None:
        """Send what the program sends, and then its end."""
        data = program.sent or await program.read()
        while True:
            self.bytes_to_cluster += len(data)
            self._writer.write(payload(data))
            await self._writer.drain()
            if not data:
                return
            data = await program.read()

    async def _receive(self, program: Program) -> None:
        """Hand over what the pod sends, and then its end."""
        try:
            async for data in self._pod.payload():
                self.bytes_from_cluster += len(data)
                self._blocked = True
                await program.write(data)
                self._blocked = False
            await program.write(b"")
        except SpdyError as error:
            refused = program.repeatable and "connection refused" in str(error).lower()
            raise (DialRefused if refused else RemoteProtocolError)(str(error)) from error
        except asyncio.IncompleteReadError as error:
            raise ConnectionLost("the connection to the pod was cut") from error

    async def _ping(self) -> None:
        """Send PINGs. Raises ConnectionLost where one was not answered."""
        number = 1
        while True:
            session = self._session
            link, received = session.connection, session.stats.bytes_received
            pinged = link is not None and not self._transport.get_write_buffer_size()
            self._pod.frame_received = False
            if pinged:
                self._writer.write(ping(number))
                number += 2
            await asyncio.sleep(PING_INTERVAL)
            answers = session.connection is link and session.stats.bytes_received != received
            if pinged and answers and not self._pod.frame_received and not self._blocked:
                raise ConnectionLost(f"the pod's node does not answer: nothing has come for {PING_INTERVAL:.0f} s")


class _Bytes:
    """What http.client reads from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: Any) -> io.BytesIO:
        return io.BytesIO(self._data)


def _parsed(data: bytes) -> HTTPResponse:
    response = HTTPResponse(cast("socket.socket", _Bytes(data)), method="POST")
    response.begin()
    return response
