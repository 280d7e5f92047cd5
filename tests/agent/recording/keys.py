"""A recipient of the tests, its identity, and WebSocket frames as both ends of an exec write them."""

from __future__ import annotations

from pathlib import Path

from arcbridge.agent.recording.cast import CastReader
from arcbridge.agent.recording.opened import open_recording
from arcbridge.agent.recording.sealed_file import FinishedFile, RecordingFile
from arcbridge.sealing.age import parse_identity, parse_recipient
from tests.sealing.keys import X25519_IDENTITY, X25519_RECIPIENT

RECIPIENT = X25519_RECIPIENT
RECIPIENTS = [parse_recipient(X25519_RECIPIENT)]
IDENTITIES = [parse_identity(X25519_IDENTITY)]


def frame(payload: bytes, *, mask: bytes = b"", opcode: int = 2, final: bool = True) -> bytes:
    """One WebSocket frame; `mask`: four bytes, of a frame of a caller."""
    size, flag = len(payload), 0x80 if mask else 0
    if size < 126:
        length = bytes([size | flag])
    elif size < 65536:
        length = bytes([126 | flag]) + size.to_bytes(2, "big")
    else:
        length = bytes([127 | flag]) + size.to_bytes(8, "big")
    if mask:
        payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes([opcode | (0x80 if final else 0)]) + length + mask + payload


def published(file: RecordingFile) -> FinishedFile:
    """A file that is whole and has its name."""
    found = file.finish()
    file.publish()
    return found


def text_of(path: Path) -> bytes:
    """The recording in a file."""
    return b"".join(open_recording(path, IDENTITIES))


def events_of(path: Path) -> list[tuple[str, bytes]]:
    """Code and data of each event of a recording."""
    return [(code, data) for _, code, data in CastReader().events([text_of(path)])]


def output_of(path: Path) -> bytes:
    """What went to the terminal."""
    return b"".join(data for code, data in events_of(path) if code == "o")
