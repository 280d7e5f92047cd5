"""The relay's lies: subclasses of its real parts, each honest in all but one thing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from arcbridge.identity.claims import Identity
from arcbridge.mux.session import MuxSession
from arcbridge.pki.authority import Authority
from arcbridge.relay.control import ControlConnection, ControlServer
from arcbridge.relay.pump import Pump, Pumps
from arcbridge.relay.rendezvous import Rendezvous
from arcbridge.wire.frames import FrameType, frame
from arcbridge.wire.records import Dial, JoinReply, JoinRequest


class CrossingPumps(Pumps):
    """Joins the first client to the second one's agent, and the other way round."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._held: list[tuple[socket.socket, socket.socket, dict[str, Any]]] = []
        self._crossed = False

    def join(self, client: socket.socket, agent: socket.socket, **settings: Any) -> Pump:
        if self._crossed:
            return super().join(client, agent, **settings)
        self._held.append((client, agent, settings))
        if len(self._held) == 2:
            self._crossed = True
            (mine, its, first), (yours, theirs, second) = self._held
            super().join(mine, theirs, **first)
            return super().join(yours, its, **second)
        return Pump(client, agent, self.pipes, set(), lambda pump: None)  # not started: nothing moves yet


class OtherCluster(Rendezvous):
    """Answers a join of one cluster with an agent of another."""

    asked, brought = "prod", "test"

    async def _meet(self, join: Any, waiting: Any, request: JoinRequest) -> Any:
        if waiting.cluster == self.asked:
            waiting.cluster = self.brought
        return await super()._meet(join, waiting, request)


class OtherClusterAndCa(OtherCluster):
    """... and tells the client that other cluster's CA, too."""

    async def _authorise(self, identity: Identity, request: JoinRequest) -> str:
        named = request.cluster
        if named == self.asked:
            record = await self._registry.cluster(self.brought)
            assert record is not None
            return record.ca_pem
        return await super()._authorise(identity, request)


class KeepsTokens(Rendezvous):
    """Keeps the access tokens that it is shown."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.tokens: list[str] = []

    async def _identify(self, request: JoinRequest) -> Identity:
        self.tokens.append(request.token)
        return await super()._identify(request)


class OwnCa(Rendezvous):
    """Tells clients a CA of its own, which could end the end-to-end TLS at the relay."""

    ca = Authority.create("the relay's own")

    async def _authorise(self, identity: Identity, request: JoinRequest) -> str:
        await super()._authorise(identity, request)
        return self.ca.certificate_pem


class _SaysElse:
    """A join whose reply is changed on its way out."""

    def __init__(self, join: Any, change: Callable[[JoinReply], JoinReply]) -> None:
        self._join = join
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._join, name)

    async def reply(self, reply: JoinReply) -> None:
        await self._join.reply(self._change(reply))


def says_else(**fields: Any) -> type[Rendezvous]:
    """A rendezvous whose consent to clients has other fields."""

    class SaysElse(Rendezvous):
        async def _pump(self, join: Any, *args: Any, **settings: Any) -> Pump:
            return await super()._pump(_SaysElse(join, lambda reply: replace(reply, **fields)), *args, **settings)

    return SaysElse


def dials_else(**fields: Any) -> type[ControlConnection]:
    """Control connections whose DIALs have other fields."""

    class DialsElse(ControlConnection):
        async def dial(self, dial: Dial) -> Any:
            return await super().dial(_changed(dial, fields))

    return DialsElse


def _changed(dial: Dial, fields: dict[str, Any]) -> Dial:
    return replace(dial, **{name: value(dial) if callable(value) else value for name, value in fields.items()})


class Control(ControlServer):
    """The real one; tests say on its connections what no relay says."""

    made: list[Control]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.made.append(self)

    def say(self, body: bytes) -> None:
        """Send a frame on every control connection."""
        for link in self._open:
            if link.session is not None:
                say(link.session, body)

    @property
    def connections(self) -> set[ControlConnection]:
        """The agents that are connected."""
        return set(self._open)


def say(session: MuxSession, body: bytes) -> None:
    """Send a frame as it is, whether its sender may send it or not."""
    session._sender.control.append(body)
    session.wake()


def record(kind: FrameType, body: bytes, stream_id: int = 0) -> bytes:
    """A frame over these bytes."""
    return frame(kind, stream_id, body)


async def pause() -> None:
    """A turn of the loop for everyone."""
    await asyncio.sleep(0)
