"""The client's side of SPDY/3.1 as Kubernetes' port-forward speaks it: one connection to one port of a pod.

Two streams: one for errors, which carries a text or nothing, and one for the bytes (draft-mbelshe-httpbis-spdy-00;
Kubernetes' `portforward.k8s.io`). It opens no connection. The peer's headers are not read, and neither side sends
window updates, so the TCP connections on the way are the flow control, and one connection has one pair of streams.
Invariants: nothing is kept of what has come but one frame of control and a text, both bounded; a peer that breaks the
rules is a `SpdyError`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator

from arcbridge.net.spdy_dictionary import DICTIONARY

MAX_TEXT = 4096
"""Bytes of an error that are kept."""
MAX_CONTROL = 64 * 1024
"""Bytes of a control frame; those of Kubernetes have less than a hundred."""
CHUNK = 64 * 1024
"""Bytes that are moved at a time."""
MAX_UNREAD = 1024 * 1024
"""Bytes that wait for a peer that does not read, above which its PINGs are not answered but end the streams. What is
written besides stays far below, and reading goes on: a pod may read only once what it sends is taken."""

_ERRORS, _DATA = 1, 3
_VERSION, _FIN = b"\x80\x03", 1
_SYN_STREAM, _RST_STREAM, _PING = 1, 3, 6


class SpdyError(Exception):
    """The peer ended the streams, or broke the rules; the message says how."""


def opening(port: int) -> bytes:
    """Return the bytes that open both streams to a port; of the one for errors nothing is sent."""
    compressor = zlib.compressobj(zdict=DICTIONARY)
    return (
        _open(compressor, _ERRORS, b"error", port)
        + _data_head(0, _ERRORS, _FIN)
        + _open(compressor, _DATA, b"data", port)
    )


def payload(data: bytes) -> bytes:
    """Return a frame with bytes for the pod; without any: the last one."""
    return _data_head(len(data), _DATA, 0 if data else _FIN) + data


def ping(number: int) -> bytes:
    """Return a PING, which the peer sends back; the client's have odd numbers."""
    return _control(_PING, number.to_bytes(4, "big"))


def _data_head(size: int, stream: int, flags: int) -> bytes:
    return stream.to_bytes(4, "big") + (flags << 24 | size).to_bytes(4, "big")


def _control(kind: int, body: bytes) -> bytes:
    return _VERSION + kind.to_bytes(2, "big") + len(body).to_bytes(4, "big") + body


def _open(compressor: zlib._Compress, stream: int, kind: bytes, port: int) -> bytes:
    texts = [b"streamtype", kind, b"port", b"%d" % port, b"requestid", b"0"]
    block = (3).to_bytes(4, "big") + b"".join(len(text).to_bytes(4, "big") + text for text in texts)
    packed = compressor.compress(block) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return _control(_SYN_STREAM, stream.to_bytes(4, "big") + bytes(6) + packed)


class PodReader:
    """Reads what comes back behind the 101."""

    def __init__(self, reader: asyncio.StreamReader, transport: asyncio.WriteTransport) -> None:
        """`transport` gets the answers to the peer's PINGs."""
        self._reader = reader
        self._transport = transport
        self._text = b""
        self.frame_received = False
        """Whether a frame has come since the owner has cleared this."""

    async def payload(self) -> AsyncIterator[bytes]:
        """Yield the pod's bytes until it has ended in order. Raises SpdyError, and IncompleteReadError at a cut."""
        while True:
            head = await self._reader.readexactly(8)
            self.frame_received = True
            left = int.from_bytes(head[5:8], "big")
            if head[0] & 0x80:
                await self._take_control(head, left)
                continue
            stream, fin = int.from_bytes(head[:4], "big"), head[4] & _FIN
            while left:
                part = await self._reader.read(min(left, CHUNK))
                if not part:
                    raise asyncio.IncompleteReadError(b"", left)
                left -= len(part)
                if stream == _DATA:
                    yield part
                elif stream == _ERRORS:
                    self._text += part[: MAX_TEXT - len(self._text)]
            if fin and stream == _ERRORS and self._text:
                raise SpdyError(self._error_text())
            if fin and stream == _DATA:
                return

    async def _take_control(self, head: bytes, size: int) -> None:
        kind = int.from_bytes(head[2:4], "big")
        if head[:2] != _VERSION or kind == _SYN_STREAM or size > MAX_CONTROL or (kind == _PING and size != 4):
            raise SpdyError("the other end does not speak SPDY as port-forward does")
        body = await self._reader.readexactly(size)
        if kind == _RST_STREAM and int.from_bytes(body[:4], "big") == _DATA:
            raise SpdyError(self._error_text() or "the kubelet reset the connection")
        if kind == _PING and not int.from_bytes(body, "big") & 1:  # the answers to ours are odd
            if self._transport.get_write_buffer_size() > MAX_UNREAD:
                raise SpdyError("the other end sends PINGs and reads no answers")
            self._transport.write(head + body)

    def _error_text(self) -> str:
        return self._text.decode("utf-8", "replace").strip()
