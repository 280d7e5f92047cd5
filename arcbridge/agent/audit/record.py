"""One request as the audit log has it, and its form as lines of JSON.

A request that only reads leaves one record, when it is over (`complete`). One that lasts or that changes something
leaves `begun` before its first byte goes to the API server, and `ended`; in between `details` where its body asks for
something that the log is to show. It writes nothing. Invariant: a line is one JSON object, whatever callers put into
its texts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from json.encoder import encode_basestring as _quote

from arcbridge.observe.foreign_text import clean, escape

FIELD_LIMIT = 1024
_MAX_CACHED_TEXT = 128
"""Characters of a text whose clean form is cached."""


class Excerpt(list[str]):
    """The first values of a list, of which `more` further ones were counted and not kept."""

    more = 0


Value = str | int | bool | list[str]
"""What a field of `details` holds."""


@dataclass(slots=True)
class AuditRecord:
    """One request, filled in as it is served. Texts may come from callers: they are cleaned when written.

    `outcome`: `answered`, `refused` (by the agent), `cut` (it broke off on either side), `failed` (a defect of the
    agent), `upgraded`, `connected` (TCP target). `bytes_up` flow towards the cluster, `bytes_down` towards the caller.
    """

    request: str
    session: str
    user: str = ""
    groups: int = 0
    bound: str = "none"
    """By what the user's token is bound to a key (`identity.proof.BindingKind`)."""
    as_user: str = ""
    as_groups: tuple[str, ...] = ()
    """Groups that the caller asked to act with (`--as-group`)."""
    method: str = ""
    verb: str = ""
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""
    """Class of a non-resource path."""
    asked: str = ""
    """The seven fields before this one as `asked_text` gives them, where that is known already; empty: made anew."""
    status: int = 0
    outcome: str = "answered"
    reason: str = ""
    upgrade: str = ""
    target: str = ""
    limit: str = ""
    """The limit that the request was over, where that is why it was refused."""
    omitted: int = 0
    """Refusals by that limit which came in one burst before this record and have none of their own."""
    details: Mapping[str, Value] | None = None
    """What the request asks for beyond its path: a command, a container, ports, privileges."""
    begun: bool = False
    """A `begun` record stands before this one."""
    bytes_up: int = 0
    bytes_down: int = 0
    started: float = field(default_factory=time.monotonic)
    _as_text: str = field(default="", init=False, repr=False, compare=False)
    """`as_user` and `as_groups` as the part of a line: `begun` and `ended` have the same, cleaned once."""
    _details_text: tuple[Mapping[str, Value], str] | None = field(default=None, init=False, repr=False, compare=False)
    """The details that were cleaned last, and the part of a line that they became."""

    def line(self, now: float) -> str:
        """Return the record of a request that is over; `now` is monotonic seconds."""
        status = f',"status":{self.status}' if self.status else ""
        reason = f',"reason":{_quoted(self.reason)}' if self.reason else ""
        if self.limit:
            reason = f',"limit":{_quoted(self.limit)}{reason}' + f',"omitted":{self.omitted}' * bool(self.omitted)
        return (
            f"{self._start('ended' if self.begun else 'complete')}{reason}{status}"
            f',"outcome":"{self.outcome}","bytes_up":{self.bytes_up},"bytes_down":{self.bytes_down}'
            f',"duration":{round(now - self.started, 6)}}}'
        )

    def begun_line(self) -> str:
        """Return the record that stands before the request's first byte."""
        return self._start("begun") + "}"

    def details_line(self) -> str:
        """Return the record that stands before the last byte of a body which asks for what `details` says."""
        return self._start("details") + "}"

    def _start(self, stage: str) -> str:
        # Joined without the general encoder, which took half of the time of each line.
        text = (
            f'{{"ts":"{timestamp()}","event":"audit","stage":"{stage}","request":{_quote(self.request)}'
            f"{_who(self.session, self.user, self.groups, self.bound)}"
        )
        if self.as_user or self.as_groups:
            if not self._as_text:
                groups = f',"as_groups":{_listed(self.as_groups)}' if self.as_groups else ""
                self._as_text = f',"as":{_quoted_name(self.as_user)}{groups}'
            text += self._as_text
        if self.method:
            text += f',"method":{_quoted(self.method)}'
        text += self.asked or asked_text(
            self.verb, self.group, self.resource, self.subresource, self.namespace, self.name, self.path
        )
        if self.target:
            text += f',"target":{_quoted(self.target)}'
        if self.upgrade:
            text += f',"upgrade":{_quoted(self.upgrade)}'
        if self.details:
            if self._details_text is None or self._details_text[0] is not self.details:
                self._details_text = self.details, _cleaned_details(self.details)
            text += self._details_text[1]
        return text


def asked_text(verb: str, group: str, resource: str, subresource: str, namespace: str, name: str, path: str) -> str:
    """Return what a path asks for, as the part of a line: each field with the comma before it, empty ones left out."""
    pairs = (
        ("verb", verb),
        ("group", group),
        ("resource", resource),
        ("subresource", subresource),
        ("namespace", namespace),
        ("name", name),
        ("path", path),
    )
    return "".join([f',"{key}":{_quoted(value)}' for key, value in pairs if value])


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

MAX_LISTED = 64
"""Values of a list that are written; how many were left out stands behind them."""
LIST_LIMIT = 2048
"""Characters of all values of a list together."""


def bounded(values: list[str] | tuple[str, ...]) -> list[str]:
    """Return the values of a list, cleaned, as many as a line takes; the last one says how many are missing."""
    kept: list[str] = []
    room = LIST_LIMIT
    for value in values[:MAX_LISTED]:
        text = clean(value, FIELD_LIMIT)
        if len(text) > room:
            break
        kept.append(text)
        room -= len(text)
    missing = len(values) - len(kept) + (values.more if isinstance(values, Excerpt) else 0)
    return [*kept, f"… {missing} more"] if missing else kept


def _cleaned_details(details: Mapping[str, Value]) -> str:
    parts = []
    for key, value in details.items():
        if isinstance(value, str):
            value = clean(value, FIELD_LIMIT)
        elif isinstance(value, list):
            value = bounded(value)
        parts.append(f',"{key}":{json.dumps(value, ensure_ascii=False)}')
    return "".join(parts)


def _listed(names: tuple[str, ...]) -> str:
    """Return names of groups as JSON: never taken for secrets, and bounded."""
    kept = [_name(name) for name in names[:MAX_LISTED]]
    if len(names) > MAX_LISTED:
        kept.append(f"… {len(names) - MAX_LISTED} more")
    return json.dumps(kept, ensure_ascii=False)


def _who(session: str, user: str, groups: int, bound: str) -> str:
    if len(user) <= _MAX_CACHED_TEXT and len(session) <= _MAX_CACHED_TEXT:
        return _cached_who(session, user, groups, bound)
    return _who_text(session, user, groups, bound)


def _who_text(session: str, user: str, groups: int, bound: str) -> str:
    return f',"session":{_quote(session)},"user":{_quote(_name(user))},"groups":{groups},"bound":"{bound}"'


_cached_who = lru_cache(maxsize=1024)(_who_text)


def _quoted(text: str) -> str:
    """Return a caller's text, cleaned, as JSON; short ones are cached, because the same names recur."""
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
    """Return an identity name; whole ones are the point of an audit log, so they are escaped and cut but never taken
    for secrets."""
    return escape(name[:FIELD_LIMIT])
