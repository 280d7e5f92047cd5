"""Light agents: real TLS, HELLO and backoff, and nothing behind them. One process holds thousands.

`python -m bench.herd.agents` reads its orders as one JSON line, `Orders`, then writes a JSON line `Count` four times a
second until its input ends. What it does not simulate: a second relay, sessions, and that each agent has a certificate
of its own (all share one, their instance ids differ).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import resource
import socket
import ssl
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from arcbridge.cli.loop import loop_factory
from arcbridge.errors import ArcbridgeError, SessionEnded
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.backoff import HEALTHY, Backoff
from arcbridge.net.tls import ALPN_CONTROL, RelayTrust, outer_client_context
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Goaway
from arcbridge.wire.session import Introduction, Kind, Side

MAX_AGENTS = 5_000
CONNECT_DEADLINE, HANDSHAKE_DEADLINE = 10.0, 5.0
"""As the agent's (`arcbridge.agent.dials`)."""
TELL_EVERY = 0.25


@dataclass(frozen=True)
class Orders:
    """What the agents are and where they go; the address is on loopback."""

    host: str
    port: int
    relay_ca: str
    certificate: str
    key: str
    cluster_ca: str
    agents: int
    sources: int
    """How many source addresses, from 127.0.0.2 on."""
    ramp: float
    """Seconds over which they come for the first time."""
    first: int = 0
    """Number of the first one: several processes share the agents."""


@dataclass
class Count:
    """How many agents are in which state at one moment."""

    at: float
    """Monotonic seconds, the same clock in all processes of a machine."""
    up: int
    attempts: int
    ended: dict[str, int] = field(default_factory=dict)
    """How attempts and connections ended, by a word."""
    hints: int = 0
    """How often a relay said when to come back."""
    too_early: int = 0
    """How often an agent came before that: must be 0."""
    cpu: float = 0.0


class Agent(BaseHandler):
    """One agent: it connects, stays, and connects again when its relay is gone."""

    def __init__(self, herd: Herd, number: int) -> None:
        self.herd = herd
        self.number = number
        self.retry_after = 0
        self.up = False

    async def live(self, delay: float) -> None:
        herd, backoff = self.herd, Backoff()
        not_before = 0.0
        while True:
            await asyncio.sleep(delay)
            herd.count.attempts += 1
            herd.count.too_early += time.monotonic() < not_before
            self.retry_after, stayed = 0, False
            try:
                session = await self.connect()
                error: ArcbridgeError = await session.wait_ended()
                stayed = self.up
                word = GoawayCode(error.code).name.lower() if isinstance(error, SessionEnded) else "lost"
            except Exception as failure:  # whatever it is, an agent comes again; the word tells what it was
                word = _word(failure)
            finally:
                if self.up:
                    self.up = False
                    herd.count.up -= 1
            herd.ended[word] += 1
            # In a relay's life agents have been connected for days when it dies; here for seconds.
            hint = min(max(self.retry_after, 1), 600) if self.retry_after else None
            delay = backoff.next_delay(lasted=HEALTHY if stayed and word == "lost" else 0.0, hint=hint)
            if hint is not None:
                herd.count.hints += 1
                not_before = time.monotonic() + hint
            else:
                not_before = 0.0

    async def connect(self) -> MuxSession:
        orders, loop = self.herd.orders, asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.bind((f"127.0.0.{2 + self.number % orders.sources}", 0))
            async with asyncio.timeout(CONNECT_DEADLINE):
                await loop.sock_connect(sock, (orders.host, orders.port))
            session = MuxSession(
                Side.INITIATOR,
                Kind.CONTROL,
                self,
                introduction=Introduction(f"herd-{self.number}", "herd", orders.cluster_ca),
            )
            try:
                await loop.create_connection(
                    session.protocol,
                    sock=sock,
                    ssl=self.herd.context,
                    server_hostname=orders.host,
                    ssl_handshake_timeout=HANDSHAKE_DEADLINE,
                    ssl_shutdown_timeout=3.0,
                )
            except BaseException:
                session.abort()
                raise
            return session
        except BaseException:
            sock.close()
            raise

    def established(self, session: MuxSession) -> None:
        self.up = True
        self.herd.count.up += 1

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        self.retry_after = goaway.retry_after
        if self.up:
            self.up = False
            self.herd.count.up -= 1


class Herd:
    """All agents of this process."""

    def __init__(self, orders: Orders) -> None:
        if not ipaddress.ip_address(orders.host).is_loopback or orders.agents > MAX_AGENTS:
            raise SystemExit("the herd goes to loopback only, and is of a bounded size")
        self.orders = orders
        self.count = Count(0.0, 0, 0)
        self.ended: Counter[str] = Counter()
        pair = (orders.certificate, orders.key)
        self.context: ssl.SSLContext = outer_client_context(
            RelayTrust(orders.relay_ca), ALPN_CONTROL, client_certificate=pair
        )

    async def run(self) -> None:
        orders = self.orders
        agents = [Agent(self, orders.first + number) for number in range(orders.agents)]
        tasks = [
            asyncio.create_task(agent.live(orders.ramp * number / orders.agents)) for number, agent in enumerate(agents)
        ]
        over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        while not over.done():
            await asyncio.wait([over], timeout=TELL_EVERY)
            self.count.at, self.count.ended, self.count.cpu = time.monotonic(), dict(self.ended), time.process_time()
            print(json.dumps(asdict(self.count)), flush=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _word(failure: BaseException) -> str:
    if isinstance(failure, ConnectionRefusedError):
        return "nobody_listens"
    if isinstance(failure, ConnectionError):
        return "turned_away"
    if isinstance(failure, TimeoutError):
        return "timeout"
    if isinstance(failure, OSError) and failure.errno is not None:
        return errno.errorcode.get(failure.errno, "unknown").lower()
    return f"{type(failure).__name__}"


def orders_of(line: str) -> Orders:
    """Read the orders from a line of JSON."""
    document: dict[str, Any] = json.loads(line)
    return Orders(**document)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    orders = orders_of(sys.stdin.readline())
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(Herd(orders).run())


if __name__ == "__main__":
    main()
