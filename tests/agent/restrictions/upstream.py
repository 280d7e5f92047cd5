"""`NewRequestInfo` of k8s.io/apiserver v0.36.3 (pkg/endpoints/request/requestinfo.go), line by line in Python.

It is an oracle: nothing of the agent's own reading is used. `r.URL.Path` is the path without its escapes, as Go has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote


@dataclass
class Upstream:
    """What the API server makes of a request."""

    resource_request: bool = False
    verb: str = ""
    group: str = ""
    namespace: str = ""
    resource: str = ""
    subresource: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)

    @property
    def writes(self) -> bool:
        """Whether the request may change something, or opens a way into a pod, a node or a service."""
        if not self.resource_request:
            return self.verb not in ("get", "head")
        tunnel = self.verb == "proxy" or not {"exec", "attach", "portforward", "proxy"}.isdisjoint(self.parts[2:3])
        return tunnel or self.verb not in ("get", "list", "watch")


def read(method: str, target: str) -> Upstream | None:
    """Return what the API server reads; None for a path at which it answers with an error."""
    path, _, query = target.partition("?")
    parts = [] if not unquote(path).strip("/") else unquote(path).strip("/").split("/")
    info = Upstream(verb=method.lower())
    if len(parts) < 3 or parts[0] not in ("api", "apis"):
        return info
    prefix, *parts = parts
    if prefix == "apis":
        if len(parts) < 3:
            return info
        info.group, *parts = parts
    info.resource_request = True
    _, *parts = parts
    if parts[0] in ("proxy", "watch"):
        if len(parts) < 2:
            return None
        info.verb, *parts = parts
    else:
        verbs = {"POST": "create", "GET": "get", "HEAD": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
        info.verb = verbs.get(method, "")
    if parts[0] == "namespaces" and len(parts) > 1:
        info.namespace = parts[1]
        if len(parts) > 2 and parts[2] not in ("status", "finalize"):
            parts = parts[2:]
    info.parts = parts
    if len(parts) >= 3 and info.verb != "proxy":
        info.subresource = parts[2]
    info.name = parts[1] if len(parts) >= 2 else ""
    info.resource = parts[0]
    if not info.name and info.verb == "get":
        # Go's `url.ParseQuery` drops a field with a semicolon or a malformed escape.
        kept = [one for one in query.split("&") if ";" not in one and not re.search(r"%(?![0-9A-Fa-f]{2})", one)]
        values = parse_qs("&".join(kept), keep_blank_values=True).get("watch", [])
        info.verb = "watch" if values and values[0].lower() not in ("false", "0") else "list"
    if not info.name and info.verb == "delete":
        info.verb = "deletecollection"
    return info
