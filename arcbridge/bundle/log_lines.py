"""Reads the lines of a role's log, in both of its forms, and lets in what may stand in a bundle.

A line that is not one of arcbridge's own log is left out and counted: audit records, other programs of a unit, what a
library wrote past the log. Of a stack trace the frames stay, each as file, line and function. What comes out is one
JSON object a line, whichever form went in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from arcbridge.bundle.contents import NAMES, Contents
from arcbridge.observe.redaction import MAX_FIELDS, safe_value
from arcbridge.settings.choices import LOG_LEVELS
from arcbridge.untrusted_json import read_json, read_json_object

LINE: Final = 64 * 1024
"""Bytes of a line that is read: more than the log writes."""
_HEAD: Final = ("timestamp", "level", "event")
_OURS: Final = frozenset(
    (*_HEAD, "role", "logger", "session", "first_session", "stream", "rule", "code", "check", "state", "version",
     "limit", "result", "log_level", "kind", "step")
)  # fmt: skip
"""Fields whose texts are words of ours; the others may have texts of other authors."""
_INSTANCE: Final = re.compile(r"agent-[0-9a-f]{16}")
"""What an agent calls itself. The other values of the field `connection` are addresses of relays."""
_NAMES: Final = {**NAMES, "name": "name", "subject": "subject", "connection": "connection"}
"""Fields that are names, and of what. A name made of digits is a number in the console form."""
_KEY: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_CONSOLE: Final = re.compile(
    r"(\d{4}-\d\d-\d\d[ T][0-9:.]{8,16}Z) ([a-z]{4,8}) {1,8}(client|relay|agent): ([^\n]{0,65536})"
)
_FIELD: Final = re.compile(r' ([a-z][a-z0-9_]{0,63})=("(?:[^"\\\n]|\\.)*+"|\[[^\[\]\n]{0,512}\]|[^\s"=\[]*+)(?![^ ])')
_FRAME: Final = re.compile(r'[ |]{0,16}File "([^"\n]{1,400})", line ([0-9]{1,7}),? in ([\w.<>]{1,100})', re.ASCII)
_LIBRARY: Final = re.compile(
    r"/(?:python3\.[0-9]{1,2}/)?(?:site|dist)-packages/|/python3\.[0-9]{1,2}/|/Python3[0-9]{1,2}(?:-32)?/Lib/",
    re.IGNORECASE,
)


def read_lines(data: bytes, contents: Contents) -> tuple[str, int]:
    """Return what may stand of a log, as JSON lines, and how many lines are left out as not ours."""
    found: list[dict[str, Any]] = []
    strange = 0
    for line in contents.without_absent(data.decode("utf-8", "replace")).splitlines():
        if (record := _record(line[:LINE])) is not None:
            found.append(_let_in(record, contents))
        elif (frame := _frame(line)) and found:
            found[-1].setdefault("trace", []).append(frame)
        else:
            strange += bool(line.strip())
    return "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in found), strange


def last_lines(text: str, most: int) -> bytes:
    """Return the last whole lines of a text, `most` bytes of UTF-8 together."""
    data = text.encode()
    return data if len(data) <= most else data[-most - 1 :].partition(b"\n")[2]


def _record(line: str) -> Mapping[str, Any] | None:
    """Return the fields of a line of the log; None for any other line."""
    if line.startswith("{"):
        fields = read_json_object(line)
        ours = all(isinstance(fields.get(name), str) for name in _HEAD) and "role" in fields
        return fields if ours and fields["level"] in (*LOG_LEVELS, "critical") else None
    if (match := _CONSOLE.fullmatch(line.rstrip())) is None:
        return None
    moment, level, role, rest = match.groups()
    found = list(_FIELD.finditer(rest))
    event = rest[: found[0].start()] if found else rest
    told = {match[1]: _value(match[1], match[2]) for match in found}
    return {**told, "timestamp": moment, "level": level, "event": event.rstrip(), "role": role}


def _value(name: str, text: str) -> Any:
    """Return a value as the console form has it: JSON, or a text without quotes."""
    if name in _NAMES and text[:1] not in ('"', "["):
        return text
    try:
        return read_json(text)
    except ValueError:
        return text


def _let_in(record: Mapping[str, Any], contents: Contents) -> dict[str, Any]:
    names = sorted(filter(_KEY.fullmatch, record), key=lambda name: name not in _HEAD)[:MAX_FIELDS]
    shaped = {name: _field(name, record[name], contents) for name in names if name != "trace"}
    if isinstance(trace := record.get("trace"), list):
        shaped["trace"] = [frame for line in trace if (frame := _frame(str(line)))]
    return {name: value for name, value in shaped.items() if value is not None}


def _field(name: str, value: Any, contents: Contents) -> Any:
    """Return what may stand of one field; None: nothing."""
    if name == "connection" and _INSTANCE.fullmatch(str(value)):
        return value
    if (kind := _NAMES.get(name)) is not None:
        return contents.named(kind, value)
    if name in _OURS:
        value = contents.word(value)
    elif contents.without_names and not isinstance(value, int | float):
        return None
    return safe_value(name, value)


def _frame(line: str) -> str:
    """Return a frame of a stack trace without the directories above the library that it is in; empty: it is none."""
    if (match := _FRAME.match(line[:1024])) is None:
        return ""
    *above, file = _LIBRARY.split(match[1].replace("\\", "/"))
    _, ours, within = f"/{file}".rpartition("/arcbridge/")
    name = f"arcbridge/{within}" if ours else file if above else file.rpartition("/")[2]
    return f"{name}:{match[2]} in {match[3]}"
