"""Lists and watches: pages, what ends a watch, and answers that are too long or none."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.serving.pod_ports import collection as module
from arcbridge.client.serving.pod_ports.collection import EVENT_LIMIT, Collection, refusal
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.errors import ArcbridgeError, PermissionRefused, RemoteProtocolError, Unreachable
from arcbridge.tasks import cancel_and_wait
from arcbridge.untrusted_json import read_json_object
from tests.client.far_side import FarSide
from tests.client.serving.pod_ports.api import Api, ready
from tests.client.session.test_session_manager import make, running
from tests.support.eventually import until

PATH = "/api/v1/namespaces/shop/pods"


class Seen:
    """What a collection reports."""

    def __init__(self) -> None:
        self.lists: list[tuple[list[str], bool]] = []
        self.events: list[tuple[str, str]] = []
        self.errors: list[ArcbridgeError] = []

    def listed(self, objects: list[Any], more: bool) -> None:
        self.lists.append(([one["metadata"]["name"] for one in objects], more))

    def changed(self, kind: str, document: Any) -> None:
        self.events.append((kind, document["metadata"]["name"]))


@pytest.fixture
async def session(far: FarSide, tmp_path: Path) -> AsyncIterator[SessionManager]:
    async with running(make(far, tmp_path)) as session:
        yield session


async def following(session: SessionManager, seen: Seen, most: int, enough: Callable[[], object]) -> None:
    """Follow until it is `enough`."""
    collection = Collection(session, PATH, {}, seen.listed, seen.changed, seen.errors.append, most=most)
    task = asyncio.create_task(collection.run())
    try:
        await until(lambda: enough() or task.done())
        assert not task.done(), task.result()
    finally:
        await cancel_and_wait(task)


async def test_pages_up_to_a_number_then_events_then_anew(
    far: FarSide, session: SessionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    api, seen = Api(), Seen()
    far.protocol = api.protocol
    for number in range(8):
        api.put("pods", ready(f"web-{number}"))
    names = [f"web-{number}" for number in range(8)]

    steps = [api.end_watches, lambda: api.remove("pods", "web-9"), lambda: api.put("pods", ready("web-9"))]

    def more() -> bool:
        if api.watches and len(seen.events) == 3 - len(steps):
            steps.pop()()
        return len(seen.lists) == 2

    await following(session, seen, 100, more)
    assert seen.lists == [(names, False)] * 2
    assert seen.events == [("ADDED", "web-9"), ("DELETED", "web-9")]
    assert seen.errors == []
    cut = Seen()
    await following(session, cut, 5, lambda: cut.lists)
    assert cut.lists == [(names[:5], True)]


class Raw(asyncio.Protocol):
    """Answers each request with given bytes."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.stream: Any = transport

    def data_received(self, data: bytes) -> None:
        self.stream.write(self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])


def body(text: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(text), text)


EMPTY = body(b'{"metadata":{"resourceVersion":"1"},"items":[]}')


@pytest.mark.parametrize(
    ("answers", "kind", "said"),
    [
        ([b"SSH-2.0\r\n\r\n"], RemoteProtocolError, "does not speak HTTP"),
        ([body(b"[]")], RemoteProtocolError, "is no list"),
        ([body(b'{"items":[],"metadata":7}')], RemoteProtocolError, "is no list"),
        ([body(b"x" * 2000)], RemoteProtocolError, "more than 1000 bytes"),
        ([body(b'{"message":"no pods for you"}', b"403 Forbidden")], PermissionRefused, "no pods for you"),
        ([body(b"", b"500 Oh")], Unreachable, "answered with status 500"),
        ([EMPTY, body(b'{"message":"no watch"}', b"403 Forbidden")], PermissionRefused, "no watch"),
        ([EMPTY, body(b"[]\n")], RemoteProtocolError, "is too long, or is none"),
        ([EMPTY, body(b"not JSON\n")], RemoteProtocolError, "is too long, or is none"),
    ],
)
async def test_what_is_no_answer(
    far: FarSide,
    session: SessionManager,
    answers: list[bytes],
    kind: type[ArcbridgeError],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bound in ("PAGE_LIMIT", "EVENT_LIMIT"):
        monkeypatch.setattr(module, bound, 1000)
    seen = Seen()
    far.protocol = lambda target: Raw(list(answers))
    await following(session, seen, 10, lambda: seen.errors)
    assert isinstance(seen.errors[0], kind)
    assert said in seen.errors[0].message


async def test_d6_a_list_without_an_end_is_cut_off(far: FarSide, session: SessionManager) -> None:
    seen = Seen()
    page = body(b'{"metadata":{"resourceVersion":"1","continue":"on"},"items":[]}')
    far.protocol = lambda target: Raw([page])
    await following(session, seen, 10, lambda: seen.errors)
    assert "more than 5000 objects" in seen.errors[0].message


async def test_d6_a_page_is_as_small_as_its_objects_are_large(
    far: FarSide, session: SessionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process stands still while a page is read: what is read at once does not grow with what is there."""
    monkeypatch.setattr(module, "PAGE", 8)
    monkeypatch.setattr(module, "PAGE_LIMIT", 8000)
    api, sizes = Api(), list[int]()
    far.protocol = api.protocol

    def read(data: bytearray, limit: int) -> dict[str, Any]:
        sizes.append(len(data))
        return read_json_object(data, limit)

    monkeypatch.setattr(module, "read_json_object", read)
    for count, size in ((20, 10), (20, 1500), (5, 20_000)):
        seen = Seen()
        for number in range(20):
            pod = ready(f"web-{number}")
            api.put("pods", {**pod, "metadata": {**pod["metadata"], "annotations": {"x": "y" * size}}})
        await following(session, seen, count, lambda seen=seen: seen.lists)
        assert seen.lists == [([f"web-{number}" for number in range(count)], count < 20)]
        assert max(sizes) < (8000 if size < 8000 else 24_000), "several objects, or one"
        sizes.clear()


async def test_behind_large_objects_pages_grow_again(
    far: FarSide, session: SessionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One large object at the beginning does not make a page of each of those behind it."""
    monkeypatch.setattr(module, "PAGE", 8)
    monkeypatch.setattr(module, "PAGE_LIMIT", 8000)
    api, seen, pages = Api(), Seen(), list[int]()
    far.protocol = api.protocol

    def read(data: bytearray, limit: int) -> dict[str, Any]:
        document = read_json_object(data, limit)
        pages.append(len(document["items"]))
        return document

    monkeypatch.setattr(module, "read_json_object", read)
    for number in range(40):
        pod = ready(f"web-{number:02}")
        api.put("pods", {**pod, "metadata": {**pod["metadata"], "annotations": {"x": "y" * (20_000 * (not number))}}})
    await following(session, seen, 100, lambda: seen.lists)
    assert seen.lists == [([f"web-{number:02}" for number in range(40)], False)]
    assert pages[:2] == [1, 1], "the large one, and one more before it is known that they are small again"
    assert max(pages) == 8
    assert len(pages) <= 9


async def test_d6_of_a_list_one_page_is_held(far: FarSide, session: SessionManager) -> None:
    seen, read = Seen(), 0
    text = b'{"metadata":{"resourceVersion":"1","continue":"%%b"},"items":[{"metadata":{"name":"a","x":"%b"}}]}'
    page = text % (b"x" * (2 << 20))

    def name(document: Any) -> Any:
        nonlocal read
        read += 1
        return {"metadata": {"name": document["metadata"]["name"]}}

    far.protocol = lambda target: Raw([body(page % b"on")] * 9 + [body(page % b"")])
    collection = Collection(session, PATH, {}, seen.listed, seen.changed, seen.errors.append, read=name, most=100)
    tracemalloc.start()
    task = asyncio.create_task(collection.run())
    try:
        await until(lambda: read == 3)
        before = tracemalloc.get_traced_memory()[0]
        await until(lambda: seen.lists)
        assert tracemalloc.get_traced_memory()[0] < before + (8 << 20)
    finally:
        tracemalloc.stop()
        await cancel_and_wait(task)
    assert seen.lists == [(["a"] * 10, False)]


async def test_what_has_happened_since_is_forgotten(far: FarSide, session: SessionManager) -> None:
    seen = Seen()
    far.protocol = lambda target: Raw([EMPTY, body(b'{"type":"ERROR","object":{"code":410}}\n'), EMPTY])
    await following(session, seen, 10, lambda: len(seen.lists) > 1)
    assert seen.errors == []


async def test_d6_an_event_without_an_end_is_cut_off(far: FarSide, session: SessionManager) -> None:
    """The longest line that is kept is a bound, however much comes."""

    class Endless(Raw):
        def data_received(self, data: bytes) -> None:
            if b"watch=1" not in data:
                self.stream.write(EMPTY)
                return
            self.stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 40))
            self._pour()

        def _pour(self) -> None:
            if not self.stream.is_closing():
                if self.stream.get_write_buffer_size() < 1 << 20:
                    self.stream.write(bytes(1 << 18))
                asyncio.get_running_loop().call_later(0.001, self._pour)

    seen = Seen()
    far.protocol = lambda target: Endless([])
    tracemalloc.start()
    try:
        await following(session, seen, 10, lambda: seen.errors)
        assert tracemalloc.get_traced_memory()[1] < 8 * EVENT_LIMIT
    finally:
        tracemalloc.stop()
    assert "is too long" in seen.errors[0].message


def test_a_refusal_has_the_words_of_the_api_server_and_a_bound() -> None:
    assert refusal(403, b'{"message":"x"}', "y").message == "x"
    assert refusal(404, b"<html>", "y").message == "y: the API server answered with status 404"
    assert len(refusal(404, b'{"message":"%b"}' % (b"x" * 100_000), "y").message) <= 1000
