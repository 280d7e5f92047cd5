"""The relay's lies: subclasses of its real parts, each honest in all but one thing."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from aiohttp import web

from arcbridge.identity.claims import Identity
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.session_tls import accept_session
from arcbridge.net.tls import inner_server_context
from arcbridge.pki.authority import Authority
from arcbridge.pki.names import cluster_server_name
from arcbridge.relay.client_join import ClientJoins
from arcbridge.relay.control import ControlConnection, ControlServer
from arcbridge.relay.http.api import build_app
from arcbridge.relay.pump import Pump, Pumps
from arcbridge.relay.registry.base import ClusterRecord
from arcbridge.wire.records import Auth, AuthOk, Dial, JoinReply, JoinRequest
from arcbridge.wire.session import Introduction, Kind, Side
from tests.hostile.by_hand import say
from tests.hostile.wire_lies import tcp_pair


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
        return Pump(client, agent, self)  # not started: nothing moves yet


class OtherCluster(ClientJoins):
    """Answers a join of one cluster with an agent of another."""

    asked, brought = "prod", "test"

    async def _dial(self, join: Any, dial: Any, request: JoinRequest) -> Any:
        if dial.cluster == self.asked:
            dial.cluster = self.brought
        return await super()._dial(join, dial, request)


class OtherClusterAndCa(OtherCluster):
    """... and tells the client that other cluster's CA, too."""

    async def _authorise(self, identity: Identity, request: JoinRequest) -> ClusterRecord:
        named = request.cluster
        if named == self.asked:
            record = await self.registry.cluster(self.brought)
            assert record is not None
            return record
        return await super()._authorise(identity, request)


class KeepsTokens(ClientJoins):
    """Keeps the JOINs of clients, with tokens and proofs."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.requests: list[JoinRequest] = []

    async def _identify(self, request: JoinRequest) -> Identity:
        self.requests.append(request)
        return await super()._identify(request)


class OwnCa(ClientJoins):
    """Tells clients a CA of its own, which could end the end-to-end TLS at the relay."""

    ca = Authority.create("the relay's own")

    async def _authorise(self, identity: Identity, request: JoinRequest) -> ClusterRecord:
        record = await super()._authorise(identity, request)
        return replace(record, ca_pem=self.ca.certificate_pem)


class _SaysElse:
    """A join whose reply is changed on its way out."""

    def __init__(self, join: Any, change: Callable[[JoinReply], JoinReply]) -> None:
        self._join = join
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._join, name)

    async def reply(self, reply: JoinReply) -> None:
        await self._join.reply(self._change(reply))


def says_else(**fields: Any) -> type[ClientJoins]:
    """A rendezvous whose consent to clients has other fields."""

    class SaysElse(ClientJoins):
        async def _pair(self, attempt: Any, *args: Any) -> Pump:
            attempt.join = _SaysElse(attempt.join, lambda reply: replace(reply, **fields))
            return await super()._pair(attempt, *args)

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

    made: ClassVar[list[Control]] = []

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


def refuses_with(reply: JoinReply) -> type[ClientJoins]:
    """A rendezvous that refuses each client with this reply."""

    class RefusesWith(ClientJoins):
        async def serve(self, join: Any, request: JoinRequest, *args: Any) -> bool:
            await join.refuse(reply)
            return False

    return RefusesWith


def lists_also(name: str) -> Callable[..., web.Application]:
    """An API whose list of clusters has one more."""

    def build(*args: Any) -> web.Application:
        app = build_app(*args)

        @web.middleware
        async def lie(request: web.Request, handler: Any) -> web.StreamResponse:
            answer = await handler(request)
            if request.path == "/v1/clusters" and isinstance(answer, web.Response):
                rows = json.loads(answer.body or b"[]")
                return web.json_response([*rows, {"name": name, "state": "Connected"}])
            return answer

        app.middlewares.insert(0, lie)
        return app

    return build


class Impostor(Pumps, BaseHandler):
    """Ends the end-to-end TLS itself, with a certificate of `OwnCa`, and takes every login."""

    made: ClassVar[list[Impostor]] = []

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.tokens: list[Auth] = []
        self._work: set[asyncio.Task[None]] = set()
        self._sessions: list[MuxSession] = []
        self.made.append(self)

    def join(self, client: socket.socket, agent: socket.socket, **settings: Any) -> Pump:
        near, far = tcp_pair()
        task = asyncio.ensure_future(self._impersonate(far, settings["cluster"]))
        self._work.add(task)
        agent.close()
        return super().join(client, near, **settings)

    async def _impersonate(self, sock: socket.socket, cluster: str) -> None:
        issued = OwnCa.ca.issue_server([cluster_server_name(cluster)])
        session = MuxSession(Side.ACCEPTOR, Kind.SESSION, self, introduction=Introduction("agent-1"))
        self._sessions.append(session)
        context = inner_server_context(issued.certificate_pem, issued.key_pem)
        try:
            await accept_session(sock, context, session.protocol(), handshake_deadline=5)
        except OSError:
            sock.close()

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        self.tokens.append(auth)
        session.accept_auth(AuthOk(subject="alice", expires_in=600))

    def close(self) -> None:
        for session in self._sessions:
            session.abort()
        for task in self._work:
            task.cancel()
        super().close()


class OtherPod(ClientJoins):
    """Brings another agent of the cluster than the one that has the session, once."""

    lied: ClassVar[int] = 0

    async def _dial(self, join: Any, dial: Any, request: JoinRequest) -> Any:
        others = [link.instance for link in self.fleet.links() if link.instance != request.instance]
        if request.instance and others and not OtherPod.lied:
            OtherPod.lied = 1
            request = replace(request, instance=others[0])
        return await super()._dial(join, dial, request)
