"""docs/threats.md#J17: a client waits at one worker, its agent comes out at another; and either dies at each step."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from arcbridge.errors import ArcbridgeError, ConnectionLost, JoinRefused
from arcbridge.net.join import JoinCode, client_join
from arcbridge.net.sockets import receive, send_all
from arcbridge.relay.pending_dials import ClaimedJoin
from arcbridge.relay.siblings import handover as module
from arcbridge.relay.siblings.channel import Channel, ChannelClosed, Head
from arcbridge.relay.siblings.group import Siblings
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.wire.records import Dial, JoinReply, JoinRequest, Status
from tests.net.ends import RELAY, client_context
from tests.relay.siblings.test_group import joined
from tests.relay.station import Agent, Station, asking, exactly, refused
from tests.support.eventually import until


@dataclass
class Two:
    """Two workers in one process; agents have their control connection at `owner` and come out at `sender`."""

    owner: Station
    sender: Station
    tasks: list[asyncio.Task[object]] = field(default_factory=list)

    async def join_at_sender(self, agent: Agent, dial: Dial) -> None:
        agent.session.send(Status(token=dial.token))
        await self.agent_join(agent, dial.token)

    async def agent_join(self, agent: Agent, token: str, cluster: str = "prod") -> None:
        sock = await self.sender.dial()
        agent.sockets.append(sock)
        await client_join(sock, client_context(cluster=cluster), RELAY, JoinRequest(role="agent", token=token))

    @property
    def outcomes(self) -> dict[str, int]:
        return self.sender.detour.outcomes

    def handing(self) -> int:
        assert self.sender.detour is not None
        assert self.owner.detour is not None
        return len(self.sender.detour) + len(self.owner.detour)


@contextlib.asynccontextmanager
async def two(directory: Path, dial_deadline: float = 10.0) -> AsyncIterator[Two]:
    stations = [Station(directory, RelayLimitsConfig(), dial_deadline, 5.0) for _ in range(2)]
    for one in stations:
        one.siblings = Siblings()
        await one.open()
    owner, sender = stations
    await owner.enrol("prod")
    await owner.enrol("other")
    joined(owner.siblings, sender.siblings)
    await owner.siblings.synced(1, 5)
    await sender.siblings.synced(1, 5)
    try:
        yield Two(owner, sender)
    finally:
        for one in stations:
            await one.close()
            await one.fleet.close()
            one.siblings.close()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Two]:
    async with two(tmp_path) as made:
        yield made


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_the_agent_comes_out_at_another_worker(pair: Two) -> None:
    async with Agent(pair.owner, on_dial=pair.join_at_sender) as agent:
        client, reply = await pair.owner.join()
        with client:
            assert reply.code == 0
            far = agent.sockets[0]
            await send_all(client, b"up")
            assert await exactly(far, 2) == b"up"
            await send_all(far, b"down")
            assert await exactly(client, 4) == b"down"
            client.shutdown(socket.SHUT_WR)
            assert await receive(far, 1) == b""
        assert len(pair.owner.pumps) == 1
        assert len(pair.sender.pumps) == 0
        await until(lambda: pair.outcomes["joined"] == 1)
        assert pair.handing() == 0


async def test_what_came_behind_close_notify_travels_along(pair: Two) -> None:
    """docs/threats.md#J5: only the sender ever holds it."""
    text = os.urandom(20_000)

    async def with_left_over(agent: Agent, dial: Dial) -> None:
        agent.session.send(Status(token=dial.token))
        sock = await pair.sender.dial()
        agent.sockets.append(sock)
        pipe = await asking(sock, JoinRequest(role="agent", token=dial.token), "prod")
        while await pipe.read():
            pass
        pipe.feed_close_notify()
        await send_all(sock, pipe._outgoing.read() + text)

    async with Agent(pair.owner, on_dial=with_left_over):
        client, _ = await pair.owner.join()
        with client:
            assert await exactly(client, len(text)) == text


async def test_the_host_judges(pair: Two) -> None:
    """docs/threats.md#J1, #J2: a token is used once, whichever sender; a foreign cluster's agent changes nothing."""
    seen: list[BaseException] = []

    async def several(agent: Agent, dial: Dial) -> None:
        for cluster in ("other", "prod", "prod"):
            try:
                await pair.agent_join(agent, dial.token, cluster)
            except ArcbridgeError as error:
                seen.append(error)
        agent.session.send(Status(token=dial.token))

    async with Agent(pair.owner, on_dial=several) as agent:
        client, _ = await pair.owner.join()
        with client:
            await until(lambda: len(seen) == 2)
            assert [error.code for error in seen if isinstance(error, JoinRefused)] == [JoinCode.GONE] * 2
            await send_all(client, b"still")
            assert await exactly(agent.sockets[1], 5) == b"still"
    await until(lambda: pair.outcomes == {"joined": 1, "void": 2, "failed": 0})


async def test_a_token_of_a_worker_that_is_gone_is_void(pair: Two) -> None:
    async with Agent(pair.owner) as agent:
        assert (await refused(pair.agent_join(agent, "0" * 16 + ".secret"))).code == JoinCode.GONE


async def test_a_client_that_leaves_meanwhile(pair: Two) -> None:
    """docs/threats.md#J3: no connection is handed to a client that has left, and the agent is told."""
    told: list[BaseException] = []

    async def late(agent: Agent, dial: Dial) -> None:
        client.close()
        await until(lambda: not pair.owner.clients.joining)
        try:
            await pair.agent_join(agent, dial.token)
        except ArcbridgeError as error:
            told.append(error)

    async with Agent(pair.owner, on_dial=late):
        client = await pair.owner.dial()
        await asking(client)
        await until(lambda: told)
        assert isinstance(told[0], JoinRefused)
    assert pair.outcomes["void"] == 1


# -- one of the two dies ----------------------------------------------------------------------------------------------

STEPS = {"claim": ("claim", 1), "reply": ("answer", 1), "socket": ("socket", 1), "taken": ("answer", 2)}
"""Each message of a hand-over: its kind, and the how many-th of that kind it is."""


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_worker_that_dies_at_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, before: bool
) -> None:
    """The channel ends just before or just behind the message of that step: so it looks to the other worker when one
    is killed there. Both ends are told or cut at once, and no descriptor is left."""
    # An agent that dies on its way to the owner is just one that does not come: the client hears so at the deadline.
    async with two(tmp_path, dial_deadline=1.0) as pair, Agent(pair.owner, on_dial=pair.join_at_sender) as agent:
        await pair.owner.settled()
        at_rest = descriptors()
        send, (kind, which), sent = Channel.send, STEPS[step], Counter[str]()

        def dying(
            self: Channel, head: Head, body: bytes = b"", sock: socket.socket | None = None, *, keep: bool = True
        ) -> None:
            sent[head["t"]] += 1
            is_it = (head["t"], sent[kind]) == (kind, which)
            if is_it and before:
                self.close()
                raise ChannelClosed
            send(self, head, body, sock, keep=keep)
            if is_it:
                self.close()

        monkeypatch.setattr(Channel, "send", dying)
        async with asyncio.timeout(8):
            client: socket.socket | None = None
            try:
                client, _ = await pair.owner.join()
            except (JoinRefused, ConnectionLost) as error:
                told = getattr(error, "code", JoinCode.AGENT_REFUSED)
            else:
                told = JoinCode.OK
            assert told in (JoinCode.OK, JoinCode.AGENT_REFUSED, JoinCode.AGENT_TIMEOUT, JoinCode.NO_AGENT)
            await until(lambda: agent.sockets)
            far = agent.sockets[0]
            if client is not None:
                # The join was complete before the death: the pump has it, or both ends are cut.
                with client:
                    await ended(client, far)
            else:
                await until(lambda: far.fileno() < 0 or _is_over(far))
        far.close()
        agent.sockets.clear()
        await until(lambda: pair.handing() == 0)
        await until(lambda: not len(pair.owner.pumps))
        # Both ends of the channel are gone too.
        await until(lambda: descriptors() <= at_rest - 2)


async def ended(client: socket.socket, far: socket.socket) -> None:
    """Require that both connections still carry bytes, or that both have ended."""
    try:
        await send_all(client, b"x")
        data = await receive(far, 1)
        if data:
            return
    except OSError:
        pass
    with contextlib.suppress(OSError):
        assert await receive(client, 1) == b""


def _is_over(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


async def test_an_owner_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, pair: Two) -> None:
    """A stopped owner does not reply: the sender ends the agent's connection, though the owner may hold it."""
    monkeypatch.setattr(module, "TAKEN_DEADLINE", 0.1)
    async with Agent(pair.owner, on_dial=pair.join_at_sender) as agent:
        pair.owner.siblings.handlers["socket"] = lambda sibling, message: held.append(message.sock)
        held: list[socket.socket | None] = []
        joining = asyncio.ensure_future(pair.owner.join())
        await until(lambda: held)
        await until(lambda: _is_over(agent.sockets[0]))
        with pytest.raises((JoinRefused, ConnectionLost)):
            await joining
        held[0].close()
        assert pair.outcomes["failed"] == 1


async def test_an_owner_without_descriptors(pair: Two) -> None:
    """The socket is lost on its way to the owner, whose message comes without it."""
    async with Agent(pair.owner, on_dial=pair.join_at_sender) as agent:
        handler = pair.owner.siblings.handlers["socket"]

        def cut_off(sibling: object, message: object) -> None:
            message.sock.close()
            handler(sibling, message._replace(sock=None))

        pair.owner.siblings.handlers["socket"] = cut_off
        assert (await refused(pair.owner.join())).code == JoinCode.AGENT_REFUSED
        await until(lambda: _is_over(agent.sockets[0]))
        assert pair.outcomes["failed"] == 1
        assert pair.handing() == 0


async def test_a_refused_reply_is_passed_on(pair: Two) -> None:
    """What the owner says before the agent's TLS is over reaches the agent in words."""
    async with Agent(pair.owner) as agent:
        token = f"{pair.owner.siblings.worker_id}.x"

        def refusing(join: ClaimedJoin, request: JoinRequest, cluster: str) -> str:
            pair.tasks.append(asyncio.ensure_future(join.refuse(JoinReply(code=JoinCode.OVERLOADED, message="full"))))
            return ""

        pair.owner.detour.claim = refusing
        await refused(pair.agent_join(agent, token), "full")
        await asyncio.gather(*pair.tasks)
        assert pair.handing() == 0
