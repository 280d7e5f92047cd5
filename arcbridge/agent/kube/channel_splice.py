"""Joins an exec or attach to the API server, and can end it with a sentence that kubectl shows.

Source: RFC 6455 §5; Kubernetes' `v4.channel.k8s.io` and `v5.channel.k8s.io`, where the first byte of a message names
its channel and the status comes on channel 3. kubectl reads it at a close in order alone. Of what passes, the heads of
the API server's frames are looked at. Invariant: a sentence stands behind a whole message or it is not said: the
connection is reset then, as it is where there are no channels (SPDY, whose error stream only compressed headers name,
and port-forward, of which kubectl shows no reason).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from arcbridge.agent.kube.status import RequestRefusal, status_body
from arcbridge.agent.kube.upgrade import CHANNELS
from arcbridge.agent.kube.upstream_pool import SWITCHED_READ
from arcbridge.mux.splice import SpliceResult, TransportSplice
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.frames import ResetCode

READ_WITHIN: Final = 5.0
"""Seconds within which a caller takes the sentence."""
STATUS: Final = 3
_EXTENDED: Final = {126: 2, 127: 8}
"""Bytes of a length that does not fit the second byte, by that byte."""
_CLOSE: Final = 8
"""The opcode of a frame that closes."""
_CLOSE_IN_ORDER: Final = b"\x88\x02\x03\xe8"
"""A frame that closes with 1000."""


class FrameEnds:
    """Knows whether the API server's bytes so far end with a whole message."""

    __slots__ = ("_head", "_left", "_readable", "_within")

    def __init__(self) -> None:
        self._head = b""
        """The head of a frame, as far as it has come."""
        self._left = 0
        """Bytes of the frame that are still to come."""
        self._within = False
        """A message has begun, and its last frame has not."""
        self._readable = True

    @property
    def whole(self) -> bool:
        """Whether a message may follow."""
        return self._readable and not (self._left or self._head or self._within)

    def feed(self, view: memoryview) -> None:
        """Take bytes that have gone on."""
        position, size = self._left, len(view)
        while position < size and self._readable:
            head = self._head + view[position : position + 10 - len(self._head)]
            extended = _EXTENDED.get(head[1], 0) if len(head) > 1 else 1
            if len(head) < 2 + extended:
                self._head, position = head, size
                break
            length = int.from_bytes(head[2 : 2 + extended]) if extended else head[1]
            position += 2 + extended + length - len(self._head)
            self._head = b""
            self._readable = not (head[0] & 0x70 or head[1] & 0x80 or head[0] & 0x0F == _CLOSE)
            # Else it has an extension, or is masked as a caller's, or behind it nothing may come (§5.5.1).
            if head[0] & 0x0F < 8:  # no control frame, which may stand within a message
                self._within = not head[0] & 0x80
        self._left = position - size


class ChannelSplice(TransportSplice):
    """A splice that can end with a sentence where `protocol`, the WebSocket subprotocol, has channels."""

    def __init__(
        self,
        outer: asyncio.Transport,
        on_done: Callable[[SpliceResult], None],
        protocol: bytes = b"",
        *,
        seen: Callable[[memoryview], None] | None = None,
    ) -> None:
        self._frames = FrameEnds() if protocol in CHANNELS else None
        passed = None if self._frames is None else self._frames.feed
        super().__init__(outer, on_done, read_size=SWITCHED_READ, seen=seen, passed=passed)

    def explain(self, stream: StreamTransport, sentence: str) -> bool:
        """End both sides with a sentence for the user; return False, and change nothing, where it cannot be said.

        Bytes that wait for the caller would have to be waited for."""
        over = self.outer_over or stream.is_closing()  # the end of the stream may be written before it closes
        if self._frames is None or not self._frames.whole or over or stream.get_write_buffer_size():
            return False
        self.finish_with(message(STATUS, status_body(RequestRefusal(403, sentence))) + _CLOSE_IN_ORDER)
        asyncio.get_running_loop().call_later(READ_WITHIN, _cut_unread, stream)
        return True


def _cut_unread(stream: StreamTransport) -> None:
    """Cut a stream of which the caller has not taken the sentence: its record and its place are not kept open."""
    if stream.get_write_buffer_size():
        stream.abort(ResetCode.FORBIDDEN)


def message(channel: int, payload: bytes) -> bytes:
    """Return one message of the API server's direction, on a channel."""
    size = len(payload) + 1
    length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2)
    return b"\x82" + length + bytes([channel]) + payload
