"""Sends one input of an attacker through the agent to Go's server, and compares what each parser made of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field

from tests.support.net_http import GoRequest, NetHttp

from .readers import Message, h11_requests, h11_responses, httptools_requests
from .world import AGENT_TOKEN, Users

_REVIEW = b"/apis/authorization.k8s.io/v1/subjectaccessreviews"
_DROPPED = re.compile(
    rb"connection|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade|http2-settings|host|content-length|expect"
    rb"|authorization|impersonate-.*|x-remote-.*|x-forwarded.*|x-original-.*|forwarded|x-real-ip|x-client-ip|via"
    rb"|x-cluster-client-ip|x-envoy-external-address|true-client-ip|cf-connecting-ip|fastly-client-ip|audit-id"
)
"""What the agent takes out on purpose (docs/security.md); written here once more, not imported."""


@dataclass
class Requests:
    """The comparison, and how many inputs it has seen."""

    users: Users
    go: NetHttp
    tried: Counter[str] = field(default_factory=Counter)
    """Inputs by class."""
    passed: Counter[str] = field(default_factory=Counter)
    """Requests that reached Go's server, by class of the input."""
    _number: int = 0
    _failed: bool = False
    """The last input failed: what Go's server has seen of it was not asked for."""

    async def attack(self, kind: str, pieces: list[bytes]) -> None:
        """Try one input. Raises AssertionError where parsers differ, or a byte is where it must not be."""
        self.tried[kind] += 1
        self._number += 1
        data = b"".join(pieces)
        users, go = self.users, self.go
        if self._failed:
            go.seen()
        self._failed = True
        theirs = h11_requests(data)
        records = len(users.audit.kept)
        stream = await users.say(users.alice, pieces, until=len(theirs.messages))
        await self._another_user()
        if not stream.end:
            await users.leave(users.alice, stream)
        answered = bytes(stream.data)
        assert not users.failures, users.failures
        seen = [one for one in go.seen() if not (one.target == _REVIEW and b"impersonate-user" not in one.headers)]
        bob, alice = (
            [one for one in seen if one.headers.get(b"impersonate-user") == [name]] for name in (b"bob", b"alice")
        )
        assert len(bob) + len(alice) == len(seen), f"a request without its caller: {seen}"
        assert [one.target for one in bob] == [self._tag], f"requests as bob that bob did not send: {bob}"
        self.passed[kind] += len(alice)
        matched = self._match(alice, [*theirs.messages, *([theirs.partial] if theirs.partial else [])], theirs.refused)
        self._beside(data, matched)
        assert b"bob" not in answered
        self._answers(data, answered, stream.end, alice)
        assert len(users.audit.kept) - records >= len(alice), "a request without its record"
        self._failed = False

    @property
    def _tag(self) -> bytes:
        return b"/api/v1/namespaces/bob/pods/%d" % self._number

    async def _another_user(self) -> None:
        """The next request on the pooled connection, by another user: it has its own answer."""
        users = self.users
        asked = b"GET %b HTTP/1.1\r\nHost: k\r\nX-Tag: bob\r\n\r\n" % self._tag
        stream = await users.say(users.bob, [asked], until=1)
        (answer,) = h11_responses(bytes(stream.data), [b"GET"]).messages
        told = json.loads(answer.body)
        assert (answer.status, told["target"]) == (200, self._tag.decode())
        assert told["headers"]["Impersonate-User"] == ["bob"]
        assert told["headers"]["X-Tag"] == ["bob"]
        assert b"alice" not in bytes(stream.data), "bytes of one user at another"
        await users.leave(users.bob, stream)

    @staticmethod
    def _match(found: list[GoRequest], sent: list[Message], refused: str) -> list[tuple[int, GoRequest]]:
        """Each request at Go's server is one that the caller sent, in the caller's order; answer their positions."""
        matched = []
        at = 0
        for one in found:
            check_identity(one)
            differ = ""
            while at < len(sent) and (difference := _difference(one, sent[at])):
                # The agent, or Go's server, refused that one. Of requests with the same target the nearest is told.
                differ = difference if sent[at].target == one.target and not differ else differ
                at += 1
            assert at < len(sent), f"Go read a request that h11 does not ({differ or refused}): {one}"
            matched.append((at, one))
            at += 1
        return matched

    def _beside(self, data: bytes, matched: list[tuple[int, GoRequest]]) -> None:
        """What passed the agent, httptools and Go read alike from the caller's own bytes, where they read it at all."""
        if not matched:
            return
        direct = self.go.requests(data)
        llhttp = httptools_requests(data).messages
        for at, one in matched:
            if one.error:
                continue
            if at < len(direct) and not direct[at].error:
                other = direct[at]
                assert (one.method, one.target, one.body) == (other.method, other.target, other.body), "Go differs"
            if at < len(llhttp):
                third = llhttp[at]
                assert (one.method, one.target, one.body) == (third.method, third.target, third.body), "llhttp differs"

    @staticmethod
    def _answers(data: bytes, answered: bytes, end: str, found: list[GoRequest]) -> None:
        """The caller's bytes are whole answers, and those of Go's server are in the order of its requests."""
        sent = h11_requests(data)
        asked = [*sent.messages, *([sent.partial] if sent.partial else [])]
        methods = [message.method for message in asked]
        reading = h11_responses(answered, [*methods, b"GET"], ended=end == "fin")
        for number, message in enumerate(reading.messages):
            framed = message.values(b"content-length") or message.values(b"transfer-encoding")
            bodiless = message.status in (204, 304) or methods[number : number + 1] == [b"HEAD"]
            old = number < len(asked) and asked[number].version == b"1.0"
            assert framed or bodiless or old, f"an answer without an end: {answered[-300:]!r}"
        if end.startswith("reset") and reading.partial is not None:
            pass  # an answer that broke off
        else:
            assert reading.partial is None, f"an answer without an end ({end}): {answered[-300:]!r}"
        assert not reading.refused or "clos" in reading.refused.lower(), (
            f"h11 refuses the agent's answer: {reading.refused}"
        )
        # aiohttp tells of no request before one that it refuses in the same read: where that was a HEAD, the refusal,
        # which ends the connection, has a body.
        of_head = reading.rest.startswith(b'{"kind": "Status"') and end == "fin"
        assert not reading.rest or reading.refused or reading.partial or of_head, (
            f"more answers than requests: {reading.rest[:300]!r}"
        )
        told = []
        for message in reading.messages:
            if message.status == 200 and message.body.startswith(b'{"connection"'):
                told.append(json.loads(message.body)["target"])
        targets = iter(one.target.decode("latin-1") for one in found)
        for target in told:
            assert target in targets, "answers out of their order"
        assert len(reading.messages) <= len(methods) + 1


def check_identity(one: GoRequest) -> None:
    """The request carries the caller's identity, once, and the agent's own credential."""
    headers = one.headers
    assert headers.get(b"impersonate-user") == [b"alice"]
    assert headers.get(b"impersonate-uid") == [b"u-alice"]
    assert headers.get(b"impersonate-group") == [b"of-alice"]
    assert not [name for name in headers if name.startswith(b"impersonate-extra")]
    assert headers.get(b"authorization") == [b"Bearer " + AGENT_TOKEN.encode()]
    assert len(headers.get(b"audit-id", [])) == 1
    assert headers.get(b"connection", [b"close"]) in ([b"close"], [b"Upgrade"])
    assert one.host == b"" or one.host.startswith(b"127.0.0.1:")


def _difference(one: GoRequest, message: Message) -> str:
    """In what a request that Go's server read differs from one that the caller sent; empty: in nothing but what the
    agent takes out on purpose."""
    named = {
        token.strip().lower()
        for name in (b"connection", b"proxy-connection")
        for value in message.values(name)
        for token in value.split(b",")
    }
    passed: dict[bytes, list[bytes]] = {}
    for name, value in message.headers:
        if not _DROPPED.fullmatch(name) and name not in named:
            passed.setdefault(name, []).append(value)
    theirs = {name: values for name, values in one.headers.items() if not _DROPPED.fullmatch(name)}
    whole = message.body == one.body if not one.error else message.body.startswith(one.body) or one.error == "not read"
    same = {
        "method": one.method == message.method,
        "target": one.target == message.target,
        "headers": theirs == passed,
        "trailers": one.trailers == {},
        "body": whole,
    }
    return ", ".join(name for name, equal in same.items() if not equal)
