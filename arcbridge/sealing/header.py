"""Reads and writes the header of a file in age's format: a stanza for each recipient, and a MAC over all of them.

A header is text. Each stanza holds the file's key, encrypted to one recipient; the MAC is made with that key, so that
only who opens a stanza can check it. Nothing here decrypts. Invariants: what is read is written again byte for byte, as
the MAC needs it, so whatever has a second spelling is refused; no more than MAX_HEADER bytes are kept, whatever comes.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from arcbridge.errors import SealingError, Truncated

MAX_HEADER: Final = 128 * 1024
"""Bytes of a header; a stanza has 100 for X25519 and 1 600 for a post-quantum recipient."""
MAX_STANZAS: Final = 64
"""Stanzas of a header: each that names the kind of an identity costs an operation with its key."""
_VERSION: Final = b"age-encryption.org/v1\n"
_STANZA: Final = re.compile(rb"->(?: [!-~]+)+")
_END: Final = b"---"
_COLUMNS: Final = 64
_NO_END: Final = "this file breaks off in its header: nothing of it can be opened"
_BLOCK: Final = 4096
"""Bytes that are read at once until the header has ended."""


@dataclass(frozen=True, slots=True)
class Stanza:
    """The file's key for one recipient, or for what this version does not know."""

    kind: bytes
    arguments: tuple[bytes, ...]
    """Those behind the kind; printable ASCII without blanks."""
    body: bytes

    def argument_bytes(self, index: int, count: int, size: int) -> bytes:
        """Return what argument `index` of `count` encodes, `size` bytes. Raises `SealingError`."""
        if len(self.arguments) != count or len(found := unpadded(self.arguments[index])) != size:
            raise SealingError(f"a stanza {self.kind.decode()} of this file is malformed: it is damaged")
        return found


@dataclass(frozen=True, slots=True)
class SealedHeader:
    """A header as it was read."""

    stanzas: tuple[Stanza, ...]
    signed: bytes
    """What the MAC is computed over: all up to and including `---`."""
    mac: bytes


class ByteSource:
    """Reads lines and blocks, however the bytes arrive, and at most a block ahead."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        """`read` returns up to so many bytes, and none only at the end."""
        self._read = read
        self._ahead = bytearray()

    def line(self, limit: int) -> bytes:
        """Return the next line without its end. Raises `SealingError` where it has more than `limit` bytes, and
        `Truncated` where none ends."""
        searched = 0
        while (end := self._ahead.find(b"\n", searched)) < 0 and (searched := len(self._ahead)) <= limit:
            if not (more := self._read(_BLOCK)):
                raise Truncated(_NO_END)
            self._ahead += more
        if not 0 <= end <= limit:
            raise SealingError("the header of this file is longer than any is: it is damaged, or no file of age")
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 1]
        return line

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer at the end alone."""
        while len(self._ahead) < size and (more := self._read(size - len(self._ahead))):
            self._ahead += more
        taken = bytes(self._ahead[:size])
        del self._ahead[:size]
        return taken


def read_header(source: ByteSource) -> SealedHeader:
    """Read a header, and nothing behind it. Raises `SealingError`; `Truncated` where it has no end."""
    begin = source.take(len(_VERSION))
    if not _VERSION.startswith(begin):
        raise SealingError("this is no file in age's format: it does not begin with age-encryption.org/v1 (a file that "
                           "was armored is read by `age -d`)")  # fmt: skip
    if len(begin) < len(_VERSION):
        raise Truncated(_NO_END)
    signed, stanzas = bytearray(begin), list[Stanza]()
    while not (line := source.line(MAX_HEADER - len(signed))).startswith(_END):
        if len(stanzas) == MAX_STANZAS:
            raise SealingError(f"this file is sealed to more than {MAX_STANZAS} recipients: `age -d` opens it")
        if not _STANZA.fullmatch(line):
            raise SealingError("the header of this file is malformed: it is damaged")
        signed += line + b"\n"
        kind, *arguments = line[3:].split(b" ")
        stanzas.append(Stanza(kind, tuple(arguments), _read_body(source, signed)))
    if not stanzas or (len(stanzas) > 1 and any(one.kind == b"scrypt" for one in stanzas)):
        raise SealingError("the recipients in the header of this file are none that age allows: it is damaged")
    mac = unpadded(line[4:])
    if line[3:4] != b" " or len(mac) != 32:
        raise SealingError("the header of this file is malformed: it is damaged")
    return SealedHeader(tuple(stanzas), bytes(signed + _END), mac)


def _read_body(source: ByteSource, signed: bytearray) -> bytes:
    """Read a stanza's body, the lines of which end with a short one; they are appended to `signed` too."""
    body = bytearray()
    while True:
        line = source.line(min(_COLUMNS, MAX_HEADER - len(signed)))
        signed += line + b"\n"
        body += unpadded(line)
        if len(line) < _COLUMNS:
            return bytes(body)


def written(stanzas: Iterable[Stanza]) -> bytes:
    """Return a header up to and including `---`; its MAC and the end of its line follow."""
    out = bytearray(_VERSION)
    for stanza in stanzas:
        out += b" ".join((b"->", stanza.kind, *stanza.arguments)) + b"\n"
        text = encoded(stanza.body)
        for at in range(0, len(text) + 1, _COLUMNS):
            out += text[at : at + _COLUMNS] + b"\n"
    return bytes(out + _END)


def encoded(data: bytes) -> bytes:
    """Return Base64 without padding (RFC 4648 §4)."""
    return base64.b64encode(data).rstrip(b"=")


def unpadded(text: bytes) -> bytes:
    """Return what Base64 without padding encodes. Raises `SealingError`, also for another spelling of the same
    bytes (RFC 4648 §3.5)."""
    try:
        found = binascii.a2b_base64(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        found = b""
    if encoded(found) != text:
        raise SealingError("the header of this file is not spelt as age spells it: it is damaged")
    return found
