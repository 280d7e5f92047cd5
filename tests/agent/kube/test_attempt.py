"""One request from its first byte to its record: limits, records, reviews, and each end once."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest
from structlog.testing import capture_logs

from arcbridge.agent.kube.authorize import TokenUnknown
from arcbridge.agent.kube.caller import StreamContext, token_digest
from arcbridge.agent.kube.request_target import RequestTarget, request_target
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.tracing.spans import FinishedSpan, Span
from tests.support.fake_apiserver import Exchange, reply

from .bench import ALICE
from .desk import AS_BOB, Desk, limited, parsed, plain


async def test_the_limit_holds_on_either_entrance(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.plan(plain())
    monkeypatch.setattr("arcbridge.agent.kube.attempt.MAX_IN_FLIGHT", 0)
    for head in (plain(), parsed()):
        with pytest.raises(RequestRefusal) as caught:
            desk.plan(head)
        assert (caught.value.status_code, caught.value.retry_after) == (429, 1)


async def test_l21_requests_of_both_entrances_draw_on_one_allowance(desk: Desk) -> None:
    desk.stream = StreamContext(limited(request_burst=4, requests_per_second=1), 1)
    desk.now = 1000.0
    for head in (plain(), parsed(), plain(), parsed()):
        desk.plan(head)
    for head in (plain(), parsed()):
        with pytest.raises(RequestRefusal, match="you send more than the 1 requests a second") as caught:
            desk.plan(head)
        assert (caught.value.status_code, caught.value.retry_after, caught.value.hold) == (429, 1, 0.0)
    assert [record.outcome for record in desk.audit.kept] == ["answered"] * 4 + ["refused"]
    assert (desk.audit.kept[-1].limit, desk.audit.kept[-1].omitted) == ("requests_per_second", 0)
    assert (desk.context.stats.requests, desk.context.stats.refused) == (6, 2)


async def test_a27_over_the_bytes_of_records_what_must_be_recorded_is_refused(desk: Desk) -> None:
    """A read goes on, and its record may be left out; with `refuse` nothing goes on."""
    caller = limited(audit_bytes_per_second=16 * 1024)
    desk.stream = StreamContext(caller, 1)
    desk.now = 1000.0
    caller.account.audit.change(1000.0, 16 * 1024)
    desk.plan(plain(target="/api/v1/pods?watch=1"))
    caller.account.audit.charge("x" * 20 * 16 * 1024, 1000.0)
    for head in (plain(target="/api/v1/pods?watch=1"), parsed(method="DELETE"), parsed(method="POST")):
        with pytest.raises(RequestRefusal, match=r"fill more than the 16 KiB a second of the audit log") as caught:
            desk.plan(head)
        assert (caught.value.status_code, caught.value.retry_after) == (429, 1)
    desk.plan(plain())
    assert caller.account.in_flight == 0, "what is refused holds nothing"
    assert [record.limit for record in desk.audit.kept] == ["", "audit_bytes", ""]
    desk.audit.refuses = True
    with pytest.raises(RequestRefusal, match="audit log"):
        desk.plan(plain())


@pytest.mark.parametrize("head", ["plain", "parsed"])
async def test_a25_kubectls_own_words_are_in_the_record(desk: Desk, head: str) -> None:
    said = (b"Kubectl-Command", b"kubectl get"), (b"Kubectl-Session", b"5f2c")
    if head == "plain":
        lines = b"".join(b"%b: %b\r\n" % field for field in said)
        made = plain(b"Accept: x\r\n" + lines)._replace(client=lines)
    else:
        made = parsed(*said)
    desk.plan(made)
    (record,) = desk.audit.kept
    assert '"client_says":{"command": "kubectl get", "session": "5f2c"}' in record.line(1.0)


async def test_a12_a_request_that_has_begun_has_its_end_whatever_came_of_it(desk: Desk) -> None:
    """A burst of refusals leaves one record, but what has a record `begun` is not left open."""
    stream = StreamContext(limited(), 1)
    for begun in (False, True, False, True):
        attempt = desk.begin(stream, "POST")
        attempt.record.begin(begun)
        attempt.refuse(RequestRefusal(429, "too much", retry_after=1, limit="connects_per_second"))
        attempt.finish()
    assert [record.begun for record in desk.audit.kept] == [False, True, True]


async def test_l22_requests_under_way_are_of_one_user(desk: Desk) -> None:
    caller = limited(concurrent_requests=2)
    first, second, third = (desk.begin(StreamContext(caller, number)) for number in (1, 3, 5))
    first.plan(plain())
    second.plan(plain())
    with pytest.raises(RequestRefusal, match="2 requests of yours are under way"):
        third.plan(parsed())
    desk.plan(plain())  # another user
    first.finish()
    third.plan(parsed())
    assert caller.account.in_flight == 2


async def test_l22_upgrades_are_counted_from_the_first_byte_to_the_last(desk: Desk) -> None:
    caller = limited(upgraded_streams=1)
    target = "/api/v1/namespaces/default/pods/web/exec?command=sh"
    facts = parsed((b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), target=target)
    first, second = desk.begin(StreamContext(caller, 1)), desk.begin(StreamContext(caller, 3))
    assert first.plan(facts).upgrade is not None
    with pytest.raises(RequestRefusal, match="1 exec, attach and port-forward") as caught:
        second.plan(facts)
    second.refuse(caught.value)
    assert (caller.account.in_flight, caller.account.upgrades) == (1, 1), "who is refused holds nothing"
    first.finish()
    assert (caller.account.in_flight, caller.account.upgrades) == (0, 0)
    assert second.plan(facts).upgrade is not None


async def test_l21_a_review_of_an_impersonation_does_not_count_twice(desk: Desk) -> None:
    desk.stream = StreamContext(limited(request_burst=1), 1)
    desk.fake.routes["/apis/authorization.k8s.io/v1/subjectaccessreviews"] = reply(
        201, b'{"status": {"allowed": true}}'
    )
    attempt = desk.begin()
    await desk.reviewed(attempt, AS_BOB)
    assert desk.caller.account.in_flight == 1
    attempt.finish()
    assert desk.caller.account.in_flight == 0


async def test_h20_what_is_over_a_limit_is_not_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a burst the one that leaves a record is read for it; also a target that is not passed on is over the limit."""
    read: list[str] = []

    def counted(method: str, target: str, upgrade: bool) -> RequestTarget:
        read.append(target)
        return request_target(method, target, upgrade)

    monkeypatch.setattr("arcbridge.agent.kube.attempt.request_target", counted)
    desk.stream = StreamContext(limited(request_burst=1), 1)
    desk.now = 1000.0
    desk.plan(plain())
    exec_target = f"/api/v1/namespaces/n/pods/{'p' * 8000}/exec?command={'c' * 50_000}"
    for target in (exec_target, "/api/../x"):
        for head in (plain(target=target), parsed(target=target)):
            for _ in range(20):
                with pytest.raises(RequestRefusal) as caught:
                    desk.plan(head)
                assert caught.value.status_code == 429
    assert read == ["/api/v1/pods", exec_target]
    assert (desk.audit.kept[-1].limit, desk.audit.kept[-1].subresource) == ("requests_per_second", "exec")


async def test_o10_a_flood_over_a_limit_makes_one_span(desk: Desk) -> None:
    """As it makes one record: the room for spans is that of all callers."""
    desk.stream = StreamContext(limited(request_burst=1), 1)
    desk.now = 1000.0
    ended: list[FinishedSpan] = []
    for _ in range(50):
        attempt = desk.begin()
        attempt.span = Span("1" * 32, "2" * 16, 1, ended.append)
        try:
            attempt.plan(plain())
        except RequestRefusal as refusal:
            attempt.refuse(refusal)
        finally:
            attempt.finish()
    assert [span.outcome for span in ended] == ["answered", "refused"]


async def test_l26_a_flood_leaves_one_log_line_and_one_record_and_is_held(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.stream = StreamContext(limited(request_burst=1), 1)
    desk.now = 1000.0
    desk.plan(plain())
    held = []
    with capture_logs() as logs:
        for _ in range(200):
            with pytest.raises(RequestRefusal) as caught:
                desk.plan(plain())
            held.append(caught.value.hold)
    assert [(line["event"], line["reason"]) for line in logs] == [("limit reached", "requests_per_second")]
    assert [record.outcome for record in desk.audit.kept] == ["answered", "refused"]
    assert held == [*[0.0] * 50, *[1.0] * 150]
    assert desk.context.stats.in_flight == desk.caller.account.in_flight == 0
    monkeypatch.setattr("arcbridge.agent.accounts.BURST_GAP", 0.0)  # the burst is over
    with pytest.raises(RequestRefusal):
        desk.plan(plain())
    assert desk.audit.kept[-1].omitted == 199


async def test_each_end_is_counted_once(desk: Desk) -> None:
    stats = desk.context.stats
    attempts = answered, refused, cut = [desk.begin(StreamContext(desk.caller, number)) for number in (1, 3, 5)]
    for attempt in attempts:
        attempt.plan(plain())
    assert (stats.requests, stats.in_flight, desk.caller.account.in_flight) == (3, 3, 3)
    answered.record.answer(200)
    refused.refuse(RequestRefusal(403, "no"))
    assert (stats.in_flight, desk.caller.account.in_flight) == (2, 2)
    cut.record.cut()
    for attempt in attempts:
        attempt.finish()
    assert desk.caller.account.in_flight == 0
    assert (stats.in_flight, stats.code_2xx, stats.code_4xx, stats.refused, stats.cut) == (0, 1, 1, 1, 1)
    assert [record.outcome for record in desk.audit.kept] == ["answered", "refused", "cut"]
    await asyncio.sleep(0)


async def test_a40_a_record_names_the_user_whom_the_api_server_is_told(desk: Desk) -> None:
    """The token is renewed with another name for the same person while `--as` is reviewed."""

    async def review(exchange: Exchange) -> None:
        desk.caller.adopt(dataclasses.replace(ALICE, username="alice-renamed", groups=("dev",)), "")
        await exchange.send(reply(201, b'{"status": {"allowed": true}}'))

    desk.fake.routes["/apis/authorization.k8s.io/v1/subjectaccessreviews"] = review
    attempt = desk.begin()
    plan = await desk.reviewed(attempt, AS_BOB)
    assert b"original-user: alice-renamed\r\n" in plan.head.lower()
    assert attempt.record.subject is desk.caller.subject
    assert attempt.record.subject.user == "alice-renamed"


async def test_an_identity_that_is_renewed_during_the_review_is_reviewed_again(desk: Desk) -> None:
    renewed = dataclasses.replace(ALICE, groups=("other",))

    async def review(exchange: Exchange) -> None:
        desk.caller.identity = renewed
        await exchange.send(reply(201, b'{"status": {"allowed": true}}'))

    desk.fake.routes["/apis/authorization.k8s.io/v1/subjectaccessreviews"] = review
    await desk.reviewed(desk.begin(), AS_BOB)
    groups = [json.loads(request.body)["spec"]["groups"] for request in desk.fake.requests]
    assert groups == [["dev", "ops", "system:authenticated"], ["other", "system:authenticated"]]


async def test_a18_a_token_that_the_session_does_not_hold(desk: Desk) -> None:
    desk.caller.token_mode = True
    desk.caller.tokens.add(token_digest(b"own"))
    other = parsed((b"Authorization", b"Bearer other"))
    with pytest.raises(TokenUnknown) as unknown:
        desk.plan(other)
    assert "other" not in f"{unknown.value} {unknown.value!r}"
    attempt = desk.begin()
    with pytest.raises(RequestRefusal, match="not that of the user who opened this session") as caught:
        await desk.reviewed(attempt, other)
    assert caught.value.status_code == 401
    asked: list[str] = []

    async def review(token: str) -> bool:
        asked.append(token)
        return token == "renewed"

    desk.caller.review_token = review
    for _ in range(2):
        renewed = parsed((b"Authorization", b"bearer  renewed"))
        plan = await desk.reviewed(attempt, renewed)
        assert plan.head.endswith(b"\r\nAuthorization: bearer  renewed\r\n\r\n")
    assert asked == ["renewed"], "it is remembered"
    for _ in range(20):
        with pytest.raises(RequestRefusal):
            await desk.reviewed(attempt, other)
    assert asked.count("other") < 10, "a session cannot make the agent ask for ever"


async def test_a18_as_is_recorded_in_token_mode_too(desk: Desk) -> None:
    desk.caller.token_mode = True
    desk.caller.tokens.add(token_digest(b"own"))
    head = parsed(
        (b"Authorization", b"Bearer own"), (b"Impersonate-User", b"carol"), (b"Impersonate-Group", b"system:masters")
    )
    assert b"Impersonate-User: carol" in desk.head(head)
    assert (desk.audit.kept[-1].as_user, desk.audit.kept[-1].as_groups) == ("carol", ("system:masters",))
    assert desk.audit.kept[-1].subject.user == "alice"


async def test_a11_no_plan_while_the_log_that_must_be_written_cannot_be(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk.audit, "refuses", True)
    monkeypatch.setattr(desk.audit, "refusal", lambda: "the agent cannot write its audit log")
    for head in (plain(), parsed(), parsed(method="POST")):
        with pytest.raises(RequestRefusal) as caught:
            desk.plan(head)
        assert (caught.value.status_code, caught.value.retry_after) == (503, None)
