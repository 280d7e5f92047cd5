"""Writes and reads the text of a recording: asciicast version 3 (https://docs.asciinema.org/manual/asciicast/v3/).

It opens no file. What is no UTF-8 stands there twice: as `o` (or `i`) with replacement characters, for players, and
before it as `B` with the very bytes in Base64, which players pass over. The comment `# end` is the last line of a
recording that did not break off. Invariant: the bytes of all `o` events, `B` in their stead where there is one, are
those that went to the caller, in their order.
"""

from __future__ import annotations

import base64
import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from arcbridge.untrusted_json import MOST, read_json

OUTPUT, ERRORS, INPUT, RESIZE, MARK, EXIT = "o", "e", "i", "r", "m", "x"
"""Codes of events; what comes on standard error is `o` in a recording, as it is on a terminal."""
_BYTES: Final = "B"
END: Final = "# end"
BROKEN_OFF: Final = "the recording broke off here: the agent ended"
MAX_LINE: Final = MOST
"""Bytes of a line that is read; an event has 128 KiB at most, of which JSON makes six times as many."""


class Event(NamedTuple):
    """Something that happened in a session."""

    at: float
    """Monotonic seconds."""
    code: str
    data: bytes | bytearray


class CastWriter:
    """The lines of one recording, made in their order."""

    def __init__(self, began: float) -> None:
        """`began`: monotonic seconds of its beginning."""
        self._last = began
        """The time to which all intervals so far add up: what is rounded away of one is in the next."""
        self._decoders = {code: codecs.getincrementaldecoder("utf-8")() for code in (OUTPUT, ERRORS, INPUT)}
        """By code; each holds the beginning of a character whose end has not come."""

    def header(self, timestamp: float, title: str, command: str) -> bytes:
        """Return the first line. The terminal's size becomes known with the first resize."""
        fields = {"version": 3, "term": {"cols": 80, "rows": 24}, "timestamp": int(timestamp), "title": title}
        return json.dumps({**fields, "command": command} if command else fields).encode() + b"\n"

    def lines(self, events: Iterable[Event]) -> bytes:
        """Return the lines of these events."""
        return b"".join([line for event in events for line in self._event(event)])

    def end(self, at: float, status: int | None, mark: str) -> bytes:
        """Return the last lines: the exit status, or the `mark` that says why there is none."""
        tails = [(code, decoder.getstate()[0]) for code, decoder in self._decoders.items()]
        lines = [self._line(at, code, tail.decode("utf-8", "replace"), tail) for code, tail in tails if tail]
        lines.append(self._line(at, EXIT, str(status)) if status is not None else self._line(at, MARK, mark))
        return b"".join(lines) + END.encode() + b"\n"

    def _event(self, event: Event) -> Iterator[bytes]:
        at, code, data = event
        decoder = self._decoders.get(code)
        if decoder is None:
            yield self._line(at, code, data.decode("utf-8", "replace"))
            return
        exact = decoder.getstate()[0] + data
        try:
            text, exact = decoder.decode(data), b""
        except UnicodeDecodeError:
            decoder.reset()
            text = exact.decode("utf-8", "replace")
        if text:
            yield self._line(at, code, text, exact)

    def _line(self, at: float, code: str, text: str, exact: bytes = b"") -> bytes:
        """Return one event; `exact`: its bytes, where the text has not all of them."""
        interval = max(0.0, round(at - self._last, 3))
        self._last += interval
        code = OUTPUT if code == ERRORS else code
        if not exact:
            return json.dumps([interval, code, text], ensure_ascii=False).encode() + b"\n"
        before = json.dumps([interval, _BYTES, base64.b64encode(exact).decode()])
        return f"{before}\n{json.dumps([0.0, code, text], ensure_ascii=False)}\n".encode()


def broken_off() -> bytes:
    """Return the last lines of a recording whose agent ended before it did."""
    return json.dumps([0.0, MARK, BROKEN_OFF]).encode() + b"\n"


@dataclass(slots=True)
class CastReader:
    """Reads the lines of a recording, from portions of its text."""

    ended: bool = False
    """The last line was `# end`."""
    _rest: bytes = b""

    def lines(self, portions: Iterable[bytes]) -> Iterator[bytes]:
        """Yield whole lines, each with its end. Raises ValueError for one that is too long."""
        for portion in portions:
            *whole, self._rest = (self._rest + portion).split(b"\n")
            if len(self._rest) > MAX_LINE:
                raise ValueError("a line is too long")
            for line in whole:
                self.ended = line == END.encode()
                yield line + b"\n"

    def events(self, portions: Iterable[bytes]) -> Iterator[tuple[float, str, bytes]]:
        """Yield interval in seconds, code, and data of each event. Raises ValueError for what is none."""
        exact: bytes | None = None
        waited = 0.0
        for number, line in enumerate(self.lines(portions)):
            if number == 0 or line.startswith(b"#"):
                continue
            interval, code, text = _read_event(line)
            if code == _BYTES:
                exact, waited = base64.b64decode(text, validate=True), waited + interval
                continue
            data, exact = text.encode() if exact is None else exact, None
            yield interval + waited, code, data
            waited = 0.0


def _read_event(line: bytes) -> tuple[float, str, str]:
    event = read_json(line)
    match event:
        case [int() | float() as interval, str() as code, str() as text] if interval >= 0:
            return float(interval), code, text
    raise ValueError("a line is no event")
