"""Rules and requests as the API server has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arcbridge.agent.elevation.objects import AccessRequest, AccessRule, read_request, read_rule
from arcbridge.units import rfc3339

CREATED = 1_800_000_000.0


def rule_document(
    name: str = "incident",
    *,
    groups: Sequence[str] = ("operators",),
    seconds: int = 3600,
    asking: Sequence[str] = ("dev",),
    users: Sequence[str] = (),
    approvers: Sequence[str] = ("leads",),
    count: int = 1,
    created: float = CREATED - 60,
) -> dict[str, Any]:
    spec: dict[str, Any] = {"groups": list(groups), "maxSeconds": seconds}
    spec["requesters"] = {"groups": list(asking), "users": list(users)}
    if approvers:
        spec["approvers"] = {"groups": list(approvers), "count": count}
    return {"metadata": {"name": name, "creationTimestamp": rfc3339(created)}, "spec": spec}


def request_document(
    name: str = "alice-1",
    *,
    user: str = "alice",
    rule: str = "incident",
    groups: Sequence[str] = ("operators",),
    seconds: int = 1800,
    reason: str = "INC-42 it burns",
    approved: Sequence[tuple[str, str]] = (("bob", "leads"),),
    begins: float = 0.0,
    created: float = CREATED,
    **status: Any,
) -> dict[str, Any]:
    found: dict[str, Any] = {"approvals": [{"user": by, "group": group} for by, group in approved], **status}
    if begins:
        found |= {"from": rfc3339(begins), "until": rfc3339(begins + seconds)}
    spec = {"user": user, "rule": rule, "groups": list(groups), "seconds": seconds, "reason": reason}
    metadata = {"name": name, "uid": f"uid-{name}", "resourceVersion": "7", "creationTimestamp": rfc3339(created)}
    return {"metadata": metadata, "spec": spec, "status": found}


def rule(name: str = "incident", **fields: Any) -> AccessRule:
    return read_rule(rule_document(name, **fields))


def request(name: str = "alice-1", **fields: Any) -> AccessRequest:
    return read_request(request_document(name, **fields))
