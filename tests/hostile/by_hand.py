"""Frames by hand, for what the real modules would not send: on a session of theirs, or over a joined socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from arcbridge.mux.session import MuxSession
from arcbridge.net.tls import inner_client_context
from arcbridge.pki.names import cluster_server_name
from arcbridge.wire.frames import HEADER_SIZE, VERSION, FrameType, frame, unpack_header
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.records import Auth, Goaway, Hello, JoinReply


def say(session: MuxSession, body: bytes) -> None:
    """Send bytes as they are on a session, whether its end may send them or not."""
    session._sender.control.append(body)
    session.wake()


def hello(**fields: object) -> bytes:
    """A client's HELLO, honest but for `fields`."""
    base: dict[str, object] = {
        "version": VERSION,
        "least": VERSION,
        "features": "resume",
        "stream_window": DEFAULT.stream_window,
        "max_streams": DEFAULT.max_streams,
    }
    return frame(FrameType.HELLO, 0, Hello(**{**base, **fields}).encode())


def auth(token: str, *, kind: str = "oidc", proof: str = "") -> bytes:
    """A client's AUTH."""
    return frame(FrameType.AUTH, 0, Auth(kind=kind, token=token, proof=proof).encode())


@dataclass
class ByHand:
    """The client's end of a session, without a client."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    reply: JoinReply
    certificate: bytes = b""
    """DER, what the agent showed."""
    received: list[tuple[int, int, bytes]] = field(default_factory=list)
    """(type, stream id, body) of each frame."""

    def say(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def next(self, *kinds: FrameType) -> bytes:
        """The body of the next frame of one of these types; raises asyncio.IncompleteReadError at the end."""
        async with asyncio.timeout(10):
            while True:
                word, stream_id = unpack_header(await self.reader.readexactly(HEADER_SIZE))
                body = await self.reader.readexactly(word >> 8)
                self.received.append((word & 0xFF, stream_id, body))
                if word & 0xFF in kinds:
                    return body

    async def goaway(self) -> Goaway:
        """The agent's last word."""
        return Goaway.decode(await self.next(FrameType.GOAWAY))


@contextlib.asynccontextmanager
async def session_by_hand(joined: tuple[socket.socket, JoinReply], cluster: str = "prod") -> AsyncIterator[ByHand]:
    """TLS with the agent over a joined socket, and nothing said yet."""
    sock, reply = joined
    reader, writer = await asyncio.open_connection(
        sock=sock, ssl=inner_client_context(reply.cluster_ca), server_hostname=cluster_server_name(cluster), limit=2**20
    )
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    try:
        yield ByHand(reader, writer, reply, found)
    finally:
        writer.transport.abort()
