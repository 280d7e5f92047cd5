"""What a request asks for beyond verb and resource, as its audit record has it: from the target alone.

A command and a container for exec and attach, ports where port-forward names them in its query, and whether the record
`begun` stands before the request's first byte. It reads no body and decides no access. Invariant: no value of a query
gets into a record unless it is one of those named here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_plus

from arcbridge.agent.audit.record import Value, asked_text
from arcbridge.agent.kube.framing import check_target
from arcbridge.agent.kube.request_info import RequestInfo, request_info
from arcbridge.agent.kube.seats import LONG_RUNNING_SUBRESOURCES, LONG_RUNNING_VERBS
from arcbridge.observe.foreign_text import REDACTED

MAX_CACHED_TARGET = 512
"""Characters of a target whose meaning is remembered."""
MAX_FIELDS = 256
"""Fields of a query that are looked at for a command line."""

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_LONG_SUBRESOURCES = LONG_RUNNING_SUBRESOURCES - {"log"}  # a log that is not followed is a plain read
_TRUE = frozenset({"", "1", "t", "true"})

_SECRET_WORD = r"[\w.-]*(?:token|secret|passw(?:or)?d|pwd|credential|private[_-]?key|api[_-]?key|authorization)s?"
# `--password=x`, `PASSWORD=x`, `password: x`, also within a script that is one argument.
_SECRET_VALUE = re.compile(
    rf"(?i)((?:^|[\s;&|('\"])-{{0,2}}{_SECRET_WORD}\s*[=:]\s*)(?:'[^']*'|\"[^\"]*\"|[^\s;&|'\"]+)"
)
_SECRET_FLAG = re.compile(rf"(?i)--?{_SECRET_WORD}")
_SECRET_FLAG_INSIDE = re.compile(rf"(?i)((?:^|\s)--{_SECRET_WORD}\s+)[^\s;&|]+")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a target asks for. Made once for each of those that recur."""

    info: RequestInfo
    text: str
    """The fields of `info` as a record's line has them."""
    begins: bool
    """Whether the record `begun` stands before the request's first byte."""
    detailed: bool
    """Whether `query_details` finds something."""


def asked(method: str, target: str, upgrade: bool) -> Asked:
    """Return what a request asks for. Raises RequestRefusal for a target that is not passed on."""
    return _cached(method, target, upgrade) if len(target) <= MAX_CACHED_TARGET else _read(method, target, upgrade)


def _read(method: str, target: str, upgrade: bool) -> Asked:
    check_target(target)
    info = request_info(method, target, upgrade=upgrade)
    where = (info.namespace, info.name, info.path_class)
    text = asked_text(info.verb, info.group, info.resource, info.subresource, *where) + ',"cut":true' * info.cut
    return Asked(info, text, _begins(method, target, info, upgrade), info.subresource in _LONG_SUBRESOURCES)


_cached = lru_cache(maxsize=1024)(_read)


def _begins(method: str, target: str, info: RequestInfo, upgrade: bool) -> bool:
    """Tell whether a request lasts or may change something: a kill of the agent must not take its only record."""
    if upgrade or method not in _READS or info.verb in LONG_RUNNING_VERBS or info.subresource in _LONG_SUBRESOURCES:
        return True
    return info.subresource == "log" and any(value.lower() in _TRUE for value in _values(target, "follow"))


def query_details(info: RequestInfo, target: str, *, commands: bool) -> dict[str, Value] | None:
    """Return what exec, attach and port-forward ask for in their query; None where that is nothing.

    Ports are there only where the client names them: kubectl does so in frames behind the 101, which are not read.
    """
    found: dict[str, Value] = {}
    if info.subresource in ("exec", "attach"):
        for container in _values(target, "container")[:1]:
            found["container"] = container
        command = _values(target, "command")
        if command and commands:
            found["command"] = redacted_command(command)
        for key in ("stdin", "tty"):
            if any(value.lower() in _TRUE for value in _values(target, key)[:1]):
                found[key] = True
    elif info.subresource == "portforward":
        ports = _values(target, "ports")
        if ports:
            found["ports"] = ports
    return found or None


def redacted_command(command: list[str]) -> list[str]:
    """Return a command line whose arguments that look like secrets by their name (`--token x`, `PASSWORD=x`) are
    redacted."""
    out: list[str] = []
    secret_next = False
    for word in command:
        if secret_next and not word.startswith("-"):
            out.append(REDACTED)
            secret_next = False
            continue
        secret_next = _SECRET_FLAG.fullmatch(word) is not None
        text = _SECRET_VALUE.sub(rf"\g<1>{REDACTED}", word[:8192])
        out.append(_SECRET_FLAG_INSIDE.sub(rf"\g<1>{REDACTED}", text))
    return out


def _values(target: str, wanted: str) -> list[str]:
    """Return the values of a field of the query, in order, read as the API server reads them."""
    values = []
    for field in target.partition("?")[2].split("&", MAX_FIELDS)[:MAX_FIELDS]:
        key, _, value = field.partition("=")
        if ";" not in field and (key == wanted or ("%" in key and unquote_plus(key) == wanted)):
            values.append(unquote_plus(value))
    return values
