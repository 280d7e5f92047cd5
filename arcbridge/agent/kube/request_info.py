"""Reads what a request asks for, as the API server itself will read it: verb, resource, namespace, name, subresource.

Source: k8s.io/apiserver `RequestInfoFactory` (the rules, not the code); for queries Go's `url.ParseQuery`, and
`Convert_Slice_string_To_bool` of k8s.io/apimachinery's `runtime` package. It serves the audit record, and says where an
upgrade is in order. It decides no access: the API server does. Invariant: the work is bounded by the length of the
target, however many fields its query has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote, unquote_plus, unquote_to_bytes

from arcbridge.agent.audit.record import NAME_LIMIT, size_of

_VERBS = {"POST": "create", "GET": "get", "HEAD": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_NAMESPACE_SUBRESOURCES = ("status", "finalize")
# Answers of these are in the log under their own name; any other path is `other`, so that the classes are few.
_PATH_CLASSES = ("api", "apis", "healthz", "livez", "readyz", "metrics", "openapi", "version", ".well-known", "logs")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")

OPENED = frozenset({"exec", "attach", "portforward"})
"""Subresources of which a GET with an upgrade is a `create`: they answer none without."""
MAX_SEGMENT = NAME_LIMIT
"""Characters of a group, resource, namespace, name or subresource, as of a name in Kubernetes (RFC 1123 subdomain);
what is longer is cut to them before anything else reads it (docs/threats.md#H20)."""


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """One request. For a non-resource path `resource` is empty and `path_class` names its first segment."""

    verb: str
    group: str = ""
    version: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path_class: str = ""
    proxy_path: str = ""
    """What stands behind `proxy`, and goes to a node, a pod or a service: with a slash before it, unescaped."""
    cut: bool = False
    """Whether a field of the path was longer than MAX_SEGMENT, or takes more bytes than that in a record: it ends with
    `…` there."""
    altered: bool = False
    """Whether another path of a resource may have the same fields but is not the same to all who read it: one with an
    empty or a further segment, an escaped slash, bytes that are not UTF-8, or any escape behind `proxy`."""


def request_info(method: str, target: str, *, upgrade: bool = False) -> RequestInfo:
    """Read `target` (origin-form, raw). With `upgrade` a GET of exec, attach or port-forward counts as `create`, as the
    API server authorises it; any other stays what it is without (docs/threats.md#H46)."""
    path, _, query = target.partition("?")
    parts = [part for part in unquote(path).split("/") if part]
    if len(parts) < 3 or parts[0] not in ("api", "apis") or (parts[0] == "apis" and len(parts) < 4):
        first = parts[0] if parts else "root"
        return RequestInfo(method.lower(), path_class=first if first in (*_PATH_CLASSES, "root") else "other")
    group = "" if parts[0] == "api" else parts[1]
    version = parts[1] if parts[0] == "api" else parts[2]
    rest = parts[2:] if parts[0] == "api" else parts[3:]

    verb = _VERBS.get(method, method.lower())
    if rest[0] in ("proxy", "watch") and len(rest) > 1:  # the old verbs in the path
        verb, rest = rest[0], rest[1:]
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 1:
        namespace = rest[1]
        if len(rest) > 2 and rest[2] not in _NAMESPACE_SUBRESOURCES:
            rest = rest[2:]
    resource = rest[0]
    name = rest[1] if len(rest) > 1 else ""
    subresource = rest[2] if len(rest) > 2 else ""

    if not name and verb in ("get", "delete"):
        if verb == "delete":
            verb = "deletecollection"
        elif is_true(query, "watch"):
            verb = "watch"
        else:
            verb = "list"
    if upgrade and verb == "get" and subresource in OPENED:
        verb = "create"
    proxied = rest[2:] if verb == "proxy" else rest[3:] if subresource == "proxy" else []
    behind = "".join([f"/{segment}" for segment in proxied])
    altered = _is_altered(path, parts, len(proxied)) or len(rest) > 3 + len(proxied)
    long = max(map(size_of, (group, version, resource, subresource, namespace, name))) > MAX_SEGMENT
    if long:
        group, version, resource = cut(group), cut(version), cut(resource)
        subresource, namespace, name = cut(subresource), cut(namespace), cut(name)
    return RequestInfo(
        verb, group, version, resource, subresource, namespace, name, proxy_path=behind, cut=long, altered=altered
    )


def _is_altered(path: str, parts: list[str], proxied: int) -> bool:
    """Return whether a raw path has other segments than `parts`, or an escape in the last `proxied` of them."""
    raw = path.split("/")[1:]
    return [unquote_to_bytes(one) for one in raw] != [part.encode() for part in parts] or any(
        "%" in one for one in raw[len(raw) - proxied :]
    )


def cut(segment: str) -> str:
    """Return a name as it is recorded: MAX_SEGMENT characters at most, with `…` at the end where it had more."""
    return segment if len(segment) <= MAX_SEGMENT else segment[: MAX_SEGMENT - 1] + "…"


def query_values(query: str, name: str) -> list[str]:
    """Return the values of a field, in order; fields with a semicolon or a malformed escape are left out.

    Bytes that are not UTF-8 are read with `surrogateescape`, so that a hash can be over what came.
    """
    values = []
    for found in _field_pattern(name).finditer(query):
        key, value = found[1], found[2] or ""
        if ";" in found[0] or ("%" in found[0] and _BAD_ESCAPE.search(found[0])):
            continue
        if "%" in key and unquote_plus(key) != name:
            continue
        values.append(unquote_to_bytes(value.replace("+", " ")).decode("utf-8", "surrogateescape"))
    return values


def is_true(query: str, name: str) -> bool:
    """Return what the API server makes of a field that is true or false: its first value counts, and each but `0` and
    `false`, in capitals or not, is true."""
    values = query_values(query, name)
    return bool(values) and values[0] != "0" and values[0].casefold() != "false"


@lru_cache
def _field_pattern(name: str) -> re.Pattern[str]:
    """Return what finds the fields of a name, and those whose names are escaped, in a query."""
    return re.compile(rf"(?:^|&)({name}|[^&=]*%[^&=]*)(?:=([^&]*))?(?=&|\Z)")
