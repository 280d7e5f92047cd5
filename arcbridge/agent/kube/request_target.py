"""Reads from a target what a request asks for beyond verb and resource, as its audit record has it.

A command and a container for exec and attach, also where they go to a kubelet through `proxy`, the path behind `proxy`,
ports where port-forward names them in its query, and whether the record `begun` stands before the request's first byte.
It reads no body and decides no access, but refuses targets that parsers read differently (docs/threats.md#H6).
Invariants: no value of a query gets into a record unless it is one of those named here; where a record has less of a
resource's path than was sent, but for the API's version, it says so (docs/threats.md#A41). Of queries it says so only
where `query_details` counts their fields.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from arcbridge.agent.audit.record import Value, path_fields
from arcbridge.agent.kube.command_line import left_out, recorded_command
from arcbridge.agent.kube.request_info import RequestInfo, is_true, query_values, request_info
from arcbridge.agent.kube.status import bad_request
from arcbridge.agent.seats import LONG_RUNNING_SUBRESOURCES, LONG_RUNNING_VERBS

MAX_CACHED_TARGET = 512
"""Characters of a target whose meaning is remembered."""

_ILLEGAL_IN_TARGET = re.compile(r"[^\x21-\x7e]|[\\#]")
_NO_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_LONG_SUBRESOURCES = LONG_RUNNING_SUBRESOURCES - {"log"}  # a log that is not followed is a plain read
_POD_FIELDS = "command", "stdin"
"""Fields of the query of a pod's `exec` and `attach` that have the command, and whether there is input."""
_KUBELET_FIELDS = {"exec": ("command", "input"), "attach": ("command", "input"), "run": ("cmd", "input")}
"""The same by the first segment of the kubelet's paths: https://git.k8s.io/kubernetes/pkg/kubelet/server."""


@dataclass(frozen=True, slots=True)
class RequestTarget:
    """What a target asks for. Made once for each of those that recur."""

    info: RequestInfo
    path: tuple[str, str, str, str, str, str, str]
    """Verb, group, resource, subresource, namespace, name and class of the path, as a record has them."""
    text: str
    """The same behind the method, as a record's line has them."""
    begins: bool
    """Whether the record `begun` stands before the request's first byte."""
    detailed: bool
    """Whether `query_details` finds something."""
    takes_seat: bool
    """Whether the API server counts the request, until it is answered, among those that it works on (`seats`)."""


def request_target(method: str, target: str, upgrade: bool) -> RequestTarget:
    """Return what a request asks for. Raises RequestRefusal for a target that is not passed on."""
    return _cached(method, target, upgrade) if len(target) <= MAX_CACHED_TARGET else _read(method, target, upgrade)


def _read(method: str, target: str, upgrade: bool) -> RequestTarget:
    check_target(target)
    info = request_info(method, target, upgrade=upgrade)
    path = (info.verb, info.group, info.resource, info.subresource, info.namespace, info.name, info.path_class)
    detailed = info.subresource in _LONG_SUBRESOURCES or info.verb in ("deletecollection", "proxy")
    detailed = detailed or info.cut or info.altered or info.path_class == "other"
    seat = info.verb not in LONG_RUNNING_VERBS and info.subresource not in LONG_RUNNING_SUBRESOURCES
    return RequestTarget(info, path, path_fields(method, *path), _begins(method, target, info, upgrade), detailed, seat)


_cached = lru_cache(maxsize=1024)(_read)


def check_target(target: str) -> None:
    """Refuse every target that is not a plain origin-form path (RFC 9112 §3.2.1), byte-identical from here on."""
    if not target.startswith("/"):
        raise bad_request("the request target must be a path")
    if _ILLEGAL_IN_TARGET.search(target):
        raise bad_request("the request target contains a character that must be escaped")
    escaped = target.partition("?")[0]
    if _NO_ESCAPE.search(escaped):
        raise bad_request("the request path contains a '%' without two hexadecimal digits behind it")
    path = unquote_to_bytes(escaped)
    if b"\x00" in path or b"\\" in path:
        raise bad_request("the request path contains an escaped NUL or backslash")
    # `;` too: some servers cut a segment there and would then see the dots alone.
    if any(segment.partition(b";")[0] in (b".", b"..") for segment in path.split(b"/")):
        raise bad_request("the request path contains '.' or '..' segments")


def _begins(method: str, target: str, info: RequestInfo, upgrade: bool) -> bool:
    """Return whether a request lasts or may change something: a kill of the agent must not take its only record."""
    if upgrade or method not in _READS or info.verb in LONG_RUNNING_VERBS or info.subresource in _LONG_SUBRESOURCES:
        return True
    return info.subresource == "log" and is_true(target.partition("?")[2], "follow")


def query_details(info: RequestInfo, target: str, *, commands: bool) -> dict[str, Value] | None:
    """Return what a target asks for beyond the fields of `info`, and what of the target is in no field; None where that
    is nothing.

    Ports are there only where the client names them in its query: of streams behind a 101 see `port_forward`.
    """
    query = target.partition("?")[2]
    found: dict[str, Value] = {}
    more: dict[str, str] = {}
    fields = _POD_FIELDS if info.subresource in ("exec", "attach") else None
    if info.proxy_path:
        found["proxy_path"] = info.proxy_path
        fields = _KUBELET_FIELDS.get(info.proxy_path.split("/", 2)[1].lower())
    if fields is not None:
        _add_command(found, query, fields, commands=commands)
    elif info.subresource == "portforward":
        ports = query_values(query, "ports")
        if ports:
            found["ports"] = ports
    if query and (info.proxy_path or info.verb == "deletecollection"):
        more["query"] = f"{query.count('&') + 1} fields"
    if info.cut or info.altered or info.path_class == "other":
        more["path"] = "cut" if info.cut else "not as it was sent" if info.altered else "its class only"
    if not more:
        return found or None
    missing, hashes = found.get("more"), found.get("sha256")
    found["more"] = {**(missing if isinstance(missing, dict) else {}), **more}
    if commands or fields is None:  # else the hash of a short command would let it be guessed
        digest = hashlib.sha256(target.encode()).hexdigest()
        found["sha256"] = {**(hashes if isinstance(hashes, dict) else {}), "target": digest}
    return found


def _add_command(found: dict[str, Value], query: str, fields: tuple[str, str], *, commands: bool) -> None:
    """Add what a query says of a command, in the fields of that name that are read where it goes, and in no others."""
    command_field, stdin_field = fields
    for container in query_values(query, "container")[:1]:
        found["container"] = container
    command = query_values(query, command_field)
    if command:
        found |= recorded_command(command) if commands else left_out(command)
    for key, name in (("stdin", stdin_field), ("tty", "tty")):
        if is_true(query, name):
            found[key] = True
