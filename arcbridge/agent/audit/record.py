"""Keeps one request as the audit log has it, and makes its lines of JSON.

A record changes by its methods alone, and `TRANSITIONS` says which outcome may follow which. A request that only reads
leaves one record, when it is over (`complete`). One that lasts or that changes something leaves `begun` before its
first byte goes to the API server, and `ended`; in between `details` where its body, or the stream behind its upgrade,
asks for something that the log is to show. It writes nothing. Invariants: a line is one JSON object of a few KiB,
whatever callers put into its texts; names of objects are escaped and cut, and never taken for secrets; what was cut or
left out is counted in `more`, and has its SHA-256 in `sha256`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from json.encoder import encode_basestring as _quote

from arcbridge.agent.audit.budget import AuditBudget
from arcbridge.audit.chain import timestamp
from arcbridge.observe.untrusted_text import clean, escape

FIELD_LIMIT = 1024
"""Bytes of a text in a record: of a reason, a word of a command line, the name of a user or of a group."""
NAME_LIMIT = 253
"""Bytes of the name of an object, a resource or a group of resources: Kubernetes' own bound (RFC 1123 subdomain)."""
MAX_LISTED = 64
"""Values of a list that are written."""
LIST_LIMIT = 2048
"""Bytes of all values of a list together."""
DETAILS_LIMIT = 4096
"""Bytes of all values of the lists of `details` together."""
_CLIENT_LIMIT = 128
"""Bytes of a text of the client's own."""
_MAX_CACHED_TEXT = 128
"""Characters of a text whose clean form is cached."""
_MAX_CACHED_HEAD = 2048
"""Bytes of header lines whose text is cached."""
_PATH_FIELDS = ("method", "verb", "group", "resource", "subresource", "namespace", "name", "path")
_LONG = frozenset({"proxy_path"})
"""Texts of `details` that have FIELD_LIMIT; the others are names."""


class Excerpt(list[str]):
    """The first values of a list, of which `more` further ones were counted and not kept."""

    more = 0


Value = str | int | bool | list[str] | Mapping[str, str]
"""What a field of `details` holds. Mappings are `more` and `sha256`: what is missing of a field, and its hash."""


class RequestOutcome(StrEnum):
    """How a request ended, or would end now."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """By the agent."""
    CUT = "cut"
    """It broke off, on either side."""
    FAILED = "failed"
    """By a defect of the agent."""
    UPGRADED = "upgraded"
    CONNECTED = "connected"
    """To a TCP target."""


TRANSITIONS: dict[RequestOutcome, frozenset[RequestOutcome]] = {
    RequestOutcome.ANSWERED: frozenset(RequestOutcome) - {RequestOutcome.ANSWERED},
    RequestOutcome.REFUSED: frozenset({RequestOutcome.CUT, RequestOutcome.FAILED}),
    RequestOutcome.CUT: frozenset({RequestOutcome.FAILED}),
    RequestOutcome.FAILED: frozenset(),
    RequestOutcome.UPGRADED: frozenset({RequestOutcome.FAILED}),
    RequestOutcome.CONNECTED: frozenset({RequestOutcome.CUT, RequestOutcome.FAILED}),
}
"""Outcome -> those that may follow it; before any other one it stays, since the first cause counts. What was upgraded
is cut only where the agent ends it (`AuditRecord.revoke`): it ends with its connection."""


class AuditSubject:
    """The user and the session that records are of; made once for many requests."""

    __slots__ = ("budget", "grants", "session", "text", "user")

    def __init__(
        self,
        session: str,
        user: str = "",
        groups: int = 0,
        bound: str = "none",
        budget: AuditBudget | None = None,
        restricted: Sequence[str] = (),
        actor: str = "",
        lent: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`groups`: how many the user has. `bound`: by what the token is bound to a key (`identity.proof.BindingKind`).
        `budget`: what the user's records may take; None: they are not counted. `restricted`: what the session gave up
        of the user's rights, as words that were checked. `actor`: the program that acts for the user. `lent`: uid and
        text of each grant by which groups are lent to the user."""
        self.grants = frozenset([uid for uid, _ in lent])
        """Uids of what is lent."""
        self.session, self.user, self.budget = session, user, budget
        name = _quote(_cut(user, FIELD_LIMIT))
        self.text = f',"session":{_quote(session)},"user":{name},"groups":{groups},"bound":"{bound}"'
        if actor:
            self.text += f',"actor":{_quote(_cut(actor, FIELD_LIMIT))}'
        if restricted:
            self.text += f',"restricted":{json.dumps(list(restricted))}'
        if lent:
            self.text += f',"elevated":{json.dumps([text for _, text in lent], ensure_ascii=False)}'
        """The part of a line that says so."""


@dataclass(slots=True)
class AuditRecord:
    """One request, filled in as it is served. Texts may come from callers: they are cleaned when written.

    `bytes_up` flow towards the cluster, `bytes_down` towards the caller.
    """

    request: str
    subject: AuditSubject
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
    path_fields: str = ""
    """`method` and the seven fields before this one, as the function of this name gives them; empty: they are made
    anew."""
    status: int = 0
    outcome: RequestOutcome = RequestOutcome.ANSWERED
    reason: str = ""
    upgrade: str = ""
    target: str = ""
    limit: str = ""
    """The limit that the request was over, where that is why it was refused."""
    omitted: int = 0
    """Refusals by that limit which came in one burst before this record and have none of their own."""
    details: Mapping[str, Value] | None = None
    """What the request asks for beyond its path: a command, a container, ports, privileges; it is replaced and never
    changed."""
    client: bytes = b""
    """Header lines as they came, kubectl's own among them (`Kubectl-Command`, `Kubectl-Session`)."""
    begun: bool = False
    """A `begun` record stands before this one."""
    bytes_up: int = 0
    bytes_down: int = 0
    started: float = field(default_factory=time.monotonic)
    _rest: tuple[Mapping[str, Value] | None, str] | None = field(default=None, init=False, repr=False, compare=False)
    """The details that were written last, and the part of a line that they became: `begun` and `ended` share it."""

    # -- what becomes known of a request --------------------------------------------------------------------------

    def is_of(self, subject: AuditSubject) -> None:
        """Take the subject as whom the request is authorized, unless `begun` names one."""
        if not self.begun:
            self.subject = subject

    def has_client(self, lines: bytes) -> None:
        """Take the header lines in which the client says what it does."""
        self.client = lines

    def asks(self, path: tuple[str, str, str, str, str, str, str], text: str) -> None:
        """Take what the head asks for: verb to path, as `path_fields` takes them behind the method, and its `text`."""
        self.verb, self.group, self.resource, self.subresource, self.namespace, self.name, self.path = path
        self.path_fields = text

    def acts_as(self, user: str, groups: tuple[str, ...]) -> None:
        """Take the subject of `--as`."""
        self.as_user, self.as_groups = user, groups

    def asks_upgrade(self, protocol: str) -> None:
        """Take the protocol that the caller wants to switch to."""
        self.upgrade = protocol

    def has_details(self, details: Mapping[str, Value] | None) -> None:
        """Take what is asked for beyond the path, in place of what was known before."""
        self.details = details

    def is_over(self, limit: str, omitted: int) -> None:
        """Take the limit that the request is over, and how many refusals by it left no record."""
        self.limit, self.omitted = limit, omitted

    def begin(self, written: bool = True) -> None:
        """Note that a record `begun` was written, or was not."""
        self.begun = self.begun or written

    def answer(self, status: int) -> None:
        """Take the status of an answer whose first byte goes to the caller."""
        self.status = status

    def pass_on(self, count: int) -> None:
        """Count bytes that went on to the caller."""
        self.bytes_down += count

    def move(self, up: int, down: int) -> None:
        """Take the number of all bytes that were moved."""
        self.bytes_up, self.bytes_down = up, down

    # -- how it ends ----------------------------------------------------------------------------------------------

    def refuse(self, reason: str, status: int = 0) -> None:
        """The agent refuses it."""
        self.status, self.reason = status, reason
        self._change(RequestOutcome.REFUSED)

    def cut(self, reason: str = "") -> None:
        """It breaks off; what was upgraded has ended."""
        self.reason = reason or self.reason
        self._change(RequestOutcome.CUT)

    def break_off(self, error: BaseException) -> None:
        """It breaks off by an error, unless a reason for its end is known."""
        if not self.reason:
            self.cut(type(error).__name__)

    def revoke(self, reason: str) -> None:
        """The agent ends it: a right was lost, or the session ends."""
        self.reason = reason
        if self.outcome is not RequestOutcome.FAILED:
            self.outcome = RequestOutcome.CUT

    def fail(self, error: BaseException) -> None:
        """A defect of the agent ends it."""
        self.reason = type(error).__name__
        self._change(RequestOutcome.FAILED)

    def switch(self) -> None:
        """The API server has switched protocols."""
        self._change(RequestOutcome.UPGRADED)

    def connect(self) -> None:
        """A TCP target is connected."""
        self._change(RequestOutcome.CONNECTED)

    def _change(self, outcome: RequestOutcome) -> None:
        if outcome in TRANSITIONS[self.outcome]:
            self.outcome = outcome

    # -- lines ----------------------------------------------------------------------------------------------------

    def line(self, now: float) -> str:
        """Return the record of a request that is over; `now` is monotonic seconds."""
        status = f',"status":{self.status}' if self.status else ""
        reason = f',"reason":{_quoted(self.reason)}' if self.reason else ""
        if self.limit:
            reason = f',"limit":{_quoted(self.limit)}{reason}' + f',"omitted":{self.omitted}' * bool(self.omitted)
        return (
            f"{self._start('ended' if self.begun else 'complete')}{reason}{status}"
            f',"outcome":"{self.outcome}","bytes_up":{self.bytes_up},"bytes_down":{self.bytes_down}'
            f',"duration":{now - self.started:.6f}}}'
        )

    def begun_line(self) -> str:
        """Return the record that stands before the request's first byte."""
        return self._start("begun") + "}"

    def details_line(self) -> str:
        """Return the record that stands before the last byte of a body which asks for what `details` says."""
        return self._start("details") + "}"

    def recorded_line(self, recording: Mapping[str, object]) -> str:
        """Return the record of a recording that is finished: its file, SHA-256, bytes, and how it ended."""
        return f'{self._start("recorded")},"recording":{json.dumps(recording)}}}'

    def _start(self, stage: str) -> str:
        # Joined without the general encoder, which took half of the time of each line.
        text = (
            f'{{"ts":"{timestamp()}","event":"audit","stage":"{stage}","request":{_quote(self.request)}'
            f"{self.subject.text}"
        )
        text += self.path_fields or path_fields(
            self.method, self.verb, self.group, self.resource, self.subresource, self.namespace, self.name, self.path
        )
        if self.target:
            text += f',"target":{_quoted_name(self.target)}'
        if self.upgrade:
            text += f',"upgrade":{_quoted(self.upgrade)}'
        if not (self.details or self.as_user or self.as_groups):
            if self.client:  # most requests of kubectl
                made = _cached_client_text if len(self.client) <= _MAX_CACHED_HEAD else _client_text
                text += made(self.client)
        else:
            if self._rest is None or self._rest[0] is not self.details:
                self._rest = self.details, self._rest_text()
            text += self._rest[1]
        return text

    def _rest_text(self) -> str:
        """Return the fields that few requests have, and what is missing of them."""
        more: dict[str, str] = {}
        sha256: dict[str, str] = {}
        text = ""
        if self.as_user or self.as_groups:
            text += _bounded_text("as", self.as_user, FIELD_LIMIT, more, sha256)
            if self.as_groups:
                text += _bounded_list("as_groups", self.as_groups, LIST_LIMIT, more, sha256)[0]
        room = DETAILS_LIMIT
        for key, value in (self.details or {}).items():
            if isinstance(value, str):
                text += _bounded_text(key, value, FIELD_LIMIT if key in _LONG else NAME_LIMIT, more, sha256)
            elif isinstance(value, list):
                part, used = _bounded_list(key, value, min(room, LIST_LIMIT), more, sha256)
                text, room = text + part, room - used
            elif isinstance(value, Mapping):
                (more if key == "more" else sha256).update(value)
            else:
                text += f',"{key}":{json.dumps(value)}'
        if self.client:
            own_text, whole = _client_says(self.client)
            text += own_text
            more |= {} if whole else _CLIENT_CUT
        return text + _missing_text(more, sha256)


def path_fields(
    method: str, verb: str, group: str, resource: str, subresource: str, namespace: str, name: str, path: str
) -> str:
    """Return what method and path ask for, as the part of a line: each field with the comma before it, empty ones left
    out."""
    values = zip(_PATH_FIELDS, (method, verb, group, resource, subresource, namespace, name, path), strict=True)
    return "".join([f',"{key}":{_quoted_name(value)}' for key, value in values if value])


def left_out_line(user: str, records: int, size: int) -> str:
    """Return the record of records that were left out because a user is over `limits.audit_bytes_per_second`."""
    name = _quote(_cut(user, FIELD_LIMIT))
    return f'{{"ts":"{timestamp()}","event":"audit-left-out","user":{name},"records":{records},"bytes":{size}}}'


def left_behind_line(request: str, recording: Mapping[str, object]) -> str:
    """Return the record of a recording that an agent process which is gone has begun; `begun` of the request has
    whose it is."""
    found = f'"request":{_quote(request)},"recording":{json.dumps(recording)}'
    return f'{{"ts":"{timestamp()}","event":"audit","stage":"recorded",{found}}}'


def words_sha256(words: Sequence[str]) -> str:
    """Return the SHA-256 of a list: of the bytes of its values as they came, each with a NUL behind it."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(_bytes(word) + b"\0")
    return digest.hexdigest()


def _bytes(text: str) -> bytes:
    """Return a text as it came: what was no UTF-8 was read with `surrogateescape`."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON can hold half of a pair
        return text.encode("utf-8", "surrogatepass")


def total_of(values: Sequence[str]) -> int:
    """Return how many values there were."""
    return len(values) + (values.more if isinstance(values, Excerpt) else 0)


def listed(values: Sequence[str], total: int, room: int = LIST_LIMIT) -> tuple[list[str], str, int]:
    """Return as many values of a list as a line takes, escaped and cut, what is missing (`2 cut, 5 left out`), and the
    bytes of those values.

    `total`: how many there were; `room`: bytes of all together.
    """
    kept: list[str] = []
    cut = used = 0
    for value in values[:MAX_LISTED]:
        if room <= 0:
            break
        text = _cut(value, FIELD_LIMIT if room > FIELD_LIMIT else room)
        size = _size(text)
        cut += text[-1:] == "…"
        used += size
        room -= size + 1
        kept.append(text)
    left_out = total - len(kept)
    missing = [f"{cut} cut"] * bool(cut) + [f"{left_out} left out"] * bool(left_out)
    return kept, ", ".join(missing) if missing else "", used


def _bounded_list(
    key: str, values: Sequence[str], room: int, more: dict[str, str], sha256: dict[str, str]
) -> tuple[str, int]:
    """Return a list as a part of a line, and the bytes of its values."""
    whole = not isinstance(values, Excerpt)  # else who made it gives the hash of what it is of
    kept, missing, used = listed(values, total_of(values), room)
    if missing and key not in more:
        more[key] = missing
        if whole:
            sha256[key] = words_sha256(values)
    return f',"{key}":[{", ".join(map(_quote, kept))}]', used


def _bounded_text(key: str, value: str, limit: int, more: dict[str, str], sha256: dict[str, str]) -> str:
    text = _cut(value, limit)
    if text.endswith("…") and text != value:
        more[key] = "cut"
        sha256[key] = hashlib.sha256(_bytes(value)).hexdigest()
    return f',"{key}":{_quote(text)}'


# No group of it is lazy: behind each blank of a value that one looks ahead to the next character that is none.
_CLIENT_LINES = re.compile(rb"(?im)^kubectl-(command|session):([^\r\n]*+)")


def _client_says(lines: bytes) -> tuple[str, bool]:
    """Return what kubectl says of itself as a part of a line, and whether it is all there is."""
    found: dict[str, str] = {}
    whole = True
    for name, line in _CLIENT_LINES.findall(lines):
        value = line.strip(b" \t")
        begin = value[: 2 * _CLIENT_LIMIT].decode("latin-1")
        text = clean(begin, _CLIENT_LIMIT)
        whole = whole and text == escape(value.decode("latin-1")) and name.decode().lower() not in found
        found.setdefault(name.decode().lower(), text)
    return (f',"client_says":{json.dumps(found, ensure_ascii=False)}' if found else ""), whole


_CLIENT_CUT = {"client_says": "cut or redacted"}


def _client_text(lines: bytes) -> str:
    """Return what kubectl says of itself, of a request that has no other of the rare fields."""
    text, whole = _client_says(lines)
    return text if whole else text + _missing_text(_CLIENT_CUT, {})


def _missing_text(more: Mapping[str, str], sha256: Mapping[str, str]) -> str:
    text = f',"more":{json.dumps(more, ensure_ascii=False)}' if more else ""
    return text + f',"sha256":{json.dumps(sha256)}' if sha256 else text


_cached_client_text = lru_cache(maxsize=512)(_client_text)


def _quoted(text: str) -> str:
    """Return a caller's text, cleaned, as JSON; short ones are cached, because the same names recur."""
    return _cached_text(text) if len(text) <= _MAX_CACHED_TEXT else _quote(clean(text, FIELD_LIMIT))


def _quoted_name(name: str) -> str:
    """Return the name of an object as JSON: names are what a record is about, so they are never taken for secrets."""
    return _cached_name(name) if len(name) <= _MAX_CACHED_TEXT else _quote(_cut(name, NAME_LIMIT))


@lru_cache(maxsize=4096)
def _cached_text(text: str) -> str:
    return _quote(clean(text, FIELD_LIMIT))


@lru_cache(maxsize=4096)
def _cached_name(name: str) -> str:
    return _quote(_cut(name, NAME_LIMIT))


def _cut(text: str, limit: int) -> str:
    """Return a text on one line in at most `limit` bytes of UTF-8; one that was cut ends with `…`."""
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text  # as almost all are
    escaped = escape(text[:limit])
    if len(text) <= limit and _size(escaped) <= limit:
        return escaped
    return escaped.encode()[: max(0, limit - 3)].decode("utf-8", "ignore") + "…"


def size_of(text: str) -> int:
    """Return the bytes of a text as a record has it: on one line, in UTF-8."""
    return _size(text if text.isascii() and text.isprintable() else escape(text))


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
