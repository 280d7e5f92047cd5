"""The heads that leave."""

from __future__ import annotations

import dataclasses

import pytest

from arcbridge.agent.kube.plan import Plan
from arcbridge.agent.kube.request_facts import read_facts
from arcbridge.agent.kube.request_target import request_target
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upgrade import UpgradeRequest

from .desk import Desk, plain

WANTED = request_target("GET", "/x", False)


def made(method: str = "GET", *headers: tuple[bytes, bytes], **changes: object) -> Plan:
    facts = read_facts(method, "/x", [(b"Host", b"k"), *headers])
    plan = Plan(facts, WANTED, True, b"Impersonate-User: alice\r\n")
    return dataclasses.replace(plan, **changes)


START = "HTTP/1.1\r\nHost: h:1\r\nAudit-ID: r-1\r\nImpersonate-User: alice\r\n"


@pytest.mark.parametrize(
    ("plan", "head"),
    [
        (made(), f"GET /x {START}\r\n"),
        (made("HEAD"), f"HEAD /x {START}\r\n"),
        (made("DELETE"), f"DELETE /x {START}Connection: close\r\nContent-Length: 0\r\n\r\n"),
        (made("OPTIONS"), f"OPTIONS /x {START}Connection: close\r\n\r\n"),
        (
            made("PUT", (b"Content-Length", b"5")),
            f"PUT /x {START}Connection: close\r\nContent-Length: 5\r\n\r\n",
        ),
        (
            made("GET", (b"Transfer-Encoding", b"chunked")),
            f"GET /x {START}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        (
            made(upgrade=UpgradeRequest("websocket", (), ())),
            f"GET /x {START}Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        ),
        (
            made("POST", upgrade=UpgradeRequest("SPDY/3.1", (), ())),
            f"POST /x {START}Content-Length: 0\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n",
        ),
    ],
)
def test_the_head_that_leaves(plan: Plan, head: str) -> None:
    assert plan.request_head("h:1", "r-1") == head.encode()


@pytest.mark.parametrize(
    "lines", [b"", b"X: impersonate-user: root\r\n", b"Impersonate-User: a\r\nimpersonate-user: b\r\n"]
)
def test_a_head_without_exactly_one_identity_does_not_leave(lines: bytes) -> None:
    with pytest.raises(RequestRefusal, match="identity"):
        made(lines=lines).request_head("h:1", "r-1")


@pytest.mark.parametrize("session", ["a\r\nImpersonate-User: root", "a b", "ü"])
async def test_a_session_whose_name_could_not_stand_in_a_header_sends_nothing(desk: Desk, session: str) -> None:
    desk.stream.caller = dataclasses.replace(desk.caller, session=session)
    with pytest.raises(RequestRefusal, match="malformed"):
        desk.head(plain())
