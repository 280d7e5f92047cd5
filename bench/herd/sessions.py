"""Both ends of many sessions, light ones, in one process: real joins, then raw sockets over which pings pass.

`python -m bench.herd.sessions` reads its orders as one JSON line, `Orders`, then writes a JSON line `Count` four
times a second until its input ends. Each session is joined as the product joins it: the client's end makes the outer
TLS connection and sends JOIN with a user's access token; the agent's end answers the relay's DIAL on a control
connection with a second outer TLS connection and the agent's certificate; both end that TLS in order. What follows is
not TLS, but has the sizes and the times of an idle session's PING and PONG: 46 bytes, which are a frame of 24 in one
TLS 1.3 record. The relay is blind, so to it they are the same. PING comes from the client's end alone, as in an idle
session of the product (docs/protocol.md, 3.6); with `both` the agent's end sends its own as well.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import resource
import socket
import ssl
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from arcbridge.cli.loop import loop_factory
from arcbridge.errors import ArcbridgeError
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.join import client_join
from arcbridge.net.tls import ALPN_CONTROL, ALPN_JOIN, RelayTrust, outer_client_context
from arcbridge.wire.frames import HEADER_SIZE, PING_BODY
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.records import Dial, JoinRequest, Status
from arcbridge.wire.session import Introduction, Kind, Side

MAX_SESSIONS = 9_500
"""In one process: both ends of each are here."""
RECORD = HEADER_SIZE + PING_BODY.size + 5 + 1 + 16
"""Bytes of a PING on the wire: the frame, and TLS 1.3's header, content type and tag (RFC 8446 §5.2)."""
PING, PONG = b"P" * RECORD, b"R" * RECORD
TELL_EVERY = 0.25
TICK = 0.05
"""Seconds between two portions of pings; every socket sends one each `DEFAULT.ping_interval`."""
WINDOW = 24
"""Joins under way at once."""
TRIES = 3


@dataclass(frozen=True)
class Orders:
    """What the process joins, and at which relay; the address is on loopback."""

    host: str
    port: int
    relay_ca: str
    cluster: str
    certificate: str
    key: str
    cluster_ca: str
    token: str
    """A user's access token."""
    sessions: int
    sources: int
    """How many source addresses, from 127.0.`net`.1 on."""
    net: int
    """Tells the processes apart: the third number of their addresses, and the name of their agent."""
    both: bool = False
    """Whether both ends of a session send PING."""


@dataclass
class Count:
    """How many sessions are in which state at one moment."""

    at: float
    """Monotonic seconds, the same clock in all processes of a machine."""
    paired: int = 0
    failed: int = 0
    lost: int = 0
    """Sockets that the relay ended."""
    pings: int = 0
    pongs: int = 0
    """Answers that came back through the relay."""
    word: str = ""
    """Why the last join failed."""
    cpu: float = 0.0


class Ends(BaseHandler):
    """All sessions of this process."""

    def __init__(self, orders: Orders) -> None:
        if not ipaddress.ip_address(orders.host).is_loopback or orders.sessions > MAX_SESSIONS:
            raise SystemExit("these sessions go through loopback only, and are of a bounded number")
        self.orders = orders
        self.count = Count(0.0)
        self._instance = f"ends-{orders.net}"
        self._loop = asyncio.get_running_loop()
        trust, pair = RelayTrust(orders.relay_ca), (orders.certificate, orders.key)
        self._client = outer_client_context(trust, ALPN_JOIN)
        self._agent = outer_client_context(trust, ALPN_JOIN, client_certificate=pair)
        self._control = outer_client_context(trust, ALPN_CONTROL, client_certificate=pair)
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn: deque[socket.socket] = deque()
        """Raw sockets, the one whose ping is due next first."""
        self._debt = 0.0
        self._made = 0

    # -- the agent's side ------------------------------------------------------------------------------------------

    async def come(self) -> MuxSession:
        """Return the control connection once it is established."""
        orders = self.orders
        session = MuxSession(
            Side.INITIATOR, Kind.CONTROL, self, introduction=Introduction(self._instance, "scale", orders.cluster_ca)
        )
        await self._loop.create_connection(
            session.protocol, orders.host, orders.port, ssl=self._control, server_hostname=orders.host
        )
        await session.wait_established()
        return session

    def dial_received(self, session: MuxSession, dial: Dial) -> None:
        session.send(Status(token=dial.token, instance=self._instance, ready=True))
        request = JoinRequest(role="agent", cluster=dial.cluster, token=dial.token, instance=self._instance)
        task = self._loop.create_task(self._answer(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: JoinRequest) -> None:
        try:
            self._is_raw(await self._join(self._agent, request), pings=self.orders.both)
        except (ArcbridgeError, OSError) as error:
            self.count.word = f"agent: {error}"

    # -- the client's side -----------------------------------------------------------------------------------------

    async def pair(self) -> None:
        """Join all sessions, `WINDOW` at a time."""
        left = iter(range(self.orders.sessions))

        async def some() -> None:
            for _ in left:
                await self._session()

        await asyncio.gather(*(some() for _ in range(WINDOW)))

    async def _session(self) -> None:
        orders = self.orders
        request = JoinRequest(role="client", cluster=orders.cluster, token=orders.token, instance=self._instance)
        for _ in range(TRIES):
            try:
                self._is_raw(await self._join(self._client, request), pings=True)
            except (ArcbridgeError, OSError) as error:
                self.count.word = f"client: {error}"
                await asyncio.sleep(1.0)
            else:
                self.count.paired += 1
                return
        self.count.failed += 1

    async def _join(self, context: ssl.SSLContext, request: JoinRequest) -> socket.socket:
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._made += 1
            sock.bind((f"127.0.{self.orders.net}.{1 + self._made % self.orders.sources}", 0))
            await self._loop.sock_connect(sock, (self.orders.host, self.orders.port))
            await client_join(sock, context, self.orders.host, request)
        except BaseException:
            sock.close()
            raise
        return sock

    # -- idle ------------------------------------------------------------------------------------------------------

    def _is_raw(self, sock: socket.socket, *, pings: bool) -> None:
        if pings:
            self._turn.append(sock)
        self._loop.add_reader(sock.fileno(), self._readable, sock)

    def _readable(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(4096)
            for at in range(0, len(data), RECORD):
                if data[at : at + 1] == PING[:1]:
                    sock.send(PONG)
                else:
                    self.count.pongs += 1
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.count.lost += 1
            self._loop.remove_reader(sock.fileno())
            if sock in self._turn:
                self._turn.remove(sock)
            sock.close()

    async def ping(self) -> None:
        """Send each session's PING every ten seconds, spread evenly: real sessions began at different times."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            self._debt += len(self._turn) * (now - last) / DEFAULT.ping_interval
            last = now
            while self._debt >= 1 and self._turn:
                self._debt -= 1
                sock = self._turn.popleft()
                self._turn.append(sock)
                try:
                    sock.send(PING)
                except OSError:
                    continue  # its reader counts it
                self.count.pings += 1

    async def run(self) -> None:
        control = await self.come()
        self._tasks |= {self._loop.create_task(work) for work in (self.pair(), self.ping())}
        over = self._loop.run_in_executor(None, sys.stdin.read)
        while not over.done() and not control.closed:
            await asyncio.wait([over], timeout=TELL_EVERY)
            self.count.at, self.count.cpu = time.monotonic(), time.process_time()
            print(json.dumps(asdict(self.count)), flush=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def orders_of(line: str) -> Orders:
    """Read the orders from a line of JSON."""
    document: dict[str, Any] = json.loads(line)
    return Orders(**document)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    orders = orders_of(sys.stdin.readline())

    async def run() -> None:
        await Ends(orders).run()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
