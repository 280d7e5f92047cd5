"""A relay in memory of a test: enrols, takes control connections, dials, and hands out the client's end of a join.

Built from the parts that the real one uses (`pki`, `net.join`, `mux`), so that what an agent says is understood or not
as in earnest. Which door a connection wants is read from its ClientHello.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.join import ServerJoin
from arcbridge.net.tls import ALPN_CONTROL, ALPN_HTTP, ALPN_JOIN, outer_server_contexts
from arcbridge.pki.authority import Authority, certificate_validity
from arcbridge.pki.enrolment import key_hash
from arcbridge.pki.rotation import Rotation
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Dial, Goaway, JoinReply, JoinRequest, Ledger, Status
from arcbridge.wire.session import Kind, Side

CLUSTER = "one"


class Link(BaseHandler):
    """The relay's side of one control connection."""

    def __init__(self, relay: FakeRelay) -> None:
        self.relay = relay
        self.session: MuxSession | None = None
        self.goaways: list[int] = []

    @property
    def open(self) -> bool:
        """Tell whether the agent is connected and has not sent GOAWAY."""
        return self.session is not None and not self.session.closed and not self.goaways

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        self.goaways.append(goaway.code)

    def established(self, session: MuxSession) -> None:
        if self.relay.turn_away is not None:
            self.relay.turned_away += 1
            session.close(*self.relay.turn_away)
            return
        self.relay.links.append(self)
        self.relay.connected.set()

    def ledger_received(self, session: MuxSession, ledger: Ledger) -> None:
        self.relay.ledgers.append(ledger)

    def status_received(self, session: MuxSession, status: Status) -> None:
        self.relay.statuses.append(status)
        self.relay.status_arrived.set()


@dataclass
class FakeRelay:
    life: float = 3600.0
    authority: Authority = field(default_factory=lambda: Authority.create("relay"))
    vouching: Authority | None = None
    """The CA of the relay's own certificate, where that is another one."""
    links: list[Link] = field(default_factory=list)
    statuses: list[Status] = field(default_factory=list)
    ledgers: list[Ledger] = field(default_factory=list)
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    status_arrived: asyncio.Event = field(default_factory=asyncio.Event)
    joins: asyncio.Queue[tuple[JoinRequest, socket.socket]] = field(default_factory=asyncio.Queue)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    """join token -> cluster."""
    redeemed: dict[str, str] = field(default_factory=dict)
    """join token -> request of the key that redeemed it."""
    answers: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    """path -> what to answer instead."""
    refuse: JoinReply | None = None
    turn_away: tuple[GoawayCode, str, int] | None = None
    """What control connections are told instead of being served."""
    turned_away: int = 0
    mute: bool = False
    """Accepts connections and says nothing."""
    port: int = 0
    _reservation: socket.socket | None = None
    """Has the port while the relay is down: else another process gets it, or a dial of it as its own near end."""
    _accepting: asyncio.Task[None] | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _sessions: list[MuxSession] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pin(self) -> str:
        return self.authority.pin

    @classmethod
    @asynccontextmanager
    async def serving(cls, **settings: Any) -> AsyncIterator[FakeRelay]:
        relay = cls(**settings)
        relay.show()
        relay.start()
        try:
            yield relay
        finally:
            await relay.stop()
            if relay._reservation is not None:
                relay._reservation.close()
            while not relay.joins.empty():
                relay.joins.get_nowait()[1].close()
            await asyncio.sleep(0.01)

    def show(self) -> None:
        """Make the certificate that the relay shows."""
        authority = self.vouching or self.authority
        leaf = authority.issue_server(["127.0.0.1"])
        chain = leaf.certificate_pem + authority.links_pem
        self.contexts = outer_server_contexts(chain, leaf.key_pem, self.authority.trusted_pem)

    def rotate(self, state: Rotation) -> None:
        """Take a step of the CA's rotation over."""
        self.authority.become(state.authority())
        self.show()

    def start(self) -> None:
        """Listen; after `stop`, on the same port again."""
        if self._reservation is None and sys.platform == "linux":
            # One that does not listen leaves the port to a listener that reuses addresses, and refuses connections.
            self._reservation = socket.socket()
            self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._reservation.bind(("127.0.0.1", 0))
            self.port = self._reservation.getsockname()[1]
        listener = socket.create_server(("127.0.0.1", self.port))
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._accepting = asyncio.ensure_future(self._accept(listener))

    async def stop(self) -> None:
        """Die: stop listening, and cut every connection."""
        for session in self._sessions:
            session.abort()
        tasks = [*([self._accepting] if self._accepting is not None else []), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def agents(self) -> list[Link]:
        """The control connections that are served now."""
        return [link for link in self.links if link.open]

    def dial(self, **fields: Any) -> Dial:
        """Send a DIAL on the newest control connection, whether or not the agent leaves it."""
        base: dict[str, Any] = {
            "token": "t" * 32,
            "address": self.address,
            "cluster": CLUSTER,
            "join_id": "j1",
            "deadline": 5,
        }
        dial = Dial(**{**base, **fields})
        session = [one.session for one in self.links if one.session is not None and not one.session.closed][-1]
        self.status_arrived.clear()
        session.send(dial)
        return dial

    async def status(self, token: str) -> Status:
        async with asyncio.timeout(30):
            while True:
                for status in self.statuses:
                    if status.token == token:
                        return status
                self.status_arrived.clear()
                await self.status_arrived.wait()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                sock, _ = await loop.sock_accept(listener)
                sock.setblocking(False)
                task = loop.create_task(self._serve(sock))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        if self.mute:
            with sock:
                await asyncio.Event().wait()
        hello = b""
        while len(hello) < 5 or len(hello) < 5 + int.from_bytes(hello[3:5], "big"):
            await asyncio.sleep(0.002)
            try:
                hello = sock.recv(16384, socket.MSG_PEEK)
            except BlockingIOError:
                continue
            if not hello:
                sock.close()
                return
        try:
            if ALPN_CONTROL.encode() in hello:
                link = Link(self)
                link.session = MuxSession(Side.ACCEPTOR, Kind.CONTROL, link)
                self._sessions.append(link.session)
                await loop.connect_accepted_socket(link.session.protocol, sock, ssl=self.contexts[ALPN_CONTROL])
            elif ALPN_JOIN.encode() in hello:
                await self._join(sock)
            else:
                await self._http(sock)
        except OSError:
            sock.close()

    async def _join(self, sock: socket.socket) -> None:
        join = ServerJoin(sock, self.contexts[ALPN_JOIN])
        await join.handshake()
        request = await join.read_request()
        if self.refuse is not None:
            await join.refuse(self.refuse)
            return
        await join.reply(JoinReply(join_id="j1"))
        await join.finish()
        self.joins.put_nowait((request, sock))

    async def _http(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=self.contexts[ALPN_HTTP])
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            transport.close()
            return  # an agent that measures the round trip
        path = head.split(" ")[1]
        if path == "/v1/ca":
            body = (self.authority.trusted_pem + self.authority.announced).encode()
            status = 200
        else:
            length = next(
                int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")
            )
            document = json.loads(await reader.readexactly(length))
            self.calls.append((path, document))
            status, answer = self.answers.get(path) or self._answer(path, document)
            body = json.dumps(answer).encode()
        transport.write(f"HTTP/1.0 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        transport.close()

    def _answer(self, path: str, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        cluster = CLUSTER
        if path == "/v1/enrol":
            token = document["join_token"]
            key = key_hash(document["csr"])
            if token not in self.tokens or self.redeemed.setdefault(token, key) != key:
                return 403, {"error": {"code": "enrolment_refused", "message": "the join token is not good"}}
            cluster = self.tokens[token]
        certificate = self.authority.sign_agent(document["csr"], cluster, life=self.life)
        answer = {
            "certificate": certificate,
            "ca": self.authority.certificate_pem,
            "cluster": cluster,
            "not_after": certificate_validity(certificate)[1],
        }
        return 200, answer
