"""The chain of a file's records: each line holds the SHA-256 of the line before it.

`Chain` seals lines, `read_line` takes a sealed line apart. A chain begins with a record `chain` that has a random id;
where the role has written before it, that record names the last line of then, so that chains form one. It reads and
writes no file. Invariant: the hash is over the bytes of a line as they stand in the file, without the line end.

A chain has no key. It shows every change but that of the newest records; who may write the file can make the whole
chain anew, which a head that was kept elsewhere shows (`Head`, docs/audit.md).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from dataclasses import dataclass

from arcbridge.untrusted_json import read_json

NONE = "0" * 64
"""Stands for the hash of the line before, where there is none."""

SEALED = re.compile(rb'\{"chain":"([0-9a-f]{16})","seq":([0-9]{1,18}),"prev":"([0-9a-f]{64})",')
"""What `Chain` puts before the fields of a line: the chain's id, the number, the hash of the line before."""


@dataclass(frozen=True, slots=True)
class Head:
    """One record of a chain: its number and the hash of its line, which stands for every record up to it."""

    chain: str
    """Empty for a line that is not of a chain."""
    sequence: int
    hash: str


NO_HEAD = Head("", -1, "")
"""Stands for the head where no record is known."""


class Chain:
    """Seals the lines of one file, from its opening until it is left."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self._sequence = -1
        self._hash = NONE

    @property
    def head(self) -> Head:
        """The record that was sealed last."""
        return Head(self.id, self._sequence, self._hash)

    def begin(self, cause: str, instance: str, before: Head | None, torn: int = 0) -> bytes:
        """Seal the record that begins the chain.

        `cause`: `started`, `rotated`, or `cut` (the file became shorter while it was written). `before` is the last
        line that the writer knows of: of this file, or of the one that was rotated away. `torn`: bytes of a line
        without an end that stood at the end of the file.
        """
        fields: dict[str, str | int] = {"ts": timestamp(), "event": "chain", "cause": cause, "instance": instance}
        if before is not None:
            self._hash = before.hash
            if before.chain:
                fields["after"] = f"{before.chain}/{before.sequence}"
        if torn:
            fields["torn"] = torn
        return self.seal(json.dumps(fields))

    def seal(self, line: str) -> bytes:
        """Answer a line (one JSON object) as it is written, without its end; it is the chain's head from now on."""
        self._sequence += 1
        # Spelt out: `read_line` and people with `sha256sum` take these bytes as they are.
        sealed = f'{{"chain":"{self.id}","seq":{self._sequence},"prev":"{self._hash}",{line[1:]}'.encode(
            "utf-8", "replace"
        )
        self._hash = hashlib.sha256(sealed).hexdigest()
        return sealed


@dataclass(frozen=True, slots=True)
class SealedLine:
    """A line as it was read."""

    head: Head
    """Its place in the chain, and the hash of its bytes as they are now."""
    previous: str
    """The hash of the line before it, as it says itself."""
    fields: dict[str, object]


def find_sealed(text: bytes) -> int:
    """Return where in a line the sealed record begins; -1 where there is none. A collector may write something before
    it."""
    found = SEALED.search(text)
    return found.start() if found is not None else -1


def read_line(text: bytes) -> SealedLine | None:
    """Take a sealed line (without its end) apart; None for one that is not whole."""
    found = SEALED.match(text)
    if found is None:
        return None
    try:
        fields = read_json(text)
    except ValueError:
        return None
    if not isinstance(fields, dict):
        return None
    head = Head(found[1].decode(), int(found[2]), hashlib.sha256(text).hexdigest())
    return SealedLine(head, found[3].decode(), fields)


def timestamp() -> str:
    """Return the time as RFC 3339 with milliseconds; the part that changes once a second is cached."""
    global _stamp
    now = time.time()
    second, text = _stamp
    if int(now) != second:
        # One assignment of both: the writer's thread asks for the time, too.
        second = int(now)
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _stamp = second, text
    return f"{text}.{int((now - second) * 1000):03d}Z"


_stamp = (-1, "")
