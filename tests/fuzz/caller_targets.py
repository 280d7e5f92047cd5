"""Targets for what a caller of the agent sends: heads, bodies that are inspected, and texts that reach the audit.

They keep the rules of `tests.fuzz.targets`.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

from aiohttp import web

from arcbridge.agent.accounts import Account, Accounts
from arcbridge.agent.audit import record
from arcbridge.agent.kube import command_line, request_target
from arcbridge.agent.kube.caller import StreamContext
from arcbridge.agent.kube.channel_splice import FrameEnds
from arcbridge.agent.kube.fast_path_parser import MAX_PLAIN_HEAD, KnownLines, plain_head
from arcbridge.agent.kube.pod_body import pod_details
from arcbridge.agent.kube.port_forward import MAX_PORTS, ForwardedPorts
from arcbridge.agent.kube.request_info import request_info
from arcbridge.agent.kube.server import AnsweredResponse, KubeProtocol, KubeServer
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.recording.channels import ChannelReader, Unreadable
from arcbridge.identity.claims import Identity
from arcbridge.mux.stream import StreamTransport
from arcbridge.observe import untrusted_text

Outcome = tuple[str, str, tuple[tuple[bytes, bytes], ...]]
_LOOP = asyncio.new_event_loop()
_ALICE = Identity("alice", "", (), "issuer#alice", "issuer", math.inf)


# -- heads ------------------------------------------------------------------------------------------------------------


class _Stream(StreamTransport):
    """A caller's stream that takes whatever is written to it."""

    def __init__(self) -> None:
        self.over = False

    @property
    def owed(self) -> bool:
        return False

    @owed.setter
    def owed(self, owed: bool) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.over

    def close(self) -> None:
        self.over = True

    def abort(self, code: Any = None) -> None:
        self.over = True

    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def __repr__(self) -> str:
        return "_Stream()"


class _Server(KubeServer):
    """Keeps what it refuses, and gives no caller a deadline."""

    def __init__(self, handle: Any, found: list[Outcome]) -> None:
        super().__init__(handle, cast(Any, None))
        self._found = found

    def refuse(self, stream: StreamContext, refusal: RequestRefusal) -> None:
        self._found.append(("", str(refusal.status_code), ()))


async def _outcomes(data: bytes, size: int) -> list[Outcome]:
    """Return what the general entrance makes of bytes that arrive in pieces of `size`: requests, and one refusal."""
    found: list[Outcome] = []

    async def handle(protocol: KubeProtocol, request: web.BaseRequest) -> web.StreamResponse:
        found.append((request.method, request.path_qs, tuple(request.raw_headers)))
        return AnsweredResponse(keep_alive=False)

    server = _Server(handle, found)
    context: Any = SimpleNamespace(
        caller=SimpleNamespace(account=Account(Accounts(), _ALICE), connected_since=-math.inf)
    )
    await feed(KubeProtocol(server, context, asyncio.get_running_loop()), data, size)
    return found


async def feed(protocol: web.RequestHandler, data: bytes, size: int, check: Callable[[], None] = lambda: None) -> None:
    """Give a server's connection bytes in pieces of `size` until it ends; `check` is called behind each piece."""
    stream = _Stream()
    protocol.connection_made(stream)
    try:
        for at in range(0, len(data), size):
            if stream.over:
                break
            protocol.data_received(data[at : at + size])
            check()
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
    finally:
        protocol.connection_lost(None)
        await asyncio.sleep(0)


def read_head(data: bytes, size: int = 16 * 1024) -> list[Outcome]:
    """Read a stream as the general entrance does, in the pieces in which a session hands it over."""
    return _LOOP.run_until_complete(_outcomes(data, size))


def head(data: bytes) -> None:
    """A head is a request or a refusal; the first request does not depend on the segments, nor on the entrance."""
    whole = _LOOP.run_until_complete(_outcomes(data, len(data) or 1))
    cut = _LOOP.run_until_complete(_outcomes(data, max(1, len(data) // 40)))
    if whole and whole[0][0]:
        assert cut, "a request that small segments lose"
        assert cut[0] == whole[0], "a request that depends on the segments"
    plain = plain_head(data, KnownLines()) if len(data) <= MAX_PLAIN_HEAD else None
    if plain is not None:
        assert whole, "the general entrance knows no plain request"
        assert whole[0][:2] == ("GET", plain.target), "two entrances read two requests"


def _line(details: Mapping[str, record.Value]) -> str:
    """Return the line of the audit log that says what a request asks for."""
    return record.AuditRecord("request", record.AuditSubject("session"), details=details).details_line()


# -- bodies -----------------------------------------------------------------------------------------------------------

_TYPES = (
    "application/json", "application/json-patch+json", "application/apply-patch+yaml",
    "application/vnd.kubernetes.protobuf", "application/strategic-merge-patch+json",
)  # fmt: skip


def split_type(data: bytes) -> tuple[str, bytes]:
    """Return a content type and a body: the input's first byte chooses the type."""
    return (_TYPES[data[0] % len(_TYPES)], data[1:]) if data else ("", b"")


def read_pod_body(data: bytes) -> Any:
    """Look at a body as the agent does for the audit."""
    content_type, body = split_type(data)
    return pod_details(body, content_type, commands=True)


def pod_body(data: bytes) -> None:
    """What a body asks for is what a record holds, in a bounded line of valid JSON, and privileges are not missed."""
    content_type, body = split_type(data)
    details = pod_details(body, content_type, commands=True)
    line = _line(details)
    assert isinstance(json.loads(line), dict)
    assert len(line) <= 16 * 1024 + 512 * len(details), "a line that grows with the body"
    assert "command" not in pod_details(body, content_type, commands=False)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return
    spec = document.get("spec") if isinstance(document, dict) else None
    if isinstance(spec, dict) and spec.get("hostNetwork") is True and content_type != _TYPES[1]:
        assert "hostNetwork" in str(details.get("privileged", "")) or len(details.get("privileged", ())) > 50


# -- texts ------------------------------------------------------------------------------------------------------------


def read_audit_text(data: bytes) -> None:
    """Write a target and what it asks for as a record does."""
    text = data.decode("utf-8", "replace")
    untrusted_text.clean(text)
    for method, upgrade in (("GET", True), ("DELETE", False)):
        try:
            wanted = request_target.request_target(method, "/" + data.decode("latin-1"), upgrade)
        except RequestRefusal:
            wanted = None
        if wanted is not None and wanted.detailed:
            _line(request_target.query_details(wanted.info, "/" + data.decode("latin-1"), commands=True) or {})
    command_line.recorded_command(text.split("\n", 1000))


def audit_text(data: bytes) -> None:
    """Texts leave on one line, bounded, without control characters, and alike when they are cleaned again."""
    text = data.decode("utf-8", "replace")
    for limit in (64, untrusted_text.FIELD_LIMIT):
        clean = untrusted_text.clean(text, limit)
        assert len(clean.encode()) <= max(limit, 23)
        assert not any(ord(one) < 32 or 0x7F <= ord(one) < 0xA0 for one in clean), "a control character"
        assert "\u202e" not in clean
    untrusted_text.clean_trace(text)
    words = text.split("\n")
    fields = command_line.recorded_command(words)
    assert json.loads(_line(fields))["command"] is not None
    escaped = [untrusted_text.escape(word) for word in words]
    assert fields["command"] == escaped or {"more", "sha256"} <= fields.keys(), "something is left out in silence"
    target = "/api/v1/namespaces/a/pods/b/exec?" + data.decode("latin-1")
    details = request_target.query_details(request_info("GET", target, upgrade=True), target, commands=True)
    if details is not None:
        json.loads(_line(details))
    read_audit_text(data)


# -- what passes behind an upgrade ------------------------------------------------------------------------------------


def _forwarded(data: bytes, size: int) -> ForwardedPorts:
    """Read the ports of a stream in pieces; the first bit says which of the two protocols it is."""
    ports = ForwardedPorts(bool(data[:1] < b"\x80"), lambda: None)
    for at in range(0, len(data), size):
        ports.feed(memoryview(data)[at : at + size])
    return ports


def read_port_forward(data: bytes) -> None:
    """Read the ports as the bytes of a large read pass."""
    _forwarded(data, 256 * 1024)


def port_forward(data: bytes) -> None:
    """The ports do not depend on how the bytes were cut, and no defect of the reader shows."""
    whole = _forwarded(data, len(data) or 1)
    for size in (1, 7):
        part = _forwarded(data, size)
        assert part.ports == whole.ports or part.unread or whole.unread
        assert not part.unread.startswith("the reader failed")
    assert len(whole.ports) <= MAX_PORTS


def _channels(data: bytes, size: int) -> tuple[list[tuple[int, bytes]], str]:
    """Read the messages of a recorded session in pieces; the first bit says from which side they come."""
    found: list[tuple[int, bytes]] = []

    def took(channel: int, part: bytes) -> None:
        if found and found[-1][0] == channel:
            part = found.pop()[1] + part
        found.append((channel, part))

    reader = ChannelReader(took, from_caller=bool(data[:1] < b"\x80"))
    try:
        for at in range(1, len(data), size):
            reader.feed(memoryview(data)[at : at + size])
    except Unreadable as error:
        return found, str(error)
    return found, ""


def read_recorded_channels(data: bytes) -> None:
    """Read the messages as the bytes of a large read pass."""
    FrameEnds().feed(memoryview(data))
    reader = ChannelReader(lambda channel, part: None, from_caller=bool(data[:1] < b"\x80"))
    try:
        reader.feed(memoryview(data)[1:])
    except Unreadable:
        pass


def recorded_channels(data: bytes) -> None:
    """What is read does not depend on how the bytes were cut."""
    whole, ends = _channels(data, len(data) or 1), FrameEnds()
    ends.feed(memoryview(data))
    for size in (1, 7):
        assert _channels(data, size) == whole
        pieces = FrameEnds()
        for at in range(0, len(data), size):
            pieces.feed(memoryview(data)[at : at + size])
        assert pieces.whole == ends.whole
