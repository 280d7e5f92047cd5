"""The handshake of a connection that resumes a session: a few frames, and not a byte of what follows them.

Behind the last of them the session's own byte sequence goes on where it was cut, perhaps in the middle of a frame, so
the session's decoder must get exactly the rest.
"""

from __future__ import annotations

from arcbridge.errors import RemoteProtocolError
from arcbridge.wire.frames import FRAMES, HEADER_SIZE, FrameType, unpack_header

GREETINGS = frozenset({FrameType.HELLO, FrameType.AUTH_OK, FrameType.GOAWAY})
"""What an acceptor may say before the sequence goes on."""


class ResumeHandshake:
    """Collects one frame at a time."""

    def __init__(self) -> None:
        self._kept = b""

    def next(self, data: memoryview, at: int) -> tuple[int, tuple[int, bytes] | None]:
        """Take of `data` from `at` on what the next frame needs: where it ended, and the frame if it is whole.

        Raises RemoteProtocolError for a frame that has no place here.
        """
        if len(self._kept) < HEADER_SIZE:
            at = self._take(data, at, HEADER_SIZE)
            if len(self._kept) < HEADER_SIZE:
                return at, None
        word, stream_id = unpack_header(self._kept)
        kind, length = word & 0xFF, word >> 8
        if kind not in GREETINGS or stream_id or length > FRAMES[kind].largest:
            raise RemoteProtocolError(f"a frame of type {kind} before the session was resumed")
        at = self._take(data, at, HEADER_SIZE + length)
        if len(self._kept) < HEADER_SIZE + length:
            return at, None
        body, self._kept = self._kept[HEADER_SIZE:], b""
        return at, (kind, body)

    def _take(self, data: memoryview, at: int, until: int) -> int:
        piece = data[at : at + until - len(self._kept)]
        self._kept += bytes(piece)
        return at + len(piece)
