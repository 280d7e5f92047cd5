"""Light agents: the product's control connections over real TLS, and nothing behind them. One process holds thousands.

`python -m bench.herd.agents` reads its orders as one JSON line, `Orders`, then writes a JSON line `Count` four times a
second until its input ends. An agent is a `ControlConnections` with its `RelayChoice`. What it does not simulate:
sessions, round trips to relays, and that each agent has a certificate of its own (all share one, their ids differ).
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import resource
import socket
import ssl
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import cast

import structlog

from arcbridge.agent.control import ControlConnections, ControlTransport
from arcbridge.agent.dials import CONNECT_DEADLINE, HANDSHAKE_DEADLINE
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.relay_choice import RelayChoice
from arcbridge.agent.sessions import Sessions
from arcbridge.cli.loop import loop_factory
from arcbridge.errors import Unreachable
from arcbridge.mux.session import MuxSession
from arcbridge.net.address import Address, parse_address
from arcbridge.net.tls import ALPN_CONTROL, RelayTrust, outer_client_context
from arcbridge.net.tlstransport import connect_tls

MAX_AGENTS = 5_000
"""In one process."""
TELL_EVERY = 0.25
CONNECTING = 16
"""Agents of one process that connect at once. Each agent has a machine of its own, so that its ClientHello comes right
behind its connection; without a bound thousands connect first, and the relay closes those of which it hears nothing."""


@dataclass(frozen=True)
class Orders:
    """What the agents are and where they go."""

    relays: list[str]
    """Addresses on loopback."""
    wanted: int
    """Control connections of each agent."""
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
    """Control connections."""
    attempts: int
    ended: dict[str, int] = field(default_factory=dict)
    """How attempts that came to nothing ended, by a word."""
    cpu: float = 0.0


class Herd:
    """All agents of this process."""

    def __init__(self, orders: Orders) -> None:
        self.relays = [parse_address(relay) for relay in orders.relays]
        if any(relay.host != "127.0.0.1" for relay in self.relays) or orders.agents > MAX_AGENTS:
            raise SystemExit("the herd goes to loopback only, and is of a bounded size")
        self.orders = orders
        self.attempts = 0
        self.ended: Counter[str] = Counter()
        self.connecting = asyncio.Semaphore(CONNECTING)
        pair = (orders.certificate, orders.key)
        self.context: ssl.SSLContext = outer_client_context(
            RelayTrust(orders.relay_ca), ALPN_CONTROL, client_certificate=pair
        )

    def agent(self, number: int) -> ControlConnections:
        keeper = cast(
            CredentialKeeper,
            SimpleNamespace(current=None, stated_ca_pem=self.orders.cluster_ca, announcement=None, changed=None),
        )
        heard = SimpleNamespace(hear=lambda *_: True)
        sessions = SimpleNamespace(streams_wait=False, ask_to_move=lambda *_: 0, revocations=heard)
        return ControlConnections(
            self.relays,
            keeper,
            cast(Sessions, sessions),
            instance=f"herd-{number}",
            choice=RelayChoice(self.relays, self.orders.wanted),
            transport=HerdTransport(self, number),
        )

    async def run(self) -> None:
        orders, loop = self.orders, asyncio.get_running_loop()
        agents = [self.agent(orders.first + number) for number in range(orders.agents)]
        for number, agent in enumerate(agents):
            loop.call_later(orders.ramp * number / orders.agents, agent.start)
        over = loop.run_in_executor(None, sys.stdin.read)
        while not over.done():
            await asyncio.wait([over], timeout=TELL_EVERY)
            up = sum(agent.up for agent in agents)
            count = Count(time.monotonic(), up, self.attempts, dict(self.ended), time.process_time())
            print(json.dumps(asdict(count)), flush=True)


class HerdTransport(ControlTransport):
    """Connects one agent from an address of its own."""

    def __init__(self, herd: Herd, number: int) -> None:
        self._herd = herd
        self._source = f"127.0.0.{2 + number % herd.orders.sources}"

    async def connect(self, relay: Address) -> socket.socket:
        await self._herd.connecting.acquire()  # until its ClientHello is sent
        self._herd.attempts += 1
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT: the kernel finds a port at connect
            sock.bind((self._source, 0))
            async with asyncio.timeout(CONNECT_DEADLINE):
                await asyncio.get_running_loop().sock_connect(sock, (relay.host, relay.port))
        except OSError as error:
            self._herd.connecting.release()
            self._herd.ended[_word(error)] += 1
            sock.close()
            raise Unreachable(f"cannot reach {relay}") from error
        except BaseException:
            self._herd.connecting.release()
            sock.close()
            raise
        return sock

    async def measure(self, relay: Address) -> float:
        raise Unreachable("all are equally near")

    async def secure(self, session: MuxSession, sock: socket.socket, relay: Address) -> None:
        asyncio.get_running_loop().call_soon(self._herd.connecting.release)
        try:
            async with asyncio.timeout(HANDSHAKE_DEADLINE):
                await connect_tls(sock, self._herd.context, session.protocol(), relay.host)
        except OSError as error:
            self._herd.ended[_word(error)] += 1
            raise


def _word(failure: OSError) -> str:
    if isinstance(failure, ConnectionRefusedError):
        return "nobody_listens"
    if isinstance(failure, ConnectionError):
        return "turned_away"
    if isinstance(failure, TimeoutError):
        return "timeout"
    return errno.errorcode.get(failure.errno or 0, "unknown").lower()


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    orders = Orders(**json.loads(sys.stdin.readline()))
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(Herd(orders).run())


if __name__ == "__main__":
    main()
