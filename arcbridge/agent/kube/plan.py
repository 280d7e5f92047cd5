"""Holds a request that may leave, and writes its head as it is sent to the API server.

It decides nothing. Invariant: a head leaves with exactly one Impersonate-User where the agent authenticates itself, and
with a request id that can stand in a header, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from arcbridge.agent.kube.caller import SAFE_ID
from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.kube.request_target import RequestTarget
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upgrade import UpgradeRequest

_REQUIRES_LENGTH = frozenset({"POST", "PUT", "PATCH", "DELETE"})


@dataclass(slots=True)
class Plan:
    """A request that may leave. It is not changed; it is not frozen either, because one is made for each request."""

    facts: RequestFacts
    wanted: RequestTarget
    own: bool
    """Whether the agent authenticates itself and impersonates; else the caller's token does (token mode)."""
    lines: bytes
    """The outgoing header lines but Host, Audit-ID and those that frame the message."""
    upgrade: UpgradeRequest | None = None
    repeatable: bool = field(init=False)
    """Whether the request may use an idle connection, and be sent again where that one turns out dead."""

    def __post_init__(self) -> None:
        facts = self.facts
        self.repeatable = facts.method in ("GET", "HEAD") and not facts.has_body and self.upgrade is None

    def request_head(self, authority: str, request_id: str) -> bytes:
        """Return the head as it is sent to the API server at `authority`. Raises RequestRefusal if it is not as
        meant."""
        facts = self.facts
        method = facts.method
        if self.repeatable:
            framing = "\r\n"
        elif self.upgrade is not None:
            empty = "Content-Length: 0\r\n" if method == "POST" else ""
            framing = f"{empty}Connection: Upgrade\r\nUpgrade: {self.upgrade.protocol}\r\n\r\n"
        else:
            length = facts.length if facts.has_body else "0" * (method in _REQUIRES_LENGTH)
            body = f"Content-Length: {length}\r\n" if length else "Transfer-Encoding: chunked\r\n" * facts.has_body
            framing = f"Connection: close\r\n{body}\r\n"
        start = f"{method} {facts.target} HTTP/1.1\r\nHost: {authority}\r\nAudit-ID: {request_id}\r\n"
        head = start.encode() + self.lines + framing.encode()
        if not SAFE_ID.fullmatch(request_id):
            raise RequestRefusal(500, "a header of the outgoing request is malformed; nothing was sent")
        if self.own and head.lower().count(b"\r\nimpersonate-user:") != 1:  # the last look before the request leaves
            raise RequestRefusal(500, "the outgoing request does not carry the caller's identity; nothing was sent")
        return head
