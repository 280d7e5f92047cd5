"""The other side of a client in one place: a relay's join and an agent's end of the session, both real.

`FarSide` listens on loopback, speaks the relay's outer TLS and JOIN, then pumps into an agent's TLS and mux. What it
answers is set by the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.join import JoinCode, ServerJoin
from arcbridge.net.tls import ALPN_JOIN, inner_server_context, outer_server_contexts
from arcbridge.pki.authority import Authority
from arcbridge.pki.names import cluster_server_name
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.records import Auth, AuthOk, JoinReply, JoinRequest
from arcbridge.wire.session import Introduction, Kind, Side

CLUSTER = "prod"

RELAY_CA = Authority.create("relay CA of the tests")
CLUSTER_CA = Authority.create("cluster CA of the tests")
OTHER_CA = Authority.create("another CA")


class Echo(asyncio.Protocol):
    """A target that says everything back, and ends when its caller does."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.stream: Any = transport

    def data_received(self, data: bytes) -> None:
        self.stream.write(data)

    def eof_received(self) -> bool:
        self.stream.write_eof()
        return True


class FarSide(BaseHandler):
    """Use as an async context manager; then `address` is what a client dials."""

    def __init__(self, agent: FarSide | None = None) -> None:
        """With `agent` this is another relay before the same agent."""
        self.agent = agent or self
        self.requests: list[JoinRequest] = []
        self.auths: list[Auth] = []
        self.sessions: list[MuxSession] = []
        self.targets: list[str] = []
        self.streams: list[StreamTransport] = []
        self.reply = JoinReply()
        self.answers = asyncio.Event()
        """Whether joins are answered; the test clears it to hold them up."""
        self.answers.set()
        """What JOIN is answered with; its CA and id are filled in."""
        self.relay_keys: list[bytes] = []
        """What the relay showed in each join (SubjectPublicKeyInfo)."""
        self.agent_keys: list[bytes] = []
        """What the agent showed in each session's connection."""
        self.trusted_ca = CLUSTER_CA
        self.features = ""
        """What the agent says in HELLO that it knows."""
        self.absent: set[str] = set()
        """Agent instances that are not connected to this relay, while others are."""
        self.says_ca = CLUSTER_CA
        self.shows_ca = CLUSTER_CA
        self.auth_answer: AuthOk | tuple[Any, ...] = AuthOk(subject="alice", expires_in=0)
        self.protocol: Callable[[str], asyncio.Protocol | ResetCode] = lambda target: Echo()
        self.resumptions: list[MuxSession] = []
        self.resume_refusals: list[tuple[GoawayCode, str]] = []
        """What the next resumptions are refused with, in this order; then they are accepted."""
        self.silent_join = False
        self.silent_resume = False
        self.dies_behind_the_join = False
        self.deaths_behind_a_resumption = 0
        self.flows = asyncio.Event()
        """Whether bytes pass; while the test clears it they are held, as by a network that is away without a word."""
        self.flows.set()
        self.not_serving = False
        """Connections are accepted, and nothing is ever said on them."""
        self.silent_agent = False
        self.joined = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: set[socket.socket] = set()
        self._relaying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FarSide:
        issued = RELAY_CA.issue_server(["127.0.0.1", "localhost"])
        self._outer = outer_server_contexts(issued.certificate_pem, issued.key_pem, RELAY_CA.certificate_pem)[ALPN_JOIN]
        # Bound beside the listener, so that no other program gets the port while this relay does not listen.
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind(("127.0.0.1", 0))
        self.port = int(self._reservation.getsockname()[1])
        self.address = f"https://127.0.0.1:{self.port}"
        await self.start_listening()
        return self

    def cut(self) -> None:
        """Reset every connection that goes through this relay, as its death does; the next ones are served."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):  # it is over already
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for task in self._relaying:
            task.cancel()

    async def stop_listening(self) -> None:
        """Stop listening: connections are refused."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listener.close()

    async def start_listening(self) -> None:
        """Listen again, on the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listener.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def __aexit__(self, *_: object) -> None:
        for session in self.sessions:
            session.abort()
        for sock in self._sockets:
            sock.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.stop_listening()
        self._reservation.close()

    def _spawn(self, work: Any, *, relaying: bool = False) -> None:
        task = asyncio.get_running_loop().create_task(work)
        for tasks in (self._tasks, self._relaying) if relaying else (self._tasks,):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            sock.setblocking(False)
            self._sockets.add(sock)
            if not self.not_serving:
                self._spawn(self._serve(sock), relaying=True)

    async def _serve(self, sock: socket.socket) -> None:
        with sock:
            await self._relay(sock)

    async def _relay(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        join = ServerJoin(sock, self._outer)
        try:
            await join.handshake()
            self.requests.append(await join.read_request())
            self.relay_keys.append(join.own_key)
        except Exception:
            join.abort()
            return
        self.joined.set()
        if self.silent_join:
            await asyncio.Event().wait()
        await self.answers.wait()
        ca = self.says_ca.certificate_pem
        reply = replace(self.reply, join_id=f"{len(self.requests):016x}", cluster_ca=ca)
        if self.requests[-1].instance in self.absent:
            reply = replace(reply, code=JoinCode.NO_INSTANCE)
        if reply.code != JoinCode.OK:
            await join.refuse(reply)
            return
        await join.reply(reply)
        first = await join.finish()
        if self.dies_behind_the_join:
            return
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        if not self.silent_agent:
            self._spawn(self.agent._agent(far, reply.join_id))
        await loop.sock_sendall(near, first)
        self._spawn(_pump(near, sock, self.flows), relaying=True)
        await _pump(sock, near, self.flows)

    async def _agent(self, sock: socket.socket, join_id: str) -> None:
        issued = self.shows_ca.issue_server([cluster_server_name(CLUSTER)])
        session = MuxSession(
            Side.ACCEPTOR, Kind.SESSION, self, label=join_id, introduction=Introduction("pod-1", features=self.features)
        )
        self.sessions.append(session)
        context = inner_server_context(issued.certificate_pem, issued.key_pem)
        self.agent_keys.append(context.spki)
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(session.protocol, sock, ssl=context)

    # -- the agent's handler ---------------------------------------------------------------------------------------

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        self.auths.append(auth)
        if session.resumption.resuming is not None:
            self._resume(session)
        elif isinstance(self.auth_answer, AuthOk):
            known = session.resumption.session_id, session.resumption.secret
            made = known if session.resumption.session_id else (os.urandom(16), os.urandom(16))
            session.accept_auth(replace(self.auth_answer, session_id=made[0], resume_secret=made[1]))
        else:
            session.close(*self.auth_answer)

    def _resume(self, newcomer: MuxSession) -> None:
        hello = newcomer.resumption.resuming
        assert hello is not None
        if self.silent_resume:
            return
        if self.resume_refusals:
            newcomer.close(*self.resume_refusals.pop(0))
            return
        for old in self.sessions:
            if (
                not old.closed
                and old.resumption.session_id == hello.session_id
                and old.resumption.secret == hello.resume_secret
            ):
                assert isinstance(self.auth_answer, AuthOk)
                ok = replace(
                    self.auth_answer, session_id=old.resumption.session_id, resume_secret=old.resumption.secret
                )
                old.migration.take_over(newcomer, ok)
                self.resumptions.append(old)
                if self.deaths_behind_a_resumption:
                    self.deaths_behind_a_resumption -= 1
                    # Its answer still goes out, with the end right behind it.
                    asyncio.get_running_loop().call_soon(cast(asyncio.Transport, old.transport).close)
                return
        newcomer.close(GoawayCode.GONE, "there is no such session here")

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        self.targets.append(target)
        self.streams.append(stream)
        found = self.protocol(target)
        if isinstance(found, ResetCode):
            stream.abort(found)
        else:
            stream.attach(found)


async def _pump(source: socket.socket, sink: socket.socket, flows: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    try:
        with contextlib.suppress(OSError):  # an end that was reset
            while data := await loop.sock_recv(source, 65536):
                await flows.wait()
                await loop.sock_sendall(sink, data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
    finally:
        await asyncio.sleep(0)
        source.close()
