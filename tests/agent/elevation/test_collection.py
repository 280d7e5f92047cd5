"""A collection of the API server, followed: list, watch, its ends, the API server's clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.elevation import collection
from arcbridge.agent.elevation.collection import ServerClock, WatchedCollection
from arcbridge.agent.elevation.objects import API
from arcbridge.tasks import cancel_and_wait
from tests.agent.kube.bench import reachable
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, FakeApiServer, reply

PATH = f"{API}/accessrules"


class Served:
    """The collection as the API server has it; `send` writes an event to the watch that runs."""

    def __init__(self, fake: FakeApiServer) -> None:
        self.items: list[dict[str, Any]] = [{"metadata": {"name": "a"}}]
        self.date = 1_800_000_000
        self.watches = 0
        self.status = 200
        self._exchange: Exchange | None = None
        self._over = asyncio.Event()
        fake.routes[PATH] = self

    async def __call__(self, exchange: Exchange) -> None:
        query = exchange.request.target.partition("?")[2]
        if "watch=1" not in query:
            body = {"metadata": {"resourceVersion": "5"}, "items": self.items}
            if "continue" not in query and len(self.items) > 1:
                body = {"metadata": {"resourceVersion": "5", "continue": "n=xt"}, "items": self.items[:1]}
            elif "continue" in query:
                assert "continue=n%3Dxt" in query
                body["items"] = self.items[1:]
            answer = body if self.status == 200 else {"message": "not today"}
            await exchange.send(reply(self.status, json.dumps(answer).encode()))
            return
        assert "resourceVersion=5" in query
        self.watches += 1
        self._over.clear()
        self._exchange = exchange
        date = formatdate(self.date, usegmt=True)
        await exchange.send(f"HTTP/1.1 200 OK\r\nDate: {date}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        await self._over.wait()
        await self.send_bytes(b"0\r\n\r\n", framed=True)

    async def send_bytes(self, data: bytes, *, framed: bool = False) -> None:
        assert self._exchange is not None
        await self._exchange.send(data if framed else b"%x\r\n%b\r\n" % (len(data), data))

    async def send(self, kind: str, document: dict[str, Any]) -> None:
        await self.send_bytes(json.dumps({"type": kind, "object": document}).encode() + b"\n")

    def end(self) -> None:
        self._over.set()

    def cut(self) -> None:
        assert self._exchange is not None
        self._exchange.reset()


class Followed:
    """What a collection gave."""

    def __init__(self) -> None:
        self.lists: list[list[str]] = []
        self.events: list[tuple[str, str]] = []
        self.began = 0
        self.clock = ServerClock()

    def reduced(self, found: list[str], page: Any) -> list[str]:
        return [*found, *(one["metadata"]["name"] for one in page if "over" not in one)]

    def listed(self, found: list[str]) -> None:
        self.lists.append(found)

    def changed(self, kind: str, document: Any) -> None:
        self.events.append((kind, document["metadata"]["name"]))

    def begin(self) -> None:
        self.began += 1


@asynccontextmanager
async def following(directory: Path) -> AsyncIterator[tuple[Served, Followed, WatchedCollection[str]]]:
    async with reachable(directory) as (fake, api):
        served, seen = Served(fake), Followed()
        one = WatchedCollection(api, seen.clock, "accessrules", seen.reduced, seen.listed, seen.changed, seen.begin)
        task = asyncio.get_running_loop().create_task(one.run())
        try:
            yield served, seen, one
        finally:
            await cancel_and_wait(task)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries nothing is waited for."""
    monkeypatch.setattr(collection, "PAUSE", 0.0)


async def test_it_lists_watches_and_lists_again(tmp_path: Path) -> None:
    async with following(tmp_path) as (served, seen, one):
        served.items.append({"metadata": {"name": "b"}})
        await until(lambda: one.current)
        assert (seen.lists, one.failure, seen.began) == ([["a", "b"]], "", 1)
        assert abs(seen.clock.now - served.date) < 60, "the API server's clock"
        await served.send("MODIFIED", {"metadata": {"name": "b"}})
        await served.send("BOOKMARK", {"metadata": {}})
        await served.send_bytes(b'{"type": "DELETED", "object": {"meta')
        await served.send_bytes(b'data": {"name": "a"}}}\n{"type": "ADDED", "object": {"metadata": {"name": "c"}}}\n')
        await until(lambda: len(seen.events) == 3)
        assert seen.events == [("MODIFIED", "b"), ("DELETED", "a"), ("ADDED", "c")]
        served.end()
        await until(lambda: served.watches == 2)
        assert len(seen.lists) == 2


@pytest.mark.parametrize("way", ["too old", "cut", "no event", "too long"])
async def test_whatever_ends_a_watch_it_is_listed_again(way: str, tmp_path: Path) -> None:
    async with following(tmp_path) as (served, seen, one):
        await until(lambda: one.current)
        if way == "too old":
            await served.send("ERROR", {"code": 410})
        elif way == "cut":
            served.cut()
        elif way == "no event":
            await served.send_bytes(b"[1]\n")
        else:
            await served.send_bytes(b"x" * (collection.MOST + 1))
        await until(lambda: served.watches == 2 and one.current)
        assert (len(seen.lists), seen.events) == (2, [])


@pytest.mark.parametrize(("status", "words"), [(404, "elevation.enabled"), (403, "not today"), (500, "code 500")])
async def test_what_cannot_be_listed_says_why_and_forgets_nothing(status: int, words: str, tmp_path: Path) -> None:
    async with following(tmp_path) as (served, seen, one):
        await until(lambda: one.current)
        served.status = status
        served.end()
        await until(lambda: words in one.failure)
        assert (one.current, seen.lists) == (False, [["a"]])
        served.status = 200
        await until(lambda: one.current)
        assert one.failure == ""


async def test_g4_a_list_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "MOST_LISTED", 0)
    async with following(tmp_path) as (served, seen, one):
        served.items.append({"metadata": {"name": "b"}})
        await until(lambda: "delete old ones" in one.failure)
        assert seen.lists == []


async def test_g4_what_is_over_has_no_bound_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests stay as a record: a cluster in which many have been made still lends, and still takes away."""
    monkeypatch.setattr(collection, "MOST_LISTED", 1)
    async with following(tmp_path) as (served, seen, one):
        served.items += [{"metadata": {"name": f"old-{n}"}, "over": True} for n in range(5)]
        await until(lambda: one.current)
        assert seen.lists == [["a"]]


async def test_an_api_server_that_is_away_is_no_end(tmp_path: Path) -> None:
    async with reachable(tmp_path) as (fake, api):
        fake.stop()
        seen = Followed()
        one = WatchedCollection(api, seen.clock, "accessrules", seen.reduced, seen.listed, seen.changed, seen.begin)
        task = asyncio.get_running_loop().create_task(one.run())
        await until(lambda: "cannot be reached" in one.failure)
        assert not task.done()
        await cancel_and_wait(task)


def test_g6_the_api_servers_clock_counts() -> None:
    """Whatever this machine's is, and however it is set meanwhile."""
    times = {"wall": 5000.0, "monotonic": 10.0}
    clock = ServerClock(lambda: times["wall"], lambda: times["monotonic"])
    assert clock.now == 5000.0
    clock.take(b"HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 01:18:20 GMT\r\n")
    assert (clock.now, clock.skew) == (4700.5, 299.5)
    times |= {"wall": 9999.0, "monotonic": 12.0}
    assert clock.now == 4702.5
    for head in (b"", b"Date: tomorrow\r\n", b"Date: \xff\r\n"):
        clock.take(head)
        assert clock.now == 4702.5
