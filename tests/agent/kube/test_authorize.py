"""One decision for both entrances: what a caller and the facts of a request give."""

from __future__ import annotations

import dataclasses

import pytest

from arcbridge.agent.kube.authorize import ReviewNeeded
from arcbridge.agent.kube.caller import token_digest
from arcbridge.agent.kube.fast_path_parser import KnownLines, plain_head
from arcbridge.agent.kube.impersonation import Subject
from arcbridge.agent.kube.review import Approval
from arcbridge.agent.kube.status import RequestRefusal

from .bench import ALICE
from .desk import AS_BOB, Desk, parsed, plain

LINES = (
    b"Accept: a\r\nAuthorization: Bearer agent-own-token\r\nImpersonate-User: alice\r\nImpersonate-Uid: u-1\r\n"
    b"Impersonate-Group: dev\r\nImpersonate-Group: ops\r\n"
)


async def test_both_ways_to_read_a_head_give_the_same_plan(desk: Desk) -> None:
    first, again = desk.plan(plain()), desk.plan(plain())
    general = desk.plan(parsed((b"Accept", b"a"), (b"X-Remote-User", b"root")))
    assert first.lines == again.lines == general.lines == LINES
    assert first == again
    assert (general.wanted, general.own, general.upgrade) == (first.wanted, True, None)
    assert [record.request for record in desk.audit.kept] == [desk.caller.request_id(1, n) for n in (1, 2, 3)]
    assert [(r.verb, r.resource) for r in desk.audit.kept] == [("list", "pods")] * 3


async def test_another_identity_counts_at_once(desk: Desk) -> None:
    assert b"Impersonate-Group: ops" in desk.plan(plain()).lines
    desk.caller.identity = dataclasses.replace(ALICE, groups=("dev",))
    assert b"ops" not in desk.plan(plain()).lines


@pytest.mark.parametrize(("impersonable", "sent"), [(None, ["dev", "ops"]), ({"ops", "x"}, ["ops"]), (set(), [])])
async def test_groups_that_the_agent_may_not_impersonate_are_left_out(
    desk: Desk, impersonable: set[str] | None, sent: list[str]
) -> None:
    """Both entrances: the API server would refuse the whole request for one group that no rule names."""
    desk.context.api.impersonable = None if impersonable is None else frozenset(impersonable)
    for head in (plain(), parsed()):
        lines = desk.plan(head).lines.decode().splitlines()
        assert [line.split(": ")[1] for line in lines if line.startswith("Impersonate-Group")] == sent
        assert sum(line == "Impersonate-User: alice" for line in lines) == 1


async def test_an_identity_that_cannot_be_sent_leaves_nothing_of_the_one_before(desk: Desk) -> None:
    desk.plan(plain())
    for bad in ("", "a\r\nImpersonate-Group: system:masters", " alice"):
        desk.caller.identity = dataclasses.replace(ALICE, username=bad)
        for _ in range(2):
            with pytest.raises(RequestRefusal):
                desk.plan(plain())


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
    plan = desk.plan(parsed((b"Authorization", b"Bearer own")))
    assert not plan.own
    assert plan.lines == b"Authorization: Bearer own\r\n"


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
    plan = desk.plan(AS_BOB, Approval(ALICE, bob))
    assert b"Impersonate-User: bob\r\n" in plan.lines
    assert b"arcbridge.io%2foriginal-user: alice" in plan.lines.lower()


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
