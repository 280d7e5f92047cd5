"""Reads AccessRules and AccessRequests as the API server has them.

It judges nothing (`grants`). A field that is missing or of another type is a ValueError: schema and admission policies
of the chart let none pass, so an object without them was written past both. Invariant: a text that goes into headers
and records is clean and bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from arcbridge.observe.untrusted_text import clean

API_GROUP: Final = "access.arcbridge.io"
API_VERSION: Final = "v1alpha1"
API: Final = f"/apis/{API_GROUP}/{API_VERSION}"
RULES, REQUESTS = "accessrules", "accessrequests"
MOST_GROUPS: Final = 16
"""Groups of one request, and approvals of one, as the schema has it."""
_REASON: Final = 512
"""Bytes of a reason in headers and records; the schema allows 256 characters."""

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AccessRule:
    """Who may ask for which groups, for how long, and who approves."""

    name: str
    created: float
    """Unix seconds, by the API server's clock."""
    groups: frozenset[str]
    """What may be asked for."""
    most_seconds: int
    users: frozenset[str]
    """Users who may ask."""
    user_groups: frozenset[str]
    """Groups whose users may ask."""
    approver_groups: frozenset[str]
    approvals: int
    """How many approvals are needed; 0: none."""


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """What one user asks for, and what has become of it."""

    name: str
    uid: str
    version: str
    """The resourceVersion."""
    created: float
    """Unix seconds, by the API server's clock; so are the others."""
    user: str
    rule: str
    groups: tuple[str, ...]
    seconds: int
    reason: str
    approvals: tuple[tuple[str, str], ...]
    """User and group of each approval, each user once."""
    denied: bool
    withdrawn: bool
    begins: float
    """When an agent has begun to lend the groups; 0: not yet."""
    until: float

    @property
    def text(self) -> str:
        """What records and the extra of requests have of it; the reason, which may have blanks, is last."""
        by = ",".join(user for user, _ in self.approvals)
        words = [self.name, f"rule={self.rule}", f"groups={','.join(self.groups)}", *[f"approved-by={by}"] * bool(by)]
        return f"{clean(' '.join(words))} reason={self.reason}"


def is_deleted(document: Document) -> bool:
    """Return whether an object is being deleted: finalizers, which its writer may choose, can keep it in the list."""
    return "deletionTimestamp" in _part(document, "metadata")


def read_rule(document: Document) -> AccessRule:
    """Return the rule of a document. Raises ValueError, as for one that is being deleted."""
    metadata, spec = _present(document), _part(document, "spec")
    asking, approving = _part(spec, "requesters"), _optional(spec, "approvers")
    return AccessRule(
        _text(metadata, "name"),
        _time(metadata, "creationTimestamp"),
        frozenset(_texts(spec, "groups")),
        _number(spec, "maxSeconds"),
        frozenset(_texts(asking, "users")),
        frozenset(_texts(asking, "groups")),
        frozenset(_texts(approving, "groups")),
        _number(approving, "count") if approving else 0,
    )


def read_request(document: Document) -> AccessRequest:
    """Return the request of a document. Raises ValueError, as for one that is being deleted."""
    metadata, spec, status = _present(document), _part(document, "spec"), _optional(document, "status")
    seconds = _number(spec, "seconds")
    begins = _time(status, "from") if "from" in status else 0.0
    until = _time(status, "until") if "until" in status else 0.0
    approvals: dict[str, str] = {}
    for one in _list(status, "approvals"):
        if isinstance(one, dict):
            approvals.setdefault(_text(one, "user"), _text(one, "group"))
    return AccessRequest(
        name=_text(metadata, "name"),
        uid=_text(metadata, "uid"),
        version=_text(metadata, "resourceVersion"),
        created=_time(metadata, "creationTimestamp"),
        user=_text(spec, "user"),
        rule=_text(spec, "rule"),
        groups=tuple(_texts(spec, "groups")[:MOST_GROUPS]),
        seconds=seconds,
        reason=" ".join(clean(_text(spec, "reason"), _REASON).split()),
        approvals=tuple(list(approvals.items())[:MOST_GROUPS]),
        denied="denied" in status,
        withdrawn="withdrawn" in status,
        begins=begins,
        until=min(until, begins + seconds),
    )


def _present(document: Document) -> Document:
    if is_deleted(document):
        raise ValueError("it is being deleted")
    return _part(document, "metadata")


def _part(document: Document, key: str) -> Document:
    found = document.get(key)
    if not isinstance(found, dict):
        raise ValueError(f"{key} is missing")
    return found


def _optional(document: Document, key: str) -> Document:
    return _part(document, key) if key in document else {}


def _text(document: Document, key: str) -> str:
    found = document.get(key)
    if not isinstance(found, str) or not found:
        raise ValueError(f"{key} is no text")
    return found


def _number(document: Document, key: str) -> int:
    found = document.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{key} is no number")
    return found


def _list(document: Document, key: str) -> list[Any]:
    found = document.get(key, [])
    if not isinstance(found, list):
        raise ValueError(f"{key} is no list")
    return found


def _texts(document: Document, key: str) -> list[str]:
    found = _list(document, key)
    if not all(isinstance(one, str) and one for one in found):
        raise ValueError(f"{key} is no list of texts")
    return found


def _time(document: Document, key: str) -> float:
    text = _text(document, key)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{key} is no time") from None
    if found.tzinfo is None:
        raise ValueError(f"{key} has no time zone")
    return found.timestamp()
