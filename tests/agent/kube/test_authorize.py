"""One decision for both entrances: what a caller and a head give, and what a session remembers of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from arcbridge.agent.accounts import Account, Accounts
from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.agent.kube.authorize import (
    SAFE_ID,
    Authorizer,
    Caller,
    Plan,
    RequestHead,
    ReviewedTokens,
    ReviewNeeded,
    StreamContext,
    SubjectLines,
    TokenUnknown,
    token_digest,
)
from arcbridge.agent.kube.fast_path_parser import plain_head
from arcbridge.agent.kube.impersonation import Subject
from arcbridge.agent.kube.request_target import RequestTarget, request_target
from arcbridge.agent.kube.review import Approval, Reviewer
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upgrade import UpgradeRequest
from arcbridge.identity.claims import Identity
from arcbridge.settings.config import AgentLimitsConfig, KubernetesConfig
from tests.support.fake_apiserver import Exchange, FakeApiServer, reply

from .bench import ALICE, RecordedAudit, caller_of

EXEC = "/api/v1/namespaces/default/pods/web/exec?command=sh"
PLAIN = b"Accept: a\r\n"
LINES = (
    b"Accept: a\r\nAuthorization: Bearer agent-own-token\r\nImpersonate-User: alice\r\nImpersonate-Uid: u-1\r\n"
    b"Impersonate-Group: dev\r\nImpersonate-Group: ops\r\n"
)


class Desk:
    """An authorizer, a caller, and the API server that reviews."""

    def __init__(self, fake: FakeApiServer, api: ApiServer) -> None:
        self.fake = fake
        self.audit = RecordedAudit()
        self.authorizer = Authorizer(api, self.audit, Reviewer(api))
        self.stream = StreamContext(caller_of(ALICE), 1)
        self.now: float | None = None
        """When the next requests begin, monotonic seconds; None: now."""

    @property
    def caller(self) -> Caller:
        return self.stream.caller

    def plan(self, head: RequestHead, approval: Approval | None = None) -> Plan:
        record = self.authorizer.begin(self.stream, head.method)
        record.started = self.now or record.started
        try:
            return self.authorizer.authorize(self.stream, head, record, approval)
        except RequestRefusal as refusal:
            self.authorizer.refuse(self.stream, record, refusal)
            raise
        finally:
            self.authorizer.finish(self.stream, record)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with FakeApiServer.serving(tmp_path) as fake:
        config = KubernetesConfig(server=fake.url, ca_file=fake.ca_file, token_file=fake.token_file)
        api = ApiServer(endpoint_of(config, {}))
        yield Desk(fake, api)
        await api.close()


def plain(lines: bytes = PLAIN, target: str = "/api/v1/pods") -> RequestHead:
    return RequestHead("GET", target, plain=lines)


def parsed(*fields: tuple[bytes, bytes], method: str = "GET", target: str = "/api/v1/pods") -> RequestHead:
    return RequestHead(method, target, [(b"Host", b"k"), *fields])


async def test_both_ways_to_read_a_head_give_the_same_plan(desk: Desk) -> None:
    first, again = desk.plan(plain()), desk.plan(plain())
    general = desk.plan(parsed((b"Accept", b"a"), (b"X-Remote-User", b"root")))
    assert first.lines == again.lines == general.lines == LINES
    assert dataclasses.replace(again, request_id=first.request_id) == first
    assert dataclasses.replace(general, request_id=first.request_id) == first
    ids = [plan.request_id for plan in (first, again, general)]
    assert ids == [desk.caller.request_id(1, n) for n in (1, 2, 3)]
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
    desk.authorizer._api.impersonable = None if impersonable is None else frozenset(impersonable)
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


async def test_the_limit_holds_on_either_entrance(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.plan(plain())
    monkeypatch.setattr("arcbridge.agent.kube.authorize.MAX_IN_FLIGHT", 0)
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
    assert (desk.authorizer.stats.requests, desk.authorizer.stats.refused) == (6, 2)


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
        made = RequestHead("GET", "/api/v1/pods", plain=b"Accept: x\r\n" + lines)
    else:
        made = parsed(*said)
    desk.plan(made)
    (record,) = desk.audit.kept
    assert '"client_says":{"command": "kubectl get", "session": "5f2c"}' in record.line(1.0)


async def test_a12_a_request_that_has_begun_has_its_end_whatever_came_of_it(desk: Desk) -> None:
    """A burst of refusals leaves one record, but what has a record `begun` is not left open."""
    stream = StreamContext(limited(), 1)
    for begun in (False, True, False, True):
        record = desk.authorizer.begin(stream, "POST")
        record.begun = begun
        refusal = RequestRefusal(429, "too much", retry_after=1, limit="connects_per_second")
        desk.authorizer.refuse(stream, record, refusal)
        desk.authorizer.finish(stream, record)
    assert [record.begun for record in desk.audit.kept] == [False, True, True]


async def test_l22_requests_under_way_are_of_one_user(desk: Desk) -> None:
    caller = limited(concurrent_requests=2)
    streams = [StreamContext(caller, number) for number in (1, 3, 5)]
    records = [desk.authorizer.begin(stream, "GET") for stream in streams]
    for stream, record in zip(streams[:2], records[:2], strict=True):
        desk.authorizer.authorize(stream, plain(), record)
    with pytest.raises(RequestRefusal, match="2 requests of yours are under way"):
        desk.authorizer.authorize(streams[2], parsed(), records[2])
    desk.plan(plain())  # another user
    desk.authorizer.finish(streams[0], records[0])
    desk.authorizer.authorize(streams[2], parsed(), records[2])
    assert caller.account.in_flight == 2


async def test_l22_upgrades_are_counted_from_the_first_byte_to_the_last(desk: Desk) -> None:
    caller = limited(upgraded_streams=1)
    head = parsed((b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), target=EXEC)
    first, second = StreamContext(caller, 1), StreamContext(caller, 3)
    record, other = desk.authorizer.begin(first, "GET"), desk.authorizer.begin(second, "GET")
    assert desk.authorizer.authorize(first, head, record).upgrade is not None
    with pytest.raises(RequestRefusal, match="1 exec, attach and port-forward") as caught:
        desk.authorizer.authorize(second, head, other)
    desk.authorizer.refuse(second, other, caught.value)
    assert (caller.account.in_flight, caller.account.upgrades) == (1, 1), "who is refused holds nothing"
    desk.authorizer.finish(first, record)
    assert (caller.account.in_flight, caller.account.upgrades) == (0, 0)
    assert desk.authorizer.authorize(second, head, other).upgrade is not None


async def test_l21_a_review_of_an_impersonation_does_not_count_twice(desk: Desk) -> None:
    desk.stream = StreamContext(limited(request_burst=1), 1)
    desk.fake.routes["/apis/authorization.k8s.io/v1/subjectaccessreviews"] = reply(
        201, b'{"status": {"allowed": true}}'
    )
    record = desk.authorizer.begin(desk.stream, "GET")
    await desk.authorizer.authorize_reviewed(desk.stream, AS_BOB, record)
    assert desk.caller.account.in_flight == 1
    desk.authorizer.finish(desk.stream, record)
    assert desk.caller.account.in_flight == 0


async def test_h20_what_is_over_a_limit_is_not_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a burst the one that leaves a record is read for it; also a target that is not passed on is over the limit."""
    read: list[str] = []

    def counted(method: str, target: str, upgrade: bool) -> RequestTarget:
        read.append(target)
        return request_target(method, target, upgrade)

    monkeypatch.setattr("arcbridge.agent.kube.authorize.request_target", counted)
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
    assert desk.authorizer.stats.in_flight == desk.caller.account.in_flight == 0
    monkeypatch.setattr("arcbridge.agent.accounts.BURST_GAP", 0.0)  # the burst is over
    with pytest.raises(RequestRefusal):
        desk.plan(plain())
    assert desk.audit.kept[-1].omitted == 199


def limited(**limits: int) -> Caller:
    return caller_of(ALICE, Accounts(AgentLimitsConfig(**limits)))


async def test_in_token_mode_the_callers_token_goes_on_and_no_identity_is_added(desk: Desk) -> None:
    desk.caller.token_mode = True
    with pytest.raises(RequestRefusal) as caught:
        desk.plan(plain())
    assert caught.value.status_code == 401
    desk.caller.tokens.add(token_digest(b"own"))
    plan = desk.plan(parsed((b"Authorization", b"Bearer own")))
    assert not plan.own
    assert plan.lines == b"Authorization: Bearer own\r\n"


# -- --as -----------------------------------------------------------------------------------------------------------

AS_BOB = parsed((b"Impersonate-User", b"bob"))


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


async def test_an_identity_that_is_renewed_during_the_review_is_reviewed_again(desk: Desk) -> None:
    renewed = dataclasses.replace(ALICE, groups=("other",))

    async def review(exchange: Exchange) -> None:
        desk.caller.identity = renewed
        await exchange.send(reply(201, b'{"status": {"allowed": true}}'))

    desk.fake.routes["/apis/authorization.k8s.io/v1/subjectaccessreviews"] = review
    record = desk.authorizer.begin(desk.stream, "GET")
    await desk.authorizer.authorize_reviewed(desk.stream, AS_BOB, record)
    groups = [json.loads(request.body)["spec"]["groups"] for request in desk.fake.requests]
    assert groups == [["dev", "ops", "system:authenticated"], ["other", "system:authenticated"]]


# -- what leaves ----------------------------------------------------------------------------------------------------


def made(**changes: object) -> Plan:
    plan = Plan("r-1", "GET", "/x", b"Impersonate-User: alice\r\n", True, False, "", None)
    return dataclasses.replace(plan, **changes)


START = "HTTP/1.1\r\nHost: h:1\r\nAudit-ID: r-1\r\nImpersonate-User: alice\r\n"


@pytest.mark.parametrize(
    ("plan", "head"),
    [
        (made(), f"GET /x {START}\r\n"),
        (made(method="HEAD"), f"HEAD /x {START}\r\n"),
        (made(method="DELETE"), f"DELETE /x {START}Connection: close\r\nContent-Length: 0\r\n\r\n"),
        (made(method="OPTIONS"), f"OPTIONS /x {START}Connection: close\r\n\r\n"),
        (
            made(method="PUT", has_body=True, length="5"),
            f"PUT /x {START}Connection: close\r\nContent-Length: 5\r\n\r\n",
        ),
        (made(has_body=True), f"GET /x {START}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (
            made(upgrade=UpgradeRequest("websocket", (), ())),
            f"GET /x {START}Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        ),
        (
            made(method="POST", upgrade=UpgradeRequest("SPDY/3.1", (), ())),
            f"POST /x {START}Content-Length: 0\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n",
        ),
    ],
)
def test_the_head_that_leaves(plan: Plan, head: str) -> None:
    assert plan.request_head("h:1") == head.encode()


@pytest.mark.parametrize(
    "lines", [b"", b"X: impersonate-user: root\r\n", b"Impersonate-User: a\r\nimpersonate-user: b\r\n"]
)
def test_a_head_without_exactly_one_identity_does_not_leave(lines: bytes) -> None:
    with pytest.raises(RequestRefusal, match="identity"):
        made(lines=lines).request_head("h:1")


@pytest.mark.parametrize("session", ["a\r\nImpersonate-User: root", "a b", "ü"])
async def test_a_session_whose_name_could_not_stand_in_a_header_sends_nothing(desk: Desk, session: str) -> None:
    desk.stream.caller = dataclasses.replace(desk.caller, session=session)
    with pytest.raises(RequestRefusal, match="malformed"):
        desk.plan(plain()).request_head("h:1")


# -- what a session remembers ---------------------------------------------------------------------------------------


def test_another_identity_or_credential_counts_at_once() -> None:
    lines = SubjectLines()
    assert b"Impersonate-Group: ops" in lines.of(ALICE, "Bearer a")
    assert lines.of(ALICE, "Bearer a").startswith(b"Authorization: Bearer a\r\n")
    fewer: Identity = dataclasses.replace(ALICE, groups=("dev",))
    assert b"ops" not in lines.of(fewer, "Bearer a")
    assert lines.of(fewer, "Bearer b").startswith(b"Authorization: Bearer b\r\n")
    assert b"Authorization" not in lines.of(fewer, "")


def test_an_identity_that_cannot_be_sent_leaves_no_lines_of_the_one_before() -> None:
    lines = SubjectLines()
    lines.of(ALICE, "")
    for bad in ("", "a\r\nImpersonate-Group: system:masters", " alice"):
        broken = dataclasses.replace(ALICE, username=bad)
        for _ in range(2):
            with pytest.raises(RequestRefusal):
                lines.of(broken, "")


def test_extras_are_escaped_as_for_any_request() -> None:
    identity = Identity("ü", "", (), "i#ü", "i", 4e9, {"a/b_c": ("1",)})
    assert SubjectLines().of(identity, "") == ("Impersonate-User: ü\r\nImpersonate-Extra-a%2Fb%5Fc: 1\r\n".encode())


# -- accounts -------------------------------------------------------------------------------------------------------


async def test_each_end_is_counted_once(desk: Desk) -> None:
    authorizer, stats = desk.authorizer, desk.authorizer.stats
    streams = [StreamContext(desk.caller, number) for number in (1, 3, 5)]
    records = [authorizer.begin(stream, "GET") for stream in streams]
    for stream, record in zip(streams, records, strict=True):
        authorizer.authorize(stream, plain(), record)
    assert (stats.requests, stats.in_flight, desk.caller.account.in_flight) == (3, 3, 3)
    answered, refused, cut = records
    answered.status = 200
    authorizer.refuse(streams[1], refused, RequestRefusal(403, "no"))
    assert (stats.in_flight, desk.caller.account.in_flight) == (2, 2)
    cut.outcome = "cut"
    for stream, record in zip(streams, records, strict=True):
        authorizer.finish(stream, record)
    assert desk.caller.account.in_flight == 0
    assert (stats.in_flight, stats.code_2xx, stats.code_4xx, stats.refused, stats.cut) == (0, 1, 1, 1, 1)
    assert [record.outcome for record in desk.audit.kept] == ["answered", "refused", "cut"]
    await asyncio.sleep(0)


# -- request ids, tokens and the audit log --------------------------------------------------------------------------


def test_a15_the_agent_makes_its_half_of_a_request_id() -> None:
    """A relay that gives two sessions one join id gives no two requests one id, and chooses none."""
    for join_id in ("0123456789abcdef", "a" * 200):
        first, second = (Caller(join_id, ALICE, Account(Accounts(), ALICE)) for _ in range(2))
        assert first.request_id(1, 1) != second.request_id(1, 1)
        assert first.request_id(1, 1).startswith(join_id[:16])
        assert SAFE_ID.fullmatch(first.request_id(2**31, 10**6))
        assert len(first.request_id(2**31, 10**6)) <= 64, "parts of the API server would cut it off"


async def test_a18_a_token_that_the_session_does_not_hold(desk: Desk) -> None:
    desk.caller.token_mode = True
    desk.caller.tokens.add(token_digest(b"own"))
    other = parsed((b"Authorization", b"Bearer other"))
    with pytest.raises(TokenUnknown):
        desk.plan(other)
    record = desk.authorizer.begin(desk.stream, "GET")
    with pytest.raises(RequestRefusal, match="not that of the user who opened this session") as caught:
        await desk.authorizer.authorize_reviewed(desk.stream, other, record)
    assert caught.value.status_code == 401
    asked: list[str] = []

    async def review(token: str) -> bool:
        asked.append(token)
        return token == "renewed"

    desk.caller.review_token = review
    for _ in range(2):
        renewed = parsed((b"Authorization", b"bearer  renewed"))
        plan = await desk.authorizer.authorize_reviewed(desk.stream, renewed, record)
        assert plan.lines == b"Authorization: bearer  renewed\r\n"
    assert asked == ["renewed"], "it is remembered"
    for _ in range(20):
        with pytest.raises(RequestRefusal):
            await desk.authorizer.authorize_reviewed(desk.stream, other, record)
    assert asked.count("other") < 10, "a session cannot make the agent ask for ever"


def test_a18_few_tokens_are_remembered() -> None:
    tokens = ReviewedTokens()
    for number in range(100):
        tokens.add(token_digest(b"%d" % number))
        tokens.add(token_digest(b"%d" % number))
    held = [number for number in range(100) if token_digest(b"%d" % number) in tokens]
    assert held == list(range(92, 100))
    tokens.add(b"")
    assert b"" not in tokens


async def test_a18_as_is_recorded_in_token_mode_too(desk: Desk) -> None:
    desk.caller.token_mode = True
    desk.caller.tokens.add(token_digest(b"own"))
    head = parsed(
        (b"Authorization", b"Bearer own"), (b"Impersonate-User", b"carol"), (b"Impersonate-Group", b"system:masters")
    )
    assert b"Impersonate-User: carol" in desk.plan(head).lines
    assert (desk.audit.kept[-1].as_user, desk.audit.kept[-1].as_groups) == ("carol", ("system:masters",))
    assert desk.audit.kept[-1].user == "alice"


async def test_a11_no_plan_while_the_log_that_must_be_written_cannot_be(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk.audit, "refusal", lambda: "the agent cannot write its audit log")
    for head in (plain(), parsed(), parsed(method="POST")):
        with pytest.raises(RequestRefusal) as caught:
            desk.plan(head)
        assert (caught.value.status_code, caught.value.retry_after) == (503, None)


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
    head = plain_head(data, {})
    assert head is not None, "it came to the fast entrance"
    general = parsed((b"Accept", b"a"), (name.encode(), b"forged"))
    for plan in (desk.plan(head), desk.plan(general)):
        assert b"forged" not in plan.request_head("h:1")
        assert plan.request_head("h:1").lower().count(b"audit-id:") == 1
    desk.caller.token_mode = True
    desk.caller.tokens.add(token_digest(b"own"))
    general = parsed((b"Authorization", b"Bearer own"), (name.encode(), b"forged"))
    assert b"forged" not in desk.plan(general).request_head("h:1")
