"""What is lent to sessions, from the objects of a cluster to the request that leaves and the stream that ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from arcbridge.agent.accounts import Accounts
from arcbridge.agent.elevation.elevation import REFUSES, REFUSES_DECISION, Elevation
from arcbridge.agent.elevation.grants import ENDINGS
from arcbridge.agent.elevation.objects import API
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions
from arcbridge.errors import StreamReset
from arcbridge.identity.claims import Identity
from arcbridge.observe.metrics import Metrics
from arcbridge.settings.config import ElevationConfig
from arcbridge.tasks import cancel_and_wait
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.records import Restrictions
from tests.agent.kube.bench import ALICE, PODS, Bench, caller_of, running
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, Unanswered, impersonation_of, reply

from .documents import CREATED, request, request_document, rule_document

CONFIG = ElevationConfig(groups=("operators",))
EXTRA = "impersonate-extra-arcbridge.io%2felevated"
TEXT = b"alice-1 rule=incident groups=operators approved-by=bob reason=INC-42 it burns"
WATCH = "HTTP/1.1 200 X\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


class Lending:
    """An `Elevation` whose objects and clock a test gives; nothing is watched."""

    def __init__(self, api: ApiServer, config: ElevationConfig = CONFIG) -> None:
        self.elevation = Elevation(config, api)
        self.now = CREATED + 60
        clock = self.elevation.clock
        clock._clock, clock._monotonic = lambda: self.now, lambda: self.now
        self.follow()
        self.hold()
        self.rule()

    def follow(self, current: bool = True) -> None:
        self.elevation.rules.current = self.elevation.requests.current = current

    def hold(self, requests: bool = True, decisions: bool | None = True) -> None:
        self.elevation._requests_hold, self.elevation._decisions_hold = requests, decisions

    def rule(self, kind: str = "MODIFIED", **fields: Any) -> None:
        self.elevation._rule_changed(kind, rule_document(**fields))
        self.elevation.settle()

    def request(self, name: str = "alice-1", kind: str = "MODIFIED", **fields: Any) -> None:
        self.elevation._request_changed(kind, request_document(name, **{"begins": self.now, **fields}))
        self.elevation.settle()

    def at(self, seconds: float) -> None:
        self.now = CREATED + seconds
        self.elevation.settle()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
async def lending(bench: Bench) -> Lending:
    made = Lending(bench.proxy.api)
    made.elevation.enter(bench.caller)
    return made


async def groups(bench: Bench, *headers: str) -> list[bytes]:
    """Return the groups with which a request leaves now."""
    assert (await bench.get(PODS, *headers)).status == 200
    return impersonation_of(bench.api.last).get("impersonate-group", [])


async def test_a_grant_lends_groups_from_its_beginning_to_its_end(bench: Bench, lending: Lending) -> None:
    with capture_logs() as logs:
        assert await groups(bench) == [b"dev", b"ops"]
        lending.request(begins=0)
        assert await groups(bench) == [b"dev", b"ops"], "it is approved, and no agent has begun it"
        lending.request()
        for headers in ((), ("Accept-Encoding: gzip", "Expect: 100-continue")):  # by both entrances
            assert await groups(bench, *headers) == [b"dev", b"ops", b"operators"]
            assert impersonation_of(bench.api.last)[EXTRA] == [TEXT]
        lending.at(60 + 1799)
        assert await groups(bench) == [b"dev", b"ops", b"operators"]
        lending.at(60 + 1800)
        assert await groups(bench) == [b"dev", b"ops"]
        assert EXTRA not in impersonation_of(bench.api.last)
    begun, ended = (one for one in logs if one["event"].startswith("elevation "))
    assert (begun["user"], begun["elevation"], begun["groups"]) == ("alice", "alice-1", "operators")
    assert (begun["approved_by"], begun["reason"], begun["until"]) == ("bob", "INC-42 it burns", "2027-01-15T08:31:00Z")
    assert (ended["event"], ended["reason"]) == ("elevation ended", "expired")
    records = [line for line in bench.audit.lines() if "elevated" in line]
    assert len(records) == 3
    assert all(line["elevated"] == [TEXT.decode()] for line in records)


async def test_g3_a_session_that_begins_between_two_looks_gets_no_grant_that_is_over(
    bench: Bench, lending: Lending
) -> None:
    lending.request()
    lending.now += 1801
    late = caller_of(ALICE)
    lending.elevation.enter(late)
    assert late.lent is None


@pytest.mark.parametrize("why", ENDINGS)
async def test_g3_what_ends_a_grant_ends_its_streams_and_no_others(why: str, bench: Bench, lending: Lending) -> None:
    """A watch by each entrance: one from before, one by the grant; and one of another user."""
    path = f"{PODS}?watch=1"
    bench.api.routes[PODS] = Unanswered(WATCH.encode())
    other = caller_of(Identity("carol", "", ("dev",), "i#carol", "i", 4e9))
    lending.elevation.enter(other)
    before = await bench.begin(f"GET {path} HTTP/1.1\r\nHost: k\r\n\r\n".encode())
    assert (await before.head())[0] == 200
    lending.request()
    lending.request("carol-1", user="carol", seconds=3600)
    by_it = []
    for more in ("", "Accept-Encoding: gzip\r\nExpect: 100-continue\r\n"):
        by_it.append(await bench.begin(f"GET {path} HTTP/1.1\r\nHost: k\r\n{more}\r\n".encode()))
        assert (await by_it[-1].head())[0] == 200
    lasting = dict(bench.caller.on_loan)
    assert len(lasting) == 2
    match why:
        case "expired":
            lending.at(60 + 1800)
        case "withdrawn":
            lending.request(withdrawn={"user": "alice"})
        case "denied":
            lending.request(denied={"user": "bob"})
        case "deleted":
            lending.request(kind="DELETED")
        case "rule":
            lending.rule(seconds=1799)
    for wire in by_it:
        with pytest.raises(StreamReset) as reset:
            await wire.until(b"never")
        assert reset.value.code == ResetCode.FORBIDDEN
    await bench.audit.wait(2)
    ended = [line for line in bench.audit.lines() if line.get("reason")]
    assert [line["reason"] for line in ended] == ["the elevation by which it began has ended"] * 2
    assert lending.elevation._ended[why] == 1 + (why == "rule"), "carol's too, where it is the rule"
    assert bench.caller.on_loan == {}
    assert before.transport.is_closing() is False
    assert (other.lent is None) is (why == "rule")
    assert lent_groups(lending, ALICE) == ("dev", "ops")


def lent_groups(lending: Lending, identity: Identity) -> tuple[str, ...]:
    lent = lending.elevation.lend(identity, None)
    return identity.groups if lent is None else lent.identity.groups


async def test_g3_a_request_that_was_planned_by_a_grant_does_not_leave_behind_it(
    bench: Bench, lending: Lending
) -> None:
    """A watch waits for its record before it leaves; the grant ends meanwhile."""
    lending.request()
    begin = bench.audit.begin

    def late(record: Any, recorded: Any) -> None:
        lending.request(withdrawn={"user": "alice"})
        begin(record, recorded)

    bench.audit.begin = late
    answer = await bench.get(f"{PODS}?watch=1")
    assert (answer.status, "has ended" in answer.status_object["message"]) == (403, True)
    assert bench.api.requests == []


async def test_a_rule_that_names_other_users_ends_what_it_gave(bench: Bench, lending: Lending) -> None:
    lending.request()
    assert await groups(bench) == [b"dev", b"ops", b"operators"]
    lending.rule(asking=("others",))
    assert await groups(bench) == [b"dev", b"ops"]
    lending.rule()
    assert await groups(bench) == [b"dev", b"ops", b"operators"]


async def test_a_renewal_that_lacks_the_group_lends_nothing(bench: Bench, lending: Lending) -> None:
    lending.request()
    bench.caller.adopt(Identity("alice", "u-1", ("ops",), ALICE.subject, "i", 4e9), "")
    assert await groups(bench) == [b"ops"]
    bench.caller.adopt(ALICE, "")
    assert await groups(bench) == [b"dev", b"ops", b"operators"]


async def test_a_program_that_acts_for_the_user_is_lent_nothing(bench: Bench, lending: Lending) -> None:
    lending.request()
    bench.caller.adopt(replace(ALICE, actor="bot"), "")
    assert await groups(bench) == [b"dev", b"ops"]
    bench.caller.adopt(ALICE, "")
    assert await groups(bench) == [b"dev", b"ops", b"operators"]


async def test_as_another_user_is_reviewed_with_what_is_lent(bench: Bench, lending: Lending) -> None:
    lending.request()
    await bench.get(PODS, "Impersonate-User: bob")
    review = json.loads(bench.api.requests[0].body)["spec"]
    assert review["groups"] == ["dev", "ops", "operators", "system:authenticated"]
    sent = impersonation_of(bench.api.last)
    assert (sent["impersonate-user"], sent[EXTRA]) == ([b"bob"], [TEXT])
    assert "impersonate-group" not in sent
    answer = await bench.get(PODS, "Impersonate-User: bob", "Impersonate-Extra-Arcbridge.io%2felevated: forged")
    assert answer.status == 400


@pytest.mark.parametrize("default", ["all", "read-only"])
@pytest.mark.parametrize(
    "record",
    [
        Restrictions(read_only=True),
        Restrictions(no_secrets=True),
        Restrictions(namespaces="default"),
        Restrictions(verbs="get list"),
        Restrictions(until=4_000_000_000),
    ],
)
async def test_g5_a_session_that_asked_for_restrictions_is_lent_nothing(
    record: Restrictions, default: str, bench: Bench
) -> None:
    """A tool has what it was given, and not what its user asked for besides; the user's other session has that."""
    lending, other = Lending(bench.proxy.api, ElevationConfig(("operators",), default, ("dev",))), caller_of(ALICE)
    bench.caller.restrictions = SessionRestrictions(record)
    for caller in (bench.caller, other):
        lending.elevation.enter(caller)
    before = bench.caller.words
    lending.request()
    assert other.lent is not None
    assert other.lent.identity.groups == ("dev", "ops", "operators")
    assert await groups(bench) == [b"dev", b"ops"]
    assert bench.caller.subject.grants == frozenset()
    assert bench.caller.words == before, "a grant of the user's lifts no default here"
    assert set(record.words()) <= set(before)
    refused = await bench.get(f"{PODS}/a", method="DELETE")
    assert (refused.status == 403) is (default == "read-only" or record.read_only or bool(record.verbs))


@pytest.mark.parametrize(
    ("named", "held"), [("*", True), ("dev", True), ("others", False), ("system:authenticated", True)]
)
async def test_g5_token_mode_is_lent_nothing_and_has_the_default(named: str, held: bool, bench: Bench) -> None:
    """Else a user who reads a ServiceAccount's token would write with it."""
    lending = Lending(bench.proxy.api, ElevationConfig(("operators",), "read-only", (named,)))
    caller = caller_of(ALICE)
    caller.token_mode = True
    lending.elevation.enter(caller)
    lending.request()
    assert caller.words == (("read-only",) if held else ())
    if caller.lent is not None:
        assert (caller.lent.identity, caller.lent.grants) == (ALICE, ())


async def test_a_session_that_is_over_is_forgotten(bench: Bench, lending: Lending) -> None:
    lending.elevation.leave(bench.caller)
    lending.request()
    assert bench.caller.lent is None
    assert lending.elevation._callers == {}


async def test_g7_unless_all_is_seen_and_the_policies_hold_nothing_is_added(bench: Bench, lending: Lending) -> None:
    """And what is known runs to its end."""
    lending.request()
    for lacking in ("watch", "requests", "decisions", "unasked"):
        lending.follow(lacking != "watch")
        lending.hold(lacking != "requests", {"decisions": False, "unasked": None}.get(lacking, True))
        lending.request("alice-2")
        assert len(lending.elevation.lend(ALICE, None).grants) == 1
        late = caller_of(ALICE, Accounts())
        lending.elevation.enter(late)
        assert late.lent is not None, "a session that begins has what is known"
    lending.at(60 + 1800)
    assert bench.caller.lent is None
    lending.follow()
    lending.hold()
    lending.request("alice-2")
    assert bench.caller.lent is not None


async def test_g5_reading_is_the_normal_state_and_a_grant_the_way_to_write(bench: Bench) -> None:
    lending = Lending(bench.proxy.api, ElevationConfig(("operators",), "read-only", ("dev",)))
    lending.elevation.enter(bench.caller)
    refused = await bench.get(f"{PODS}/a", method="DELETE")
    assert (refused.status, "arcbridge elevate" in refused.status_object["message"]) == (403, True)
    assert bench.api.requests == []
    assert await groups(bench) == [b"dev", b"ops"]
    assert impersonation_of(bench.api.last)["impersonate-extra-arcbridge.io%2frestricted"] == [b"read-only"]
    review = json.dumps({"spec": {"resourceAttributes": {"verb": "delete", "resource": "pods"}}}).encode()
    head = (
        f"POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews HTTP/1.1\nHost: k\nContent-Length: {len(review)}"
    )
    answer = await bench.ask(head, review)
    assert json.loads(answer.body)["status"]["denied"] is True, "`kubectl auth can-i` agrees"
    lending.request()
    assert (await bench.get(f"{PODS}/a", method="DELETE")).status == 200
    lending.at(60 + 1800)
    assert (await bench.get(f"{PODS}/a", method="DELETE")).status == 403
    other = caller_of(Identity("carol", "", ("ops",), "i#carol", "i", 4e9))
    lending.elevation.enter(other)
    assert other.lent is None, "the default is for the groups that it names"
    assert [line.get("restricted") for line in bench.audit.lines()][:2] == [["read-only"]] * 2


async def test_documents_that_are_none_lend_nothing(bench: Bench, lending: Lending) -> None:
    elevation = lending.elevation
    lending.request()
    elevation._request_changed("MODIFIED", {"metadata": {"name": "alice-1", "uid": "uid-alice-1"}, "spec": {}})
    elevation._rule_changed("ADDED", {"metadata": {"name": "broken"}, "spec": 7})
    elevation.settle()
    assert (bench.caller.lent, elevation.book.requests, list(elevation.book.rules)) == (None, {}, ["incident"])
    page = [{"metadata": {}}, request_document(begins=lending.now)]
    elevation._requests_listed(elevation._more_requests([], page))
    elevation._rules_listed(elevation._more_rules([], [{"metadata": {"name": "x"}}, rule_document()]))
    elevation.settle()
    assert bench.caller.lent is not None


async def test_a_withdrawal_by_the_elevated_user_gets_its_answer(bench: Bench, lending: Lending) -> None:
    """It ends the grant by which it left, often before the API server has answered."""
    path = f"{API}/accessrequests/alice-1/status"

    async def patched(exchange: Exchange) -> None:
        lending.request(withdrawn={"user": "alice"})
        await exchange.send(reply(200, b"{}"))

    bench.api.routes[path] = patched
    lending.request()
    assert (await bench.get(path, method="PATCH")).status == 200
    assert bench.caller.lent is None


@pytest.mark.parametrize("of", ["request", "rule"])
@pytest.mark.parametrize("how", ["listed", "watched"])
async def test_g3_an_object_that_is_being_deleted_lends_nothing(
    of: str, how: str, bench: Bench, lending: Lending
) -> None:
    """Its writer may have given it a finalizer, so that the API server keeps it."""
    lending.request()
    asked, rule, elevation = request_document(begins=lending.now), rule_document(), lending.elevation
    {"request": asked, "rule": rule}[of]["metadata"]["deletionTimestamp"] = "2027-01-15T08:01:00Z"
    if how == "watched":
        elevation._request_changed("MODIFIED", asked)
        elevation._rule_changed("MODIFIED", rule)
    else:
        elevation._requests_listed(elevation._more_requests([], [asked]))
        elevation._rules_listed(elevation._more_rules([], [rule]))
    elevation.settle()
    assert bench.caller.lent is None
    assert elevation._ended["deleted" if of == "request" else "rule"] == 1


class Answering:
    """An API server's answers to what the agent writes."""

    def __init__(self, bench: Bench, *, policies: bool = True, code: int = 200) -> None:
        self.patches: list[dict[str, Any]] = []
        self.code = code
        self.probes = 0
        self.probe = reply(422, json.dumps({"message": f"denied request: {REFUSES}: …"}).encode())
        self.decision = reply(422, json.dumps({"message": f"denied request: {REFUSES_DECISION}, …"}).encode())
        if not policies:
            self.probe = reply(201, b"{}")
        self.held: asyncio.Event | None = None
        bench.api.routes[f"{API}/accessrequests"] = self.probed
        bench.api.routes[f"{API}/accessrequests/alice-1/status"] = self.patched

    async def probed(self, exchange: Exchange) -> None:
        assert exchange.request.target.endswith("?dryRun=All")
        assert json.loads(exchange.request.body)["spec"]["user"] == "arcbridge:nobody"
        self.probes += 1
        await exchange.send(self.probe)

    async def patched(self, exchange: Exchange) -> None:
        if exchange.request.target.endswith("?dryRun=All"):
            assert json.loads(exchange.request.body) == {"status": {"withdrawn": {"user": "arcbridge:nobody"}}}
            await exchange.send(self.decision)
            return
        assert exchange.request.header("content-type") == [b"application/merge-patch+json"]
        assert not impersonation_of(exchange.request), "as itself"
        self.patches.append(json.loads(exchange.request.body))
        await exchange.send(reply(self.code, b'{"message": "not by you"}'))


async def test_an_agent_begins_what_is_approved_by_the_api_servers_clock(bench: Bench, lending: Lending) -> None:
    api, elevation = Answering(bench), lending.elevation
    lending.hold(False, None)
    lending.request(begins=0)
    await elevation.work()
    assert elevation.policies_hold
    times = {"from": "2027-01-15T08:01:00Z", "until": "2027-01-15T08:31:00Z"}
    assert api.patches == [{"metadata": {"resourceVersion": "7"}, "status": times}]
    assert bench.caller.lent is None, "only what the API server sends back is in force"
    lending.request()
    await elevation.work()
    assert len(api.patches) == 1


@pytest.mark.parametrize(("code", "tries"), [(409, 2), (404, 2), (422, 1), (403, 1)])
async def test_a_request_that_is_not_begun_is_said_once(code: int, tries: int, bench: Bench, lending: Lending) -> None:
    """Another agent may have been first: then its times come with the watch."""
    api = Answering(bench, code=code)
    lending.request(begins=0)
    with capture_logs() as logs:
        await lending.elevation.work()
        await lending.elevation.work()
    assert len(api.patches) == tries
    said = [one for one in logs if one["event"] == "elevation not begun"]
    assert [one["reason"] for one in said] == ["not by you"] * (2 - tries)
    lending.elevation._requests_listed([request()])
    await lending.elevation.work()
    assert len(api.patches) == tries + 1, "a list begins anew"


async def test_g7_without_the_policies_nothing_is_begun(bench: Bench, lending: Lending) -> None:
    api, elevation = Answering(bench, policies=False), lending.elevation
    lending.request(begins=0)
    await elevation.work()
    assert (elevation.policies_hold, api.patches) == (False, [])
    api.probe = reply(422, b'{"message": "spec.user: Too long"}')
    elevation._look_at = 0.0
    await elevation.work()
    assert elevation.policies_hold is False, "another refusal is none of theirs"
    api.probe = reply(403, f'{{"message": "{REFUSES}"}}'.encode())
    elevation._look_at = 0.0
    await elevation.work()
    assert elevation.policies_hold


async def test_g7_without_the_policy_on_decisions_nothing_is_begun(bench: Bench, lending: Lending) -> None:
    """Else a user who may ask could write approvals in any name, and the times."""
    api, elevation = Answering(bench), lending.elevation
    lending.hold(False, None)
    api.decision = reply(200, b"{}")
    await elevation.work()
    assert (elevation.policies_hold, elevation._decisions_hold) == (True, None), "there is no request to ask by"
    lending.request()
    assert bench.caller.lent is None
    lending.request("alice-1", begins=0)
    await elevation.work()
    assert (elevation.policies_hold, api.patches) == (False, [])
    for answer, holds in (
        (reply(404, b"{}"), False),
        (reply(422, f'{{"message": "{REFUSES_DECISION}"}}'.encode()), True),
        (reply(404, b"{}"), True),
        (reply(422, b'{"message": "too long"}'), False),
    ):
        api.decision, elevation._look_at = answer, 0.0
        await elevation.work()
        assert elevation.policies_hold is holds


async def test_g7_missing_policies_are_asked_about_once_in_a_tick(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the agent wakes: each question is one more event in the API server's audit log."""
    monkeypatch.setattr("arcbridge.agent.elevation.elevation.TICK", 0.2)
    api, elevation = Answering(bench, policies=False), Lending(bench.proxy.api).elevation
    for one in (elevation.rules, elevation.requests):
        monkeypatch.setattr(one, "run", asyncio.Event().wait)
    loop = asyncio.get_running_loop()
    began, task = loop.time(), loop.create_task(elevation.run())
    while api.probes < 3:
        elevation._wake()
        await asyncio.sleep(0.01)
    assert loop.time() - began >= 2 * 0.2
    await cancel_and_wait(task)


@pytest.mark.parametrize("code", [401, 429, 500, 503])
async def test_a_request_that_a_slow_api_server_did_not_begin_begins_soon(
    code: int, bench: Bench, lending: Lending
) -> None:
    """And not at the next list only, minutes later; nor do all that wait go to an API server that is overloaded."""
    api = Answering(bench, code=code)
    for name in ("alice-1", "alice-2"):
        lending.request(name, begins=0)
    await lending.elevation.work()
    await lending.elevation.work()
    assert len(api.patches) == 1
    lending.elevation._begin_at = 0.0
    await lending.elevation.work()
    assert len(api.patches) == 2


async def test_it_runs_from_an_empty_cluster_to_a_grant(bench: Bench) -> None:
    """With lists and watches over HTTP; the end of `run` leaves nothing."""
    lists = {"accessrules": [rule_document()], "accessrequests": [request_document(begins=CREATED)]}

    def serve(resource: str) -> Any:
        async def route(exchange: Exchange) -> None:
            if exchange.request.method == "PATCH":
                await exchange.send(reply(422, f'{{"message": "{REFUSES_DECISION}"}}'.encode()))
            elif exchange.request.method == "POST":
                await exchange.send(reply(422, f'{{"message": "{REFUSES}"}}'.encode()))
            elif "watch=1" in exchange.request.target:
                date = "Fri, 15 Jan 2027 08:10:00 GMT"
                await Unanswered(WATCH.replace("\r\n\r\n", f"\r\nDate: {date}\r\n\r\n").encode())(exchange)
            else:
                body = {"metadata": {"resourceVersion": "5"}, "items": lists[resource]}
                await exchange.send(reply(200, json.dumps(body).encode()))

        return route

    for resource in lists:
        bench.api.routes[f"{API}/{resource}"] = serve(resource)
    bench.api.routes[f"{API}/accessrequests/alice-1/status"] = serve("accessrequests")
    elevation = Elevation(CONFIG, bench.proxy.api)
    elevation.enter(bench.caller)
    task = asyncio.get_running_loop().create_task(elevation.run())
    await until(lambda: bench.caller.lent is not None)
    assert elevation.current
    assert 600 <= elevation.clock.now - CREATED < 660
    await cancel_and_wait(task)


async def test_what_is_counted(bench: Bench, lending: Lending) -> None:
    metrics = Metrics("agent")
    lending.elevation.register(metrics)
    lending.request()
    lending.request("alice-2")
    lending.request(withdrawn={"user": "alice"})
    page = metrics.render()[0].decode()
    for line in (
        "elevations 1.0",
        "elevations_total 2.0",
        'elevations_ended_total{reason="withdrawn"} 1.0',
        "elevated_streams_ended_total 0.0",
        "elevation_current 1.0",
        "elevation_requests_left_out_total 0.0",
    ):
        assert f"arcbridge_agent_{line}\n" in page
    assert metrics.read_failures == 0
