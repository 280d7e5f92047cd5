"""Reads the channels of an exec or attach from the WebSocket frames that carry them, as the bytes pass.

Source: RFC 6455 §5 for frames; Kubernetes' `v4.channel.k8s.io` and `v5.channel.k8s.io` (k8s.io/apimachinery,
`remotecommand`), where the first byte of a message names its channel. It changes and delays nothing. Invariants: at
most the head of one frame is kept, so that the memory does not grow with what passes; what two readers could
understand differently raises `Unreadable` and is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from arcbridge.agent.kube.port_forward import unmasked

STDIN, STDOUT, STDERR, STATUS, RESIZE = range(5)
"""The channels; of `STATUS` comes one `metav1.Status` at the end."""
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_CONTROL: Final = (_CLOSE, _PING, _PONG)
"""Opcodes that carry no data. The API server takes the reserved ones (0xB to 0xF) for data."""
_MAX_CONTROL: Final = 125
"""Bytes of a control frame's payload (RFC 6455 §5.5)."""
_MAX_FROM_CALLER: Final = 32 * 1024 * 1024
"""Bytes of a caller's frame: above it golang.org/x/net/websocket ends the connection (DefaultMaxPayloadBytes)."""
_NO_CHANNEL: Final = -1


class Unreadable(Exception):
    """The bytes are not understood; the message says why."""


class ChannelReader:
    """One direction of one connection; `feed` takes its bytes in any portions."""

    __slots__ = ("_channel", "_control", "_from_caller", "_head", "_head_size", "_left", "_mask", "_offset", "_took",
                 "_within")  # fmt: skip

    def __init__(self, took: Callable[[int, bytes], None], *, from_caller: bool = False) -> None:
        """`took` is called with each piece of a channel's bytes, in order.

        `from_caller`: frames are masked then, and one that continues a message is unreadable: the API server
        (golang.org/x/net/websocket) takes it for a message of its own, RFC 6455 does not, and kubectl sends none.
        """
        self._took = took
        self._from_caller = from_caller
        self._head = bytearray()
        self._head_size = 2
        """Bytes of the frame's head, as far as that is known."""
        self._left = 0
        """Bytes of the frame's payload that are still to come."""
        self._offset = 0
        """Bytes of it that have come."""
        self._mask = b""
        self._control = False
        """The frame is a control frame, which may stand between the frames of a message."""
        self._channel = _NO_CHANNEL
        """Of the message; none before its first byte."""
        self._within = False
        """A message has begun and not ended."""

    def feed(self, view: memoryview) -> None:
        """Read bytes that pass. Raises Unreadable; what comes behind that is not to be fed."""
        position, end = 0, len(view)
        while position < end:
            if self._left:
                part = view[position : position + self._left]
                self._left -= len(part)
                self._take(part)
            else:
                part = view[position : position + self._head_size - len(self._head)]
                self._head += part
                if len(self._head) == self._head_size:
                    self._read_head()
            position += len(part)

    def _read_head(self) -> None:
        head = self._head
        masked, length = head[1] & 0x80, head[1] & 0x7F
        extended = {126: 2, 127: 8}.get(length, 0)
        size = 2 + extended + (4 if masked else 0)
        if size > len(head):
            self._head_size = size
            return
        opcode = head[0] & 0x0F
        if head[0] & 0x70:
            raise Unreadable("a WebSocket frame has an extension")
        if bool(masked) != self._from_caller:
            raise Unreadable("a WebSocket frame is masked as it should not be")
        if extended:
            length = _read_length(head[2 : 2 + extended])
        if self._from_caller and length > _MAX_FROM_CALLER:
            raise Unreadable("a WebSocket frame is too long")
        final = bool(head[0] & 0x80)
        self._left = length
        self._mask = bytes(head[2 + extended :])
        self._offset = 0
        self._control = opcode in _CONTROL
        if not self._control:
            self._begin_frame(opcode, final=final)
        elif length > _MAX_CONTROL or not final:
            raise Unreadable("a WebSocket control frame is too long or comes in parts")
        head.clear()
        self._head_size = 2

    def _begin_frame(self, opcode: int, *, final: bool) -> None:
        if opcode not in (_CONTINUATION, _TEXT, _BINARY) or (opcode == _CONTINUATION) != self._within:
            raise Unreadable("a WebSocket frame is out of order")
        if self._from_caller and not (final and opcode):
            raise Unreadable("a WebSocket message comes in several frames")
        if opcode:
            self._channel = _NO_CHANNEL
        self._within = not final

    def _take(self, part: memoryview) -> None:
        """Take bytes of a frame's payload."""
        if self._control:
            return
        data = unmasked(part, self._mask, self._offset) if self._mask else bytes(part)
        self._offset += len(part)
        if self._channel == _NO_CHANNEL:
            self._channel, data = data[0], data[1:]
        if data:
            self._took(self._channel, data)


def _read_length(data: bytes | bytearray) -> int:
    """Read the length of a payload that has 2 or 8 bytes of its own. Raises Unreadable: x/net leaves out the top bit of
    8 bytes, and a length that fits a shorter form is refused by some readers."""
    length = int.from_bytes(data, "big")
    if length >= 1 << 63 or length < (126 if len(data) == 2 else 65536):
        raise Unreadable("a WebSocket frame has a length that no sender may write")
    return length
