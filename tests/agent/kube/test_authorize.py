"""One decision for both entrances: what a caller and the facts of a request give."""

from __future__ import annotations

import dataclasses

import pytest

from arcbridge.agent.kube.authorize import ReviewNeeded
from arcbridge.agent.kube.caller import SubjectLines, token_digest
from arcbridge.agent.kube.fast_path_parser import KnownLines, plain_head
from arcbridge.agent.kube.impersonation import Subject, requested_subject
from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.kube.review import Approval
from arcbridge.agent.kube.status import RequestRefusal

from .bench import ALICE
from .desk import AS_BOB, Desk, parsed, plain

LINES = (
    b"Accept: a\r\nAuthorization: Bearer agent-own-token\r\nImpersonate-User: alice\r\nImpersonate-Uid: u-1\r\n"
    b"Impersonate-Group: dev\r\nImpersonate-Group: ops\r\n"
)


async def test_both_ways_to_read_a_head_give_the_same_plan(desk: Desk) -> None:
    for facts in (plain(), plain(), parsed((b"Accept", b"a"), (b"X-Remote-User", b"root"))):
        assert desk.lines(facts) == LINES
        plan = desk.plan(facts)
        assert (plan.wanted.info.verb, plan.own, plan.upgrade, plan.repeatable) == ("list", True, None, True)
    numbers = [record.request.removeprefix(f"{desk.caller.request_prefix}-1-") for record in desk.audit.kept]
    assert numbers == ["1", "2", "3", "4", "5", "6"]
    assert [(r.verb, r.resource) for r in desk.audit.kept] == [("list", "pods")] * 6


@pytest.mark.parametrize(("impersonable", "sent"), [(None, ["dev", "ops"]), ({"ops", "x"}, ["ops"]), (set(), [])])
async def test_groups_that_the_agent_may_not_impersonate_are_left_out(
    desk: Desk, impersonable: set[str] | None, sent: list[str]
) -> None:
    """Both entrances: the API server would refuse the whole request for one group that no rule names."""
    desk.context.api.impersonable = None if impersonable is None else frozenset(impersonable)
    for head in (plain(), parsed()):
        lines = desk.lines(head).decode().splitlines()
        assert [line.split(": ")[1] for line in lines if line.startswith("Impersonate-Group")] == sent
        assert sum(line == "Impersonate-User: alice" for line in lines) == 1


async def test_a_target_is_checked_on_either_entrance(desk: Desk) -> None:
    for _ in range(2):
        for target in ("/api/%2e%2e/x", "/api/../" + "x" * 1000):
            with pytest.raises(RequestRefusal):
                desk.plan(plain(target=target))
            with pytest.raises(RequestRefusal):
                desk.plan(parsed(target=target))


async def test_in_token_mode_the_callers_token_goes_on_and_no_identity_is_added(desk: Desk) -> None:
    desk.caller.token_mode = True
    with pytest.raises(RequestRefusal) as caught:
        desk.plan(plain())
    assert caught.value.status_code == 401
    desk.caller.tokens.add(token_digest(b"own"))
    facts = parsed((b"Authorization", b"Bearer own"))
    assert not desk.plan(facts).own
    assert desk.lines(facts) == b"Authorization: Bearer own\r\n"


async def test_no_plan_for_another_user_without_the_approval_of_exactly_that(desk: Desk) -> None:
    other = dataclasses.replace(ALICE)
    bob = Subject("bob")
    for approval in (
        None,
        Approval(other, bob),
        Approval(ALICE, Subject("root")),
        Approval(ALICE, Subject("bob", groups=("system:masters",))),
    ):
        with pytest.raises(ReviewNeeded) as caught:
            desk.plan(AS_BOB, approval)
        assert (caught.value.identity, caught.value.subject) == (ALICE, bob)
    lines = desk.lines(AS_BOB, Approval(ALICE, bob))
    assert b"Impersonate-User: bob\r\n" in lines
    assert b"arcbridge.io%2foriginal-user: alice" in lines.lower()


async def test_s22_the_actor_goes_to_the_api_server_with_each_request_and_is_the_agents_to_say(desk: Desk) -> None:
    """As the user, and where the user is another by `--as`."""
    acted = dataclasses.replace(ALICE, actor="bot")
    desk.caller.adopt(acted, "")
    facts, key = (
        parsed((b"Impersonate-Extra-Arcbridge.io%2FActor", b"forged")),
        b"impersonate-extra-arcbridge.io%2factor",
    )
    plain = desk.lines(parsed()).lower()
    assert (plain.count(key), b"%2factor: bot\r\n" in plain) == (1, True)
    with pytest.raises(RequestRefusal):
        requested_subject(facts.impersonation)
    other = desk.lines(AS_BOB, Approval(acted, Subject("bob"))).lower()
    assert (other.count(key), b"%2factor: bot\r\n" in other) == (1, True)
    desk.caller.adopt(ALICE, "")
    assert key not in desk.lines(parsed()).lower()


HEADERS_OF_ORIGIN = [
    "Audit-ID", "aUDIT-id", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded", "Forwarded",
    "X-Real-Ip", "X-Remote-User", "X-Remote-Group", "X-Remote-Uid", "X-Remote-Extra-Scopes", "X-Client-Ip",
    "X-Cluster-Client-Ip", "True-Client-Ip", "Cf-Connecting-Ip", "Fastly-Client-Ip", "X-Original-User",
    "X-Original-Forwarded-For", "X-Envoy-External-Address", "Via",
]  # fmt: skip


@pytest.mark.parametrize("name", HEADERS_OF_ORIGIN)
async def test_a19_no_header_that_says_where_a_request_comes_from_goes_on(desk: Desk, name: str) -> None:
    """At both entrances, and in both modes."""
    data = f"GET /api HTTP/1.1\r\nHost: k\r\nAccept: a\r\n{name}: forged\r\n\r\n".encode()
    head = plain_head(data, KnownLines())
    assert head is not None, "it came to the fast entrance"
    general = parsed((b"Accept", b"a"), (name.encode(), b"forged"))
    for outgoing in (desk.head(head), desk.head(general)):
        assert b"forged" not in outgoing
        assert outgoing.lower().count(b"audit-id:") == 1
    desk.caller.token_mode = True
    desk.caller.tokens.add(token_digest(b"own"))
    general = parsed((b"Authorization", b"Bearer own"), (name.encode(), b"forged"))
    assert b"forged" not in desk.head(general)


IDENTITY = "Authorization: Bearer agent-own-token\r\nImpersonate-User: alice\r\nImpersonate-Uid: u-1\r\n"
GROUPS = "Impersonate-Group: dev\r\nImpersonate-Group: ops\r\n"
EXEC = "/api/v1/namespaces/n/pods/p/exec"
WEBSOCKET = (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")
SPDY = (b"Connection", b"Upgrade"), (b"Upgrade", b"SPDY/3.1")


@pytest.mark.parametrize(
    ("facts", "end"),
    [
        (parsed(), ""),
        (parsed(method="HEAD"), ""),
        (parsed(method="DELETE"), "Connection: close\r\nContent-Length: 0\r\n"),
        (parsed(method="OPTIONS"), "Connection: close\r\n"),
        (parsed((b"Content-Length", b"5"), method="PUT"), "Connection: close\r\nContent-Length: 5\r\n"),
        (parsed((b"Transfer-Encoding", b"chunked")), "Connection: close\r\nTransfer-Encoding: chunked\r\n"),
        (parsed(*WEBSOCKET, target=EXEC), "Connection: Upgrade\r\nUpgrade: websocket\r\n"),
        (
            parsed(*SPDY, method="POST", target=EXEC),
            "Content-Length: 0\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n",
        ),
    ],
)
async def test_the_head_that_leaves(desk: Desk, facts: RequestFacts, end: str) -> None:
    start = f"{facts.method} {facts.target} HTTP/1.1\r\nHost: {desk.context.api.authority}\r\n"
    audit_id = f"Audit-ID: {desk.caller.request_prefix}-1-1\r\n"
    assert desk.head(facts).decode() == f"{start}{audit_id}{IDENTITY}{GROUPS}{end}\r\n"


@pytest.mark.parametrize(
    "lines", [b"", b"X: impersonate-user: root\r\n", b"Impersonate-User: a\r\nimpersonate-user: b\r\n"]
)
async def test_a_head_without_exactly_one_identity_does_not_leave(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, lines: bytes
) -> None:
    monkeypatch.setattr(SubjectLines, "of", lambda *_: lines)
    with pytest.raises(RequestRefusal, match="identity"):
        desk.plan(plain())


@pytest.mark.parametrize("session", ["a\r\nImpersonate-User: root", "a b", "ü"])
async def test_a_session_whose_name_could_not_stand_in_a_header_sends_nothing(desk: Desk, session: str) -> None:
    desk.stream.caller = dataclasses.replace(desk.caller, session=session)
    with pytest.raises(RequestRefusal, match="malformed"):
        desk.plan(plain())
