"""Finds in the body of a write to a pod what an audit must show: privileges, and containers that are added to it.

It looks at bodies of a bounded length and number of values, in JSON or in Kubernetes' protobuf, on their way to the API
server; others are recorded as `unparsed`, and so is CBOR. It changes nothing and decides nothing. Invariants: a body is
held once, up to MAX_BODY, and on its user's account; reading it takes memory and time in proportion to its bytes,
whatever they are, and no more than MAX_VALUES or MAX_FIELDS are worth; its last byte leaves after the record of what it
asks for is written.

What is privileged: what the Pod Security Standard "Baseline" refuses outright (privileged containers, the host's
namespaces and paths, added capabilities, HostProcess).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from arcbridge import protobuf
from arcbridge.agent.audit.record import FIELD_LIMIT, LIST_LIMIT, MAX_LISTED, Excerpt, Value, size_of
from arcbridge.agent.kube.command_line import left_out, recorded_command
from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.kube.request_info import RequestInfo, cut
from arcbridge.wire.backlog import Backlog

MAX_BODY = 128 * 1024
"""Bytes of a body that is looked at; a pod's manifest has a few thousand."""
MAX_VALUES = 8192
"""Values of a JSON body that is looked at, where a comma in a text counts, too: ten times what a large pod with its
managed fields has. As many take some 20 ms of the event loop; 40 000 took 200 ms."""
MAX_FIELDS = 4096
"""Fields of a body in protobuf, in which a pod's managed fields are one: each costs twice as much."""
MAX_PATH = 16
"""Segments of a JSON patch's path that are read, from its end; a privilege of a pod lies seven deep."""

_MAGIC = b"k8s\x00"
_JSON_PATCH = "application/json-patch+json"
_SIGNED = re.compile(r"[+-][0-9]+")
"""A segment that the API server's reader of JSON patches takes for an index, and RFC 6902 does not."""
_TOO_MANY: dict[str, Value] = {"unparsed": "too many values"}
_HOST = ("hostNetwork", "hostPID", "hostIPC")


def is_inspected(info: RequestInfo, method: str) -> bool:
    """Return whether the body of a request is looked at: it creates or changes a pod, or adds containers to one."""
    if info.resource != "pods" or info.group:
        return False
    if info.subresource == "":
        return method in ("POST", "PUT", "PATCH")
    return info.subresource == "ephemeralcontainers" and method in ("PUT", "PATCH")


class Inspection:
    """Looks at one body as it passes. `release` must be called at the end of the request."""

    def __init__(
        self,
        facts: RequestFacts,
        found: Callable[[dict[str, Value]], Awaitable[None]],
        held: Backlog,
        *,
        commands: bool,
    ) -> None:
        """`found` is awaited with what the body asks for, where that is something; what is kept of the body counts in
        `held`, its user's."""
        self._found = found
        self._held = held
        self._commands = commands
        self._type = facts.first(b"content-type").partition(";")[0].strip().lower()
        self._unparsed = "encoded" if facts.first(b"content-encoding") not in ("", "identity") else ""
        self._body = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take a part of the body as it passes."""
        if self._unparsed:
            return
        if len(self._body) + len(chunk) > MAX_BODY:
            self._give_up("too long")
        elif self._held.full:
            self._give_up("too many at once")
        else:
            self._held.add(len(chunk))
            self._body += chunk

    async def complete(self) -> None:
        """Judge the body whose last part is about to leave. Raises what `found` raises."""
        details: dict[str, Value] = {"unparsed": self._unparsed}
        if not self._unparsed:
            details = pod_details(bytes(self._body), self._type, commands=self._commands)
        self.release()
        if details:
            await self._found(details)

    def release(self) -> None:
        """Forget the body."""
        self._held.remove(len(self._body))
        self._body = bytearray()

    def _give_up(self, why: str) -> None:
        self._unparsed = why
        self.release()


def pod_details(body: bytes, content_type: str, *, commands: bool) -> dict[str, Value]:
    """Return what a body asks for; empty where that is nothing an audit must show."""
    try:
        if body.startswith(_MAGIC):
            document: Any = _pod_of_protobuf(body)
        else:
            if _values(body, patch=content_type == _JSON_PATCH) > MAX_VALUES:
                return dict(_TOO_MANY)
            # kubectl writes JSON also where the type says YAML (server-side apply).
            document = json.loads(body, object_pairs_hook=_Object)
    except protobuf.TooManyFields:
        return dict(_TOO_MANY)
    except (ValueError, RecursionError):
        return {"unparsed": content_type.rpartition("/")[2] or "malformed"}
    found = _Found(commands)
    patch = content_type == _JSON_PATCH
    for value in _patched(document) if patch else [document]:
        found.look(value)
    details = found.details()
    if patch and (why := _unreadable(document)):
        details["unparsed"] = why
    if found.is_excerpt():  # what was cut and counted has no hash of its own
        hashes = details.get("sha256")
        details["sha256"] = {**(hashes if isinstance(hashes, dict) else {}), "body": hashlib.sha256(body).hexdigest()}
    return details


class _Object(list[tuple[str, Any]]):
    """A JSON object with all its pairs: of a key that stands there twice, Go merges the values, so both count."""

    __slots__ = ()


def _values(body: bytes, *, patch: bool) -> int:
    """Return how many values a body in JSON has at most, without reading it; a path's segments of a `patch` count."""
    return 1 + sum(map(body.count, (b",", b"[", b"{", b"/") if patch else (b",", b"[", b"{")))


def _patched(document: Any) -> Iterator[Any]:
    """Yield the values of a JSON patch (RFC 6902), each in the objects that its path names."""
    for operation in document if isinstance(document, list) else []:
        if not isinstance(operation, _Object):
            continue
        fields = dict(operation)
        path, value = fields.get("path"), fields.get("value")
        if isinstance(path, str):
            for segment in reversed(path.rsplit("/", MAX_PATH)[1:]):
                name = segment.replace("~1", "/").replace("~0", "~")
                value = [value] if name == "-" or name.isdigit() else _Object([(name, value)])
            yield value


def _unreadable(patch: Any) -> str:
    """Return why it is not known what a JSON patch does; empty where it can. It copies what the body does not have,
    or its path has an index that only the API server knows how to read (`-1`, `+2`)."""
    for operation in patch if isinstance(patch, list) else []:
        fields = dict(operation) if isinstance(operation, _Object) else {}
        if fields.get("op") in ("copy", "move"):
            return f"a patch with {fields['op']}"
        path = fields.get("path")
        if isinstance(path, str) and any(map(_SIGNED.fullmatch, path.rsplit("/", MAX_PATH)[1:])):
            return "a patch with an index that has a sign"
    return ""


@dataclass(slots=True)
class _Found:
    commands: bool
    privileges: dict[str, None] = field(default_factory=dict)
    """In the order in which they were found, each once."""
    names: Excerpt = field(default_factory=Excerpt)
    images: Excerpt = field(default_factory=Excerpt)
    command: Excerpt = field(default_factory=Excerpt)
    beside: Excerpt = field(default_factory=Excerpt)
    more: int = 0
    """Privileges that were found beyond those."""

    def look(self, document: Any) -> None:
        """Look through a whole document, whatever its shape: an object, a part of one, a list."""
        waiting: list[tuple[Iterator[Any], str]] = [(iter([document]), "")]
        while waiting:
            values, name = waiting[-1]
            for value in values:
                if isinstance(value, _Object):
                    names = (item for key, item in reversed(value) if key == "name" and isinstance(item, str))
                    own = next(names, None)  # of two the last one counts
                    own = name if own is None else cut(own)
                    for key, item in value:
                        self._pair(key, item, own)
                    waiting.append(((item for _, item in value), own))
                    break
                if isinstance(value, list):
                    waiting.append((iter(value), name))
                    break
            else:
                waiting.pop()

    def _pair(self, key: str, item: Any, name: str) -> None:
        if key in _HOST and item is True:
            self._add(key)
        elif key in ("privileged", "hostProcess") and item is True:
            self._add(f"{key} {name}")
        elif key == "hostPath" and isinstance(item, _Object):
            path = dict(item).get("path", "")
            self._add(f"hostPath {cut(path) if isinstance(path, str) else ''}")
        elif key == "capabilities" and isinstance(item, _Object):
            for part, added in item:
                if part == "add" and isinstance(added, list):
                    for one in added:
                        if isinstance(one, str):
                            self._add(f"capability {cut(one)} {name}")
        elif key == "ephemeralContainers" and isinstance(item, list):
            for container in item:
                if isinstance(container, _Object):
                    self._ephemeral(container)

    def _add(self, privilege: str) -> None:
        privilege = privilege.rstrip()
        if len(self.privileges) < MAX_LISTED:
            self.privileges[privilege] = None
        elif privilege not in self.privileges:
            self.more += 1

    def _ephemeral(self, container: _Object) -> None:
        for key, item in container:
            if key in ("command", "args") and isinstance(item, list):
                _extend(self.command, (word for word in item if isinstance(word, str)))
            elif isinstance(item, str):
                wanted = {"name": self.names, "image": self.images, "targetContainerName": self.beside}
                if key in wanted:
                    _extend(wanted[key], [cut(item)])

    def details(self) -> dict[str, Value]:
        privileges = Excerpt(self.privileges)
        privileges.more = self.more
        details: dict[str, Value] = {}
        for key, values in (
            ("privileged", privileges),
            ("ephemeral_containers", self.names),
            ("images", self.images),
            ("target_containers", self.beside),
        ):
            if values:
                details[key] = values
        if self.command:
            details |= recorded_command(self.command) if self.commands else left_out(self.command)
        return details

    def is_excerpt(self) -> bool:
        """Return whether something was cut, or counted and not kept."""
        lists = (self.names, self.images, self.command, self.beside)
        if self.more or any(one.more for one in lists):
            return True
        values = (*self.privileges, *self.names, *self.images, *self.beside)
        sizes = [size_of(value) for value in values]
        return any("…" in value for value in values) or max(sizes, default=0) > FIELD_LIMIT or sum(sizes) > LIST_LIMIT


def _extend(excerpt: Excerpt, values: Iterable[str]) -> None:
    """Keep of further values as many as a record has, and count the others."""
    for value in values:
        if len(excerpt) < MAX_LISTED:
            excerpt.append(value)
        else:
            excerpt.more += 1


# -- Kubernetes' protobuf ---------------------------------------------------------------------------------------------
# Source: k8s.io/api/core/v1/generated.proto and k8s.io/apimachinery/pkg/runtime/generated.proto (the numbers of fields;
# they never change). A table says of each field that is wanted its name in JSON and its kind; `""` as the name means
# that the fields of the message belong to the one around it, as in JSON.

_Table = dict[int, tuple[str, Any]]
_SECURITY: _Table = {
    1: ("capabilities", {1: ("add", [str])}),
    2: ("privileged", bool),
    10: ("windowsOptions", {4: ("hostProcess", bool)}),
}
_CONTAINER: _Table = {
    1: ("name", str), 2: ("image", str), 3: ("command", [str]), 4: ("args", [str]), 15: ("securityContext", _SECURITY),
}  # fmt: skip
_POD: _Table = {
    2: (
        "spec",
        {
            1: ("volumes", [{1: ("name", str), 2: ("", {1: ("hostPath", {1: ("path", str)})})}]),
            2: ("containers", [_CONTAINER]),
            11: ("hostNetwork", bool),
            12: ("hostPID", bool),
            13: ("hostIPC", bool),
            14: ("securityContext", {8: ("windowsOptions", {4: ("hostProcess", bool)})}),
            20: ("initContainers", [_CONTAINER]),
            34: ("ephemeralContainers", [{1: ("", _CONTAINER), 2: ("targetContainerName", str)}]),
        },
    )
}


def _pod_of_protobuf(body: bytes) -> _Object:
    """Return the wanted fields of a Pod as JSON has them. Raises ValueError."""
    raw, left = b"", iter(range(MAX_FIELDS))
    for number, value in protobuf.fields(body[len(_MAGIC) :], left):
        if number == 2 and isinstance(value, bytes):
            raw = value
        elif number == 3 and value:
            raise ValueError("an encoded message")
    return _object(raw, _POD, left)


def _object(data: bytes, table: _Table, left: Iterator[int]) -> _Object:
    pairs = _Object()
    lists: dict[str, list[Any]] = {}
    for number, value in protobuf.fields(data, left):
        name, kind = table.get(number, ("", None))
        if kind is None:
            continue
        inner = kind[0] if isinstance(kind, list) else kind
        if inner is bool:
            if not isinstance(value, int):
                raise ValueError("a field of another kind")
            item: Any = bool(value)
        elif not isinstance(value, bytes):
            raise ValueError("a field of another kind")
        else:
            item = value.decode() if inner is str else _object(value, inner, left)
        if not name:
            pairs += item
        elif isinstance(kind, list):
            lists.setdefault(name, []).append(item)
        else:
            pairs.append((name, item))
    pairs += lists.items()
    return pairs
