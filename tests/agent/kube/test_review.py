"""The API server decides --as; its answers are cached for 30 s, and without an answer it is never allowed
(docs/threats.md#H11).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from arcbridge.agent.kube.impersonation import Subject
from arcbridge.agent.kube.review import CACHE_TIME, MAX_PARTS, PATH, Part, Reviewer, parts_of
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.limiters import TokenBucket
from tests.support.clock import Clock
from tests.support.eventually import until
from tests.support.fake_apiserver import FakeApiServer, Held, closing, reply

from .bench import ALICE, caller_of, reachable

Made = tuple[FakeApiServer, Reviewer, Clock]


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Made]:
    async with reachable(tmp_path) as (fake, api):
        clock = Clock(100.0)
        yield fake, Reviewer(api, clock=clock), clock


async def approve(reviewer: Reviewer, target: Subject) -> None:
    await reviewer.approve(ALICE, target, caller_of(ALICE).account)


BOB = Subject("bob", "u", ("g",), (("example.com/a", "1"),))


def test_parts() -> None:
    assert parts_of(BOB) == [
        Part("", "users", "bob"),
        Part("", "groups", "g"),
        Part("authentication.k8s.io", "uids", "u"),
        Part("authentication.k8s.io", "userextras", "1", subresource="example.com/a"),
    ]
    assert parts_of(Subject("system:serviceaccount:ns:n")) == [Part("", "serviceaccounts", "n", "ns")]
    assert parts_of(Subject("system:serviceaccount:odd")) == [Part("", "users", "system:serviceaccount:odd")]


async def test_each_part_is_asked_for_as_the_caller(made: Made) -> None:
    fake, reviewer, _ = made
    await approve(reviewer, BOB)
    specs = [json.loads(request.body)["spec"] for request in fake.requests]
    assert len(specs) == 4
    assert all(spec["user"] == "alice" and spec["uid"] == "u-1" for spec in specs)
    assert all(spec["groups"] == ["dev", "ops", "system:authenticated"] for spec in specs)
    assert specs[0]["resourceAttributes"] == {"verb": "impersonate", "resource": "users", "name": "bob"}
    assert specs[3]["resourceAttributes"] == {
        "verb": "impersonate",
        "group": "authentication.k8s.io",
        "resource": "userextras",
        "subresource": "example.com/a",
        "name": "1",
    }
    assert fake.last.header("authorization") == [b"Bearer agent-own-token"]
    assert not any(b"mpersonate-" in request.head for request in fake.requests)


async def test_a_review_asks_for_the_groups_that_requests_carry(made: Made) -> None:
    fake, reviewer, _ = made
    reviewer._api.impersonable = frozenset({"ops"})
    await approve(reviewer, BOB)
    specs = [json.loads(request.body)["spec"] for request in fake.requests]
    assert all(spec["groups"] == ["ops", "system:authenticated"] for spec in specs)


async def test_one_denied_part_denies_all(made: Made) -> None:
    fake, reviewer, _ = made
    fake.allow_impersonation = {("alice", "users", "bob")}
    with pytest.raises(RequestRefusal) as caught:
        await approve(reviewer, BOB)
    assert caught.value.status_code == 403
    assert caught.value.message.startswith('groups "g" is forbidden: User "alice" cannot impersonate resource "groups"')


async def test_answers_are_kept_for_thirty_seconds(made: Made) -> None:
    fake, reviewer, clock = made
    target = Subject("bob")
    await approve(reviewer, target)
    fake.allow_impersonation = set()
    clock.now += CACHE_TIME - 1
    await approve(reviewer, target)
    assert len(fake.requests) == 1
    clock.now += 1
    with pytest.raises(RequestRefusal):
        await approve(reviewer, target)
    fake.allow_impersonation = None
    with pytest.raises(RequestRefusal):
        await approve(reviewer, target)
    assert len(fake.requests) == 2


@pytest.mark.parametrize("answer", [
    b"", b"garbage\r\n\r\n", reply(201, b"{}"), reply(201, b"[]"), reply(201, b'{"status":{}}'),
    reply(201, b'{"status":{"allowed":"true"}}'), reply(201, b'{"status":null}'),
    reply(200, b'{"status":{"allowed":true}}'), reply(403, b"{}"), reply(500, b"oops"),
], ids=range(10))  # fmt: skip
async def test_anything_but_a_yes_is_no(made: Made, answer: bytes) -> None:
    fake, reviewer, _ = made
    fake.routes[PATH] = closing(answer)
    with pytest.raises(RequestRefusal) as caught:
        await approve(reviewer, Subject("bob"))
    assert caught.value.status_code in (403, 503)


async def test_too_many_parts(made: Made) -> None:
    fake, reviewer, _ = made
    with pytest.raises(RequestRefusal) as caught:
        await approve(reviewer, Subject("bob", groups=tuple(f"g{n}" for n in range(MAX_PARTS))))
    assert caught.value.status_code == 400
    assert fake.requests == []


async def test_l32_a_review_counts_for_the_user_who_causes_it(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `--as` with ever new names makes connections and takes seats at the API server as fast as requests come."""
    fake, reviewer, _ = made
    account = caller_of(ALICE).account
    account.seats.most = 1
    fake.routes[PATH] = held = Held(reply(201, b'{"status":{"allowed":true}}'))
    first, second = (asyncio.create_task(reviewer.approve(ALICE, Subject(one), account)) for one in ("bob", "carl"))
    await until(lambda: fake.requests and account.seats._waiting)
    assert (account.connections, account.seats.held, fake.connections) == (1, 1, 1)
    monkeypatch.setattr("arcbridge.agent.kube.apiserver.SEAT_WAIT", 0.0)
    with pytest.raises(RequestRefusal) as caught:
        await reviewer.approve(ALICE, Subject("dora"), account)
    assert (caught.value.status_code, caught.value.limit) == (429, "apiserver_seats")
    first.cancel()
    await asyncio.wait([first])
    held.release.set()
    await second
    assert (account.connections, account.seats.held) == (0, 0)


async def test_l32_a_turn_that_comes_late_is_not_laid_to_the_api_server(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, reviewer, _ = made
    account = caller_of(ALICE).account
    account._connects = TokenBucket(0, 0.2)  # 5 s, of the 10 for which a request may wait
    monkeypatch.setattr("arcbridge.agent.kube.review.DEADLINE", 0.02)
    with pytest.raises(RequestRefusal, match=r"took longer than 0\.02 s") as caught:
        await reviewer.approve(ALICE, Subject("bob"), account)
    assert (caught.value.status_code, fake.requests) == (503, [])
    assert (account.connections, account.seats.held) == (0, 0)


async def test_h25_answers_hold_no_name_and_expire(made: Made) -> None:
    """A caller chooses names of 64 KiB, and the answers stayed until 4096 newer ones came."""
    _, reviewer, clock = made
    for number in range(20):
        await approve(reviewer, Subject(f"{number}" + "u" * 60_000))
    assert sum(map(len, reviewer._answers)) < 20 * 100
    clock.now += CACHE_TIME
    await approve(reviewer, BOB)
    assert len(reviewer._answers) == len(parts_of(BOB))
