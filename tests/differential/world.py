"""Two users with sessions of their own at one agent, in one process, over TCP; before an API server that a test chose.

`Users.say` writes raw bytes on a stream of a user's and answers what came back, byte for byte, and how the stream
ended. Nothing here parses HTTP for the agent.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import uvloop
from hypothesis import Phase

from arcbridge.agent.accounts import Accounts
from arcbridge.agent.kube import server
from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.agent.kube.caller import Caller
from arcbridge.agent.kube.proxy import KubeProxy
from arcbridge.errors import StreamReset
from arcbridge.identity.claims import Identity
from arcbridge.mux.stream import StreamTransport
from arcbridge.settings.config import AgentLimitsConfig, KubernetesConfig
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.limits import Limits
from tests.support.cluster import Unavailable
from tests.support.net_http import NetHttp
from tests.support.processes import require_or_skip

from ..agent.kube.bench import CallersSession, Member, RecordedAudit, session_of

T = TypeVar("T")
GENERAL = "general path"
ENTRANCES = ("both entrances", GENERAL)
QUICK = (Phase.explicit, Phase.reuse, Phase.generate)
"""Without making a failure small: each try of one that waits in vain takes seconds."""

UNLIMITED = AgentLimitsConfig(
    requests_per_second=0, concurrent_requests=0, streams=0, upgraded_streams=0, bytes_per_second_to_cluster=0,
    bytes_per_second_to_user=0, bytes_per_day=0, apiserver_seats=0, connects_per_second=0, agent_connects_per_second=0,
)  # fmt: skip
"""One user sends thousands of requests here; limits have tests of their own."""
PATIENT = Limits(churn_burst=10**9, small_frame_burst=10**9)
AGENT_TOKEN = "agent-own-token"
PATIENCE = 10.0
"""Seconds for an answer that must come."""
GRACE = 8
"""Looks without progress, 5 ms apart and each behind turns of the loop, after which an answer that need not come is not
waited for any more. Not seconds: they pass also while this process does not run."""


class RawStream(asyncio.Protocol):
    """The caller's end of a stream: what came, and how it ended."""

    def __init__(self) -> None:
        self.transport: StreamTransport | None = None
        self.data = bytearray()
        self.end = ""
        """Empty while the stream is open; `fin`, or `reset NAME`."""
        self.changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, StreamTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert not self.end, "bytes behind the end"
        self.data += data
        self.changed.set()

    def eof_received(self) -> bool:
        self.end = "fin"
        self.changed.set()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, StreamReset):
            self.end = f"reset {ResetCode(exc.code).name}"
        elif not self.end:
            self.end = "fin" if exc is None else type(exc).__name__
        self.changed.set()


class User(CallersSession):
    """A user with a session."""

    def open(self) -> RawStream:
        """Open a stream."""
        stream = RawStream()
        self.client.open("kubernetes", stream)
        return stream

    @property
    def in_flight(self) -> int:
        """Requests that the agent has under way for the user."""
        return self.caller.account.in_flight

    @property
    def delivered(self) -> bool:
        """Whether each end has all that the other one wrote."""
        ours, theirs = self.client._machine, self.agents[0]._machine
        waits = ours.sender.has_output or theirs.sender.has_output
        arrived = ours.sender.sent == theirs.receiver.received and theirs.sender.sent == ours.receiver.received
        return arrived and not waits


@dataclass
class Users:
    """`alice`, who attacks, and `bob`, who must notice nothing."""

    proxy: KubeProxy
    api: ApiServer
    audit: RecordedAudit
    alice: User
    bob: User
    failures: list[str] = field(default_factory=list)
    """What the event loop's exception handler was told: the agent failed."""

    async def say(
        self, user: User, pieces: Sequence[bytes], *, stream: RawStream | None = None, until: int = 0
    ) -> RawStream:
        """Write pieces on a stream, each in a turn of its own; then wait until all of it was acted on.

        That is so when the stream has ended; else when `until` heads of final answers came, if that is not 0, and
        nothing is under way; else when nothing has moved for a while.
        """
        stream = stream or user.open()
        assert stream.transport is not None
        for number, piece in enumerate(pieces):
            if number:
                await self.turns()
            if stream.transport.is_closing():
                break
            stream.transport.write(piece)
        await self.settled(user, stream, until)
        return stream

    async def settled(self, user: User, stream: RawStream, until: int) -> None:
        """Wait as `say` does."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + PATIENCE
        before: object = None
        still = 0
        while loop.time() < give_up:
            await self.turns()
            enough = bool(stream.end) or final_heads(bytes(stream.data)) >= until
            if enough and user.delivered and user.in_flight == user.caller.account.upgrades:
                return
            now = (len(stream.data), user.client._machine.sender.sent, len(self.audit.kept), self.proxy.stats.requests)
            if now != before:
                before, still = now, 0
            elif still >= GRACE and (enough or not user.in_flight):
                return
            still += 1
            stream.changed.clear()
            try:
                async with asyncio.timeout(0.005):
                    await stream.changed.wait()
            except TimeoutError:
                pass
        raise AssertionError(f"no end of it within {PATIENCE:g} s: {bytes(stream.data[-500:])!r}")

    @staticmethod
    async def turns(count: int = 8) -> None:
        """Let the loop turn: what is there is read, and what it causes begins."""
        for _ in range(count):
            await asyncio.sleep(0)

    async def leave(self, user: User, stream: RawStream) -> None:
        """End a stream, and what is under way on it."""
        assert stream.transport is not None
        stream.transport.abort(ResetCode.CANCELLED)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + PATIENCE
        while user.in_flight or not user.delivered:
            assert loop.time() < give_up, "a request goes on without its caller"
            await asyncio.sleep(0.001)


_HEAD = re.compile(rb"(?:\A|[\n}])HTTP/1\.1 (?:[2-9]|101)")


def final_heads(data: bytes) -> int:
    """Return how many answers that are not interim have begun in `data`, at least; 101 is none of the interim ones."""
    return len(_HEAD.findall(data))


@asynccontextmanager
async def two_users(port: int, ca_file: Path, directory: Path) -> AsyncIterator[Users]:
    """An agent before the API server at a port of loopback, and both users' sessions."""
    token_file = directory / "agent-token"
    token_file.write_text(AGENT_TOKEN + "\n")
    settings = KubernetesConfig(server=f"https://127.0.0.1:{port}", ca_file=ca_file, token_file=token_file)
    api = ApiServer(endpoint_of(settings, {}))
    audit = RecordedAudit()
    proxy = KubeProxy(api, audit)
    accounts = Accounts(UNLIMITED)
    failures: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, told: failures.append(f"{told['message']}: {told.get('exception')!r}")
    )
    users = []
    stack = AsyncExitStack()
    for name in ("alice", "bob"):
        identity = Identity(name, f"u-{name}", (f"of-{name}",), f"https://issuer#{name}", "https://issuer", 4e9)
        caller = Caller(f"session-of-{name}", identity, accounts.enter(identity, Member()))
        made = await stack.enter_async_context(session_of(proxy, caller, PATIENT))
        users.append(User(made.caller, made.client, made.agents))
    lingering, server.LINGER = server.LINGER, 0.05  # many announce a body that never comes
    try:
        yield Users(proxy, api, audit, *users, failures=failures)
    finally:
        server.LINGER = lingering
        await stack.aclose()
        await proxy.close()
        await api.close()
        await asyncio.sleep(0.01)


@contextmanager
def entered(runner: asyncio.Runner, block: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """An asynchronous block around what a test does in a loop of its own."""
    value = runner.run(block.__aenter__())
    try:
        yield value
    finally:
        runner.run(block.__aexit__(None, None, None))


@contextmanager
def reading_beside(entrances: str, directory: Path) -> Iterator[tuple[asyncio.Runner, NetHttp]]:
    """A loop in which the agent is attacked through one of ENTRANCES, and Go's parsers beside it."""
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if entrances == GENERAL:
            patch.setattr("arcbridge.agent.kube.fast_path.plain_head", lambda *_: None)
        try:
            go = NetHttp(directory)
        except Unavailable as error:
            require_or_skip("nethttp", str(error))
        with go:
            yield runner, go
