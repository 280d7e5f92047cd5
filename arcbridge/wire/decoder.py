"""Bytes to frames, incrementally, without ever holding more than one small frame.

DATA is handed over as it arrives, also a part of a frame: no reassembly. Every other frame is small and is handed
over whole. Lengths are judged on the header, before a body byte is kept; what is kept between reads is at most a
partial header, or a partial body no larger than its type allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from arcbridge.errors import RemoteProtocolError
from arcbridge.wire.frames import FRAMES, HEADER_SIZE, IGNORABLE_FROM, MAX_DATA, MAX_IGNORABLE, FrameType, unpack_header

_DATA = int(FrameType.DATA)


class FrameSink(Protocol):
    """Who takes the frames. Either method may raise `RemoteProtocolError`, which ends the decoding."""

    def data_begins(self, stream_id: int, length: int) -> Callable[[memoryview], None] | None:
        """Take a DATA header; return where its payload goes, or None to drop it."""

    def frame_received(self, kind: int, stream_id: int, body: bytes) -> None:
        """Take any other frame, whole."""


class Decoder:
    """State of one direction of one byte sequence."""

    __slots__ = ("_body", "_head", "_into", "_kind", "_left", "_stream_id", "position")

    def __init__(self) -> None:
        self.position = 0
        """Bytes taken so far, up to and including the frame that is being handed over."""
        self._head = b""
        self._body: bytearray | None = None
        self._kind = 0
        self._stream_id = 0
        self._left = 0
        self._into: Callable[[memoryview], None] | None = None

    def abandon(self, stream_id: int) -> None:
        """Drop what is still to come of a DATA frame that has begun: its stream was reset, its sink is done with."""
        if self._stream_id == stream_id:
            self._into = None

    def feed(self, data: memoryview, sink: FrameSink) -> None:
        """Take `data` (valid during the call only) and hand over what it completes.

        Raises `RemoteProtocolError` for a length or type that no correct peer sends; the decoder is then done with.
        """
        at, end = 0, len(data)
        start = self.position
        while at < end:
            if self._left:  # the rest of a DATA body, or of a small frame's
                take = min(self._left, end - at)
                self._left -= take
                piece = data[at : at + take]
                at += take
                self.position = start + at
                if self._body is None:
                    if self._into is not None:
                        self._into(piece)
                    continue
                self._body += piece
                if self._left == 0:
                    body, self._body = bytes(self._body), None
                    sink.frame_received(self._kind, self._stream_id, body)
                continue
            if self._head or end - at < HEADER_SIZE:
                need = HEADER_SIZE - len(self._head)
                piece = data[at : at + need]
                at += len(piece)
                self._head += bytes(piece)
                if len(self._head) < HEADER_SIZE:
                    break
                word, stream_id = unpack_header(self._head)
                self._head = b""
            else:  # the common case: a whole header
                word, stream_id = unpack_header(data, at)
                at += HEADER_SIZE
            kind, length = word & 0xFF, word >> 8
            self.position = start + at
            if kind == _DATA:
                if length > MAX_DATA:
                    raise RemoteProtocolError(f"a DATA frame of {length} bytes, more than {MAX_DATA}")
                into = sink.data_begins(stream_id, length)
                after = at + length
                if after <= end:  # the common case: the whole frame is here, and nothing of it is kept
                    if into is not None and length:
                        into(data[at:after])
                    at = after
                    continue
                # Kept before it is called: the sink may reset its own stream (`abandon`).
                self._into, self._stream_id = into, stream_id
                if at < end and into is not None:
                    into(data[at:end])
                self._left = after - end
                break
            layout = FRAMES.get(kind)
            if layout is not None:
                smallest, largest = layout.smallest, layout.largest
            elif kind < IGNORABLE_FROM:
                raise RemoteProtocolError(f"a frame of unknown type {kind}")
            else:
                smallest, largest = 0, MAX_IGNORABLE
            if not smallest <= length <= largest:
                raise RemoteProtocolError(f"a frame of type {kind} with a body of {length} bytes")
            if length <= end - at:
                body = bytes(data[at : at + length])
                at += length
                self.position = start + at
                sink.frame_received(kind, stream_id, body)
                continue
            self._kind, self._stream_id = kind, stream_id
            self._body, self._left = bytearray(), length
        self.position = start + end
