"""Writes the audit log: one JSON object per request, also for those that were refused, cut or upgraded.

Records are made in the event loop and written by a thread, so that a slow disk never stops a session. The queue is
bounded: what does not fit is dropped and counted. Invariant: the log itself says how many records are missing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from functools import lru_cache
from json.encoder import encode_basestring as _quote
from typing import TextIO

from arcbridge.errors import ConfigError
from arcbridge.observe.foreign_text import clean, escape
from arcbridge.observe.line_sink import LineSink

FIELD_LIMIT = 1024
_MAX_CACHED_TEXT = 128
"""Characters of a text whose clean form is cached."""


@dataclass(slots=True)
class AuditRecord:
    """One request, filled in as it is served. Texts may come from callers: they are cleaned when written.

    `outcome`: `answered`, `refused` (by the agent), `cut` (it broke off on either side), `upgraded`, `connected` (TCP
    target). `bytes_up` flow towards the cluster, `bytes_down` towards the caller.
    """

    request: str
    session: str
    user: str = ""
    groups: int = 0
    as_user: str = ""
    method: str = ""
    verb: str = ""
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""
    """Class of a non-resource path."""
    status: int = 0
    outcome: str = "answered"
    reason: str = ""
    upgrade: str = ""
    target: str = ""
    limit: str = ""
    """The limit that the request was over, where that is why it was refused."""
    omitted: int = 0
    """Refusals by that limit which came in one burst before this record and have none of their own."""
    bytes_up: int = 0
    bytes_down: int = 0
    started: float = field(default_factory=time.monotonic)

    def line(self, now: float) -> str:
        """The record as one line of JSON; `now` is monotonic seconds."""
        # Joined without the general encoder, which took half of the time of each line.
        parts = [
            f'{{"ts":"{_timestamp()}","event":"audit","request":{_quote(self.request)},"session":{_quote(self.session)}'
            f',"user":{_quoted_name(self.user)},"groups":{self.groups}'
        ]
        if self.as_user:
            parts.append(f',"as":{_quoted(_name(self.as_user))}')
        for key, value in (
            ("method", self.method),
            ("verb", self.verb),
            ("group", self.group),
            ("resource", self.resource),
            ("subresource", self.subresource),
            ("namespace", self.namespace),
            ("name", self.name),
            ("path", self.path),
            ("target", self.target),
            ("upgrade", self.upgrade),
            ("limit", self.limit),
            ("reason", self.reason),
        ):
            if value:
                parts.append(f',"{key}":{_quoted(value)}')
        if self.omitted:
            parts.append(f',"omitted":{self.omitted}')
        if self.status:
            parts.append(f',"status":{self.status}')
        parts.append(
            f',"outcome":"{self.outcome}","bytes_up":{self.bytes_up},"bytes_down":{self.bytes_down}'
            f',"duration":{round(now - self.started, 6)}}}'
        )
        return "".join(parts)


class AuditLog:
    """Writes records to a file (appended, mode 0600), to standard output (`-`), or nowhere (empty)."""

    def __init__(self, file: str) -> None:
        """Open the file at once. Raises ConfigError."""
        self.records = 0
        self._own: TextIO | None = None
        self._sink: LineSink | None = None
        if not file:
            return
        stream = sys.stdout
        if file != "-":
            try:
                stream = self._own = open(file, "a", encoding="utf-8", opener=_private)  # noqa: SIM115  closed by close()
            except OSError as error:
                raise ConfigError(f"audit.file: {file} cannot be opened: {error.strerror}") from error
        self._sink = LineSink(stream, lambda count: json.dumps({"event": "audit-lost", "records": count}))

    @property
    def dropped(self) -> int:
        """Records that were lost since the start because the queue was full or the disk refused them."""
        return self._sink.dropped if self._sink is not None else 0

    def write(self, record: AuditRecord) -> None:
        """Queue one record; never waits."""
        self.records += 1
        if self._sink is not None:
            self._sink.write(record.line(time.monotonic()))

    def close(self) -> None:
        """Write what is queued (2 s at most: call it at the very end) and closes the file."""
        if self._sink is not None:
            self._sink.close()
        if self._own is not None:
            self._own.close()


def _timestamp() -> str:
    """Now, as RFC 3339 with milliseconds; the part that changes once a second is cached."""
    global _second, _second_text
    now = time.time()
    second = int(now)
    if second != _second:
        _second, _second_text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    return f"{_second_text}.{int((now - second) * 1000):03d}Z"


_second = -1
_second_text = ""


def _quoted(text: str) -> str:
    """A caller's text, cleaned, as JSON; short ones are cached, because the same names recur."""
    return _cached_text(text) if len(text) <= _MAX_CACHED_TEXT else _quote(clean(text, FIELD_LIMIT))


def _quoted_name(name: str) -> str:
    return _cached_name(name) if len(name) <= _MAX_CACHED_TEXT else _quote(_name(name))


@lru_cache(maxsize=4096)
def _cached_text(text: str) -> str:
    return _quote(clean(text, FIELD_LIMIT))


@lru_cache(maxsize=1024)
def _cached_name(name: str) -> str:
    return _quote(_name(name))


def _name(name: str) -> str:
    """Whole identity names are the point of an audit log, so they are escaped and cut but never taken for secrets."""
    return escape(name[:FIELD_LIMIT])


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
