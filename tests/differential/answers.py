"""Gives one answer of a hostile API server to the agent, and compares what the caller got with what parsers read."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from dataclasses import dataclass, field

from tests.support.fake_apiserver import Exchange, FakeApiServer, Request, Route, reply
from tests.support.net_http import NetHttp

from .answer_inputs import EVIL, UPGRADE, Answer
from .readers import Message, Reading, h11_responses, httptools_response
from .world import RawStream, Users

_DROPPED = re.compile(rb"connection|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade|http2-settings")


@dataclass
class HostileApiServer(FakeApiServer):
    """Answers what an `Answer` says to requests for /attack, and to all others who asked for what."""

    answer: Answer | None = None
    late: dict[int, bytes] = field(default_factory=dict)
    """What it writes before the next answer, by the number of the connection."""
    written: asyncio.Event = field(default_factory=asyncio.Event)
    """All of the answer was written."""

    def _route(self, request: Request) -> Route:
        if request.target.startswith("/api/v1/namespaces/attack/"):
            return self._attack
        told = {"target": request.target, "user": request.header("impersonate-user")[0].decode()}
        late = self.late.pop(request.connection, b"")
        return late + reply(200, json.dumps(told).encode())

    async def _attack(self, exchange: Exchange) -> None:
        answer = self.answer
        assert answer is not None
        try:
            for piece in answer.pieces:
                exchange.writer.write(piece)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            self.late[exchange.request.connection] = answer.late
            if answer.end == "close":
                exchange.writer.close()
            elif answer.end == "reset":
                await exchange.writer.drain()
                exchange.reset()
        finally:  # the agent may have closed the connection meanwhile
            self.written.set()


@dataclass
class Answers:
    """The comparison, and how many inputs it has seen."""

    users: Users
    api: HostileApiServer
    go: NetHttp
    tried: Counter[str] = field(default_factory=Counter)
    """Inputs by class."""
    passed: Counter[str] = field(default_factory=Counter)
    """Answers that reached the caller whole, by class."""
    _number: int = 0

    async def attack(self, answer: Answer) -> None:
        """Try one input. Raises AssertionError where parsers differ, or a byte is where it must not be."""
        self.tried[answer.kind] += 1
        self._number += 1
        users, api = self.users, self.api
        api.answer = answer
        api.late.clear()
        api.written.clear()
        api.read_body = answer.method != "EARLY"
        method = {"UPGRADE": b"GET", "EARLY": b"POST"}.get(answer.method, answer.method.encode())
        theirs = h11_responses(answer.data, [method], ended=answer.end == "close", upgrade=answer.method == "UPGRADE")
        certain = bool(theirs.messages or theirs.refused) or answer.end != "keep"
        await self._echo()  # so that an idle connection is there to be used
        stream = await users.say(users.alice, [self._request(answer, method)], until=1 if certain else 0)
        await asyncio.wait_for(api.written.wait(), 10)
        await users.settled(users.alice, stream, 1 if certain else 0)
        await self._echo()
        got, end = bytes(stream.data), stream.end
        reading = h11_responses(got, [method], upgrade=answer.method == "UPGRADE")
        closes = any(b"close" in message.values(b"connection") for message in reading.messages)
        if not end and reading.messages and not reading.switched and not closes:
            await self._next(stream)
        if not stream.end:
            await users.leave(users.alice, stream)
        assert not users.failures, users.failures
        try:
            self._compare(answer, method, theirs, reading, got, end)
        except AssertionError as error:
            raise AssertionError(f"{error}: the caller got {got[-400:]!r} and {end or 'no end'}") from None

    @staticmethod
    def _request(answer: Answer, method: bytes) -> bytes:
        if answer.method == "UPGRADE":
            return b"GET /api/v1/namespaces/attack/pods/p/exec?command=id HTTP/1.1\r\nHost: k\r\n" + UPGRADE + b"\r\n"
        if answer.method == "EARLY":
            return b"POST /api/v1/namespaces/attack/pods HTTP/1.1\r\nHost: k\r\nContent-Length: 99999\r\n\r\nbegun"
        body = b"Content-Length: 0\r\n" if method == b"POST" else b""
        return method + b" /api/v1/namespaces/attack/pods HTTP/1.1\r\nHost: k\r\n" + body + b"\r\n"

    async def _echo(self) -> None:
        """Another user's request, on a connection of the pool: it has its own answer."""
        bob = self.users.bob
        self._number += 1
        asked = b"GET /api/v1/namespaces/bob/pods/%d HTTP/1.1\r\nHost: k\r\n\r\n" % self._number
        stream = await self.users.say(bob, [asked], until=1)
        data = bytes(stream.data)
        assert EVIL not in data, "bytes of one user at another"
        reading = h11_responses(data, [b"GET"])
        assert len(reading.messages) == 1, f"bob's answer is not whole: {data[:300]!r}, {stream.end}"
        own = json.dumps({"target": f"/api/v1/namespaces/bob/pods/{self._number}", "user": "bob"}).encode()
        assert reading.messages[0].body == own, f"bob got {data[:300]!r}"
        await self.users.leave(bob, stream)

    async def _next(self, stream: RawStream) -> None:
        """The next request of the same caller on the same stream: it has its own answer."""
        self._number += 1
        asked = b"GET /api/v1/namespaces/alice/pods/%d HTTP/1.1\r\nHost: k\r\n\r\n" % self._number
        begun = len(stream.data)
        assert stream.transport is not None
        stream.transport.write(asked)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + 10
        while not (reading := h11_responses(bytes(stream.data[begun:]), [b"GET"])).messages:
            assert loop.time() < give_up, f"no answer to the next request: {bytes(stream.data[begun:])!r}, {stream.end}"
            await asyncio.sleep(0.001)
        own = json.dumps({"target": f"/api/v1/namespaces/alice/pods/{self._number}", "user": "alice"}).encode()
        assert reading.messages[0].body == own, f"alice got {bytes(stream.data[begun:])[:300]!r}"

    def _compare(self, answer: Answer, method: bytes, theirs: Reading, reading: Reading, got: bytes, end: str) -> None:
        """The caller has the whole answer, or a refusal, or an answer that visibly broke off."""
        if reading.switched:
            assert answer.method == "UPGRADE"
            assert theirs.switched
            self.passed[answer.kind] += 1
            return
        # The beginning of a line that turned out to be wrong may have been passed on before the answer broke off.
        assert not reading.refused or end.startswith("reset"), f"h11 refuses what the caller got: {reading.refused}"
        assert reading.partial or not reading.rest, f"bytes behind the answer: {reading.rest[:200]!r}"
        if not reading.messages:
            assert end != "fin", "an answer without an end"
            if reading.partial is not None:
                self._prefix(reading.partial, theirs)
            if not end:
                assert not theirs.messages, "a whole answer was held back"
                assert answer.end == "keep", "an answer that broke off looks as if it went on"
            return
        (message,) = reading.messages
        if _is_refusal(message, method):
            assert EVIL not in got, "bytes of a refused answer"
            return
        self.passed[answer.kind] += 1
        assert theirs.messages, f"h11 sees no whole answer: {theirs.refused or 'incomplete'}"
        self._same(message, theirs.messages[0], method, "h11")
        go = self.go.response(answer.data, method.decode())
        if go.status and not go.error:
            assert (go.status, go.body) == (message.status, message.body), (
                "Go's client differs on the API server's bytes"
            )
        back = self.go.response(got, method.decode())
        assert (back.status, back.body, back.error) == (message.status, message.body, ""), "Go reads another answer"
        if method != b"HEAD":
            for data, whose in ((answer.data, "the API server's"), (got, "the agent's")):
                third = httptools_response(data)
                if third.messages:
                    first = third.messages[0]
                    same = (first.status, first.body) == (message.status, message.body)
                    assert same, f"httptools differs on {whose} bytes"
                assert third.messages or whose != "the agent's", "httptools sees no whole answer"

    @staticmethod
    def _same(message: Message, theirs: Message, method: bytes, whose: str) -> None:
        assert (message.status, message.body) == (theirs.status, theirs.body), f"{whose} reads another answer"
        named = {one.strip().lower() for value in theirs.values(b"connection") for one in value.split(b",")}
        expected = [
            (name, value)
            for name, value in theirs.headers
            if not _DROPPED.fullmatch(name) and (name not in named or name == b"content-length")
        ]
        found = [(name, value) for name, value in message.headers if not _DROPPED.fullmatch(name)]
        if b"server" not in dict(expected):
            found.remove((b"server", b"arcbridge"))
        assert found == expected, "headers differ"

    @staticmethod
    def _prefix(partial: Message, theirs: Reading) -> None:
        """What came of an answer that broke off is its beginning."""
        whole = theirs.messages[0] if theirs.messages else theirs.partial
        assert whole is not None
        assert partial.status == whole.status
        assert whole.body.startswith(partial.body), "the beginning of another body"


def _is_refusal(message: Message, method: bytes) -> bool:
    """Whether the agent refused; of the answer to a HEAD nothing but the code and the headers is there."""
    if method == b"HEAD":
        return message.status == 502 and message.values(b"server") == [b"arcbridge"]
    return message.status in (400, 502) and b'"message": "arcbridge: ' in message.body
