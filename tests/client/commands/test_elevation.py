"""Asking, approving, denying and withdrawing, against an API server of a few lines that has the objects."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.elevation.grants import LAPSES
from arcbridge.client.commands import elevation as module
from arcbridge.client.commands.elevation import Elevations, choose, elevations_of, seconds_of
from arcbridge.client.service import ClientContext
from arcbridge.errors import ArcbridgeError, ConfigError, PermissionRefused, RemoteProtocolError, Unreachable
from tests.agent.elevation import documents
from tests.agent.elevation.documents import rule_document
from tests.client.commands.test_proxy import Case
from tests.client.far_side import FarSide

API = "/apis/access.arcbridge.io/v1alpha1"


def request_document(name: str, age: float = 60.0, **fields: Any) -> dict[str, Any]:
    return documents.request_document(name, created=time.time() - age, **fields)


class Api:
    """What is there; `protocol` is for `FarSide.protocol`."""

    def __init__(self) -> None:
        self.user, self.groups = "alice", ["dev"]
        self.rules = [rule_document()]
        self.requests: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.refusals: list[tuple[int, str]] = []
        """Statuses and messages of the next answers to what writes."""
        self.page = 0
        """Objects of one page; 0: all."""

    def protocol(self, target: str) -> asyncio.Protocol:
        assert target == "kubernetes"
        return Connection(self)

    def answer(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        path, _, text = target.partition("?")
        query = dict(urllib.parse.parse_qsl(text))
        self.asked.append((method, path, body))
        if path.endswith("/selfsubjectreviews"):
            return 201, {"status": {"userInfo": {"username": self.user, "groups": self.groups}}}
        if method != "GET" and self.refusals:
            code, message = self.refusals.pop(0)
            return code, {"message": message}
        if path == f"{API}/accessrules":
            return 200, {"metadata": {}, "items": self.rules}
        if method == "POST":
            name = body["metadata"]["generateName"] + "x7k2p"
            made = request_document(name, approved=())
            self.requests[name] = {**made, "spec": body["spec"], "status": {}}
            return 201, self.requests[name]
        if path == f"{API}/accessrequests":
            items, begin = list(self.requests.values()), int(query.get("continue", "0"))
            end = begin + min(self.page or len(items), int(query["limit"]))
            return 200, {"metadata": {"continue": str(end)} if end < len(items) else {}, "items": items[begin:end]}
        name = path.split("/")[5]
        if name not in self.requests:
            return 404, {"message": f'accessrequests.access.arcbridge.io "{name}" not found', "details": {"name": name}}
        if method == "PATCH":
            assert body["metadata"] == {"resourceVersion": "7"}
            self.requests[name]["status"] |= body["status"]
        return 200, self.requests[name]


class Connection(asyncio.Protocol):
    def __init__(self, api: Api) -> None:
        self._api = api
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.stream: Any = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not found or len(body) < (int(lengths[0].partition(b":")[2]) if lengths else 0):
            return
        self._received = b""
        method, target, _ = head.decode().split(" ", 2)
        code, document = self._api.answer(method, target, json.loads(body) if body else None)
        text = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.stream.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (code, len(text), text))


@pytest.fixture
def api(far: FarSide) -> Api:
    made = Api()
    far.protocol = made.protocol
    return made


@pytest.fixture
async def cluster(far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Elevations]:
    monkeypatch.setattr(module, "POLL", 0.001)
    async with elevations_of(ClientContext(Case(far, tmp_path).config, Case(far, tmp_path).terminal)) as made:
        yield made


async def test_a_user_asks_and_waits_until_the_cluster_lends(api: Api, cluster: Elevations) -> None:
    user, groups = await cluster.user()
    rule, wanted = choose(await cluster.rules(), user, groups)
    asked = await cluster.ask("oidc:Alice.B@example.org", rule, wanted, 1800, "INC-42")
    assert asked.name == "alice-b-x7k2p"
    spec = api.requests[asked.name]["spec"]
    assert spec == {
        "user": "oidc:Alice.B@example.org", "rule": "incident", "groups": ["operators"], "seconds": 1800,
        "reason": "INC-42",
    }  # fmt: skip
    waiting = asyncio.create_task(cluster.begun(asked.name, 1))
    while len(api.asked) < 6:
        await asyncio.sleep(0)
    assert not waiting.done()
    assert asked.state(0) == "waiting"
    api.requests[asked.name]["status"] = {"until": "2027-01-15T08:31:00Z", "from": "2027-01-15T08:01:00Z"}
    found = await waiting
    assert (found.until, found.state(found.until - 1), found.state(found.until)) == (1800001860.0, "active", "over")


@pytest.mark.parametrize("how", ["denied", "withdrawn"])
async def test_waiting_ends_where_the_request_does(how: str, api: Api, cluster: Elevations) -> None:
    api.requests["a"] = request_document("a", **{how: {"user": "bob", "reason": "not now\x1b[1m"}})
    with pytest.raises(PermissionRefused, match=f"was {how} by bob: not now") as caught:
        await cluster.begun("a", 1)
    assert "\x1b" not in caught.value.message
    with pytest.raises(ConfigError, match="nothing was done"):
        await cluster.withdraw("a")


async def test_what_has_lapsed_is_waited_for_and_approved_by_nobody(api: Api, cluster: Elevations) -> None:
    assert module.LAPSES == LAPSES
    api.requests["a"] = request_document("a", age=LAPSES, approved=())
    assert (await cluster.request("a")).state(time.time()) == "lapsed"
    with pytest.raises(PermissionRefused, match="has lapsed"):
        await cluster.begun("a", 1)
    api.user, api.groups = "bob", ["leads"]
    with pytest.raises(ConfigError, match="has lapsed"):
        await cluster.approve("a")


@pytest.mark.parametrize(("approved", "ends"), [((), False), ((("bob", "leads"),), True)])
async def test_waiting_ends_where_no_agent_begins_what_is_approved(
    approved: Any, ends: bool, api: Api, cluster: Elevations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGENTS", 0.0)
    api.requests["a"] = request_document("a", approved=approved)
    with pytest.raises(PermissionRefused if ends else TimeoutError, match="self-check" if ends else None):
        async with asyncio.timeout(10 if ends else 0.2):
            await cluster.begun("a", 1)


async def test_an_approval_is_by_a_group_of_the_rule_and_keeps_those_before(api: Api, cluster: Elevations) -> None:
    api.requests["a"] = request_document("a", approved=[("carol", "leads")])
    api.user, api.groups = "bob", ["dev", "leads"]
    api.refusals = [(409, "the object has been modified")]
    found = await cluster.approve("a")
    assert found.approved_by == ("carol", "bob")
    assert api.requests["a"]["status"]["approvals"][1] == {"user": "bob", "group": "leads"}
    assert [method for method, path, _ in api.asked if path.endswith("/a/status")] == ["PATCH"] * 2


async def test_who_may_not_approve_is_told_who_may(api: Api, cluster: Elevations) -> None:
    api.requests["a"] = request_document("a", approved=())
    with pytest.raises(PermissionRefused, match="no group that approves by the rule incident: leads"):
        await cluster.approve("a")
    api.groups = ["leads"]
    api.rules = [rule_document(approvers=())]
    with pytest.raises(ConfigError, match="needs no approval"):
        await cluster.approve("a")
    api.rules = []
    with pytest.raises(ConfigError, match="its rule 'incident' is gone"):
        await cluster.approve("a")


async def test_a_denial_and_a_withdrawal_are_ones_own(api: Api, cluster: Elevations) -> None:
    for name in "abc":
        api.requests[name] = request_document(name)
    assert (await cluster.deny("a", "no incident")).ended == "denied by alice: no incident"
    assert (await cluster.deny("b", "")).ended == "denied by alice"
    assert (await cluster.withdraw("c")).ended == "withdrawn by alice"


@pytest.mark.parametrize(
    ("code", "message", "error", "words"),
    [
        (403, "you may not", PermissionRefused, "you may not"),
        (422, "denied request: never for the writer's own request", PermissionRefused, "writer's own"),
        (404, "the server could not find the requested resource", PermissionRefused, "no elevation here"),
        (500, "broken", Unreachable, "code 500: broken"),
    ],
)
async def test_a_refusal_has_the_api_servers_words(
    code: int, message: str, error: type[ArcbridgeError], words: str, api: Api, cluster: Elevations
) -> None:
    api.requests["a"] = request_document("a")
    api.refusals = [(code, message)]
    with pytest.raises(error, match=words):
        await cluster.withdraw("a")


async def test_names_are_names(api: Api, cluster: Elevations) -> None:
    for name in ("../nodes", "a/b", "", "A", "a?b"):
        with pytest.raises(ConfigError, match="no name of a request"):
            await cluster.request(name)
    assert api.asked == []
    with pytest.raises(ConfigError, match="there is no request 'gone'"):
        await cluster.request("gone")


async def test_a_list_has_all_pages_the_newest_first(api: Api, cluster: Elevations) -> None:
    for number in range(7):
        api.requests[f"a{number}"] = document = request_document(f"a{number}")
        document["metadata"]["creationTimestamp"] = f"2026-11-29T12:00:0{number}Z"
    api.page = 3
    assert [one.name for one in await cluster.requests()] == [f"a{number}" for number in range(6, -1, -1)]


async def test_one_users_long_requests_do_not_hide_all(
    api: Api, cluster: Elevations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ANSWER", 4000)
    for number in range(30):
        api.requests[f"a{number}"] = document = request_document(f"a{number}")
        document["metadata"]["annotations"] = {"a": "x" * 1000}
    assert len(await cluster.requests()) == 30


async def test_answers_that_are_none_are_errors(api: Api, cluster: Elevations, monkeypatch: pytest.MonkeyPatch) -> None:
    api.requests["a"] = {"metadata": 7, "spec": [], "status": {"until": "soon", "approvals": 3, "denied": 1}}
    found = await cluster.request("a")
    assert (found.groups, found.until, found.approved_by, found.ended, found.seconds) == ((), 0.0, (), "", 0)
    monkeypatch.setattr(module, "MOST_ANSWER", 10)
    with pytest.raises(RemoteProtocolError, match="too long"):
        await cluster.requests()
    monkeypatch.setattr(Api, "answer", lambda *_: (201, {}))
    with pytest.raises(RemoteProtocolError):
        await cluster.user()


def test_the_rule_is_chosen_or_named() -> None:
    rules = [
        module._rule(one)
        for one in (
            rule_document("a", groups=["x"]),
            rule_document("b", groups=["x", "y"]),
            rule_document("c", groups=["z"], asking=(), users=("alice",)),
            rule_document("d", asking=("others",)),
        )
    ]

    def chosen(*wanted: str, name: str = "", groups: tuple[str, ...] = ("dev",)) -> tuple[str, tuple[str, ...]]:
        rule, found = choose(rules, "alice", groups, wanted=wanted, name=name)
        return rule.name, found

    assert chosen("y") == ("b", ("y",))
    assert chosen("z") == ("c", ("z",))
    assert chosen(groups=()) == ("c", ("z",))
    assert chosen("x", name="b") == ("b", ("x",))
    with pytest.raises(ConfigError, match="name one: a, b"):
        chosen("x")
    with pytest.raises(PermissionRefused, match="a: x; b: x, y; c: z"):
        chosen("operators")
    with pytest.raises(PermissionRefused, match="none names you"):
        choose(rules, "mallory", ())
    assert (seconds_of(rules[0], 0), seconds_of(rules[0], 60.0)) == (3600, 60)
    with pytest.raises(ConfigError, match="3600 s at most"):
        seconds_of(rules[0], 3601.0)
