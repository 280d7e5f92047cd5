"""The audit log: one JSON object per request, also the refused, the cut and the upgraded ones.

Records are made in the event loop and written by a thread, so that a slow disk never stops a session. The queue is
bounded; what does not fit is dropped and counted, and the log itself says how many are missing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TextIO

from arcbridge.errors import ConfigError
from arcbridge.observe.foreign_text import clean, escape
from arcbridge.observe.line_sink import LineSink

FIELD_LIMIT = 1024


@dataclass(slots=True)
class AuditRecord:
    """One request, filled in as it goes on. Texts may come from callers: they are cleaned when written.

    `outcome`: `answered`, `refused` (by us), `cut` (either side vanished), `upgraded`, `connected` (TCP target).
    `bytes_up` flow towards the cluster, `bytes_down` towards the caller.
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
    bytes_up: int = 0
    bytes_down: int = 0
    started: float = field(default_factory=time.monotonic)

    def line(self, now: float) -> str:
        """The record as one line of JSON; `now` is monotonic seconds."""
        out: dict[str, str | int | float] = {
            "ts": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "event": "audit",
            "request": self.request,
            "session": self.session,
            "user": _name(self.user),
            "groups": self.groups,
        }
        texts = {
            "as": _name(self.as_user),
            "method": self.method,
            "verb": self.verb,
            "group": self.group,
            "resource": self.resource,
            "subresource": self.subresource,
            "namespace": self.namespace,
            "name": self.name,
            "path": self.path,
            "target": self.target,
            "upgrade": self.upgrade,
            "reason": self.reason,
        }
        out.update({key: clean(value, FIELD_LIMIT) for key, value in texts.items() if value})
        if self.status:
            out["status"] = self.status
        out["outcome"] = self.outcome
        out["bytes_up"] = self.bytes_up
        out["bytes_down"] = self.bytes_down
        out["duration"] = round(now - self.started, 6)
        return json.dumps(out, ensure_ascii=False, separators=(",", ":"))


class AuditLog:
    """Writes records to a file (appended, mode 0600), to standard output (`-`), or nowhere (empty)."""

    def __init__(self, file: str) -> None:
        """Opens the file at once. Raises ConfigError."""
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
        """Queues one record; never waits."""
        self.records += 1
        if self._sink is not None:
            self._sink.write(record.line(time.monotonic()))

    def close(self) -> None:
        """Writes what is queued (2 s at most: call it at the very end) and closes the file."""
        if self._sink is not None:
            self._sink.close()
        if self._own is not None:
            self._own.close()


def _name(name: str) -> str:
    """Whole identity names are the point of an audit log, so they are escaped and cut but never taken for secrets."""
    return escape(name[:FIELD_LIMIT])


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
