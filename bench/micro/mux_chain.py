"""The hot path and nothing else: mux over TLS, the relay's pump, splices at both ends; no join, no policy, no audit.

    python -m bench.micro.mux_chain relay  AGENTS CLIENTS            (loopback ports)
    python -m bench.micro.mux_chain agent  AGENTS TARGET DIRECTORY
    python -m bench.micro.mux_chain client CLIENTS LISTEN DIRECTORY

`--profile FILE` writes a cProfile of the event loop at the end. `bench.peers.mux_chain` starts the three.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import signal
import socket
from pathlib import Path

import uvloop

from arcbridge.errors import ArcbridgeError
from arcbridge.mux.memory import tune_allocator
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.splice import SocketSplice
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.sockets import tune
from arcbridge.net.tls import inner_client_context, inner_server_context
from arcbridge.pki.names import cluster_server_name
from arcbridge.relay.pump import Pumps
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Kind, Side

CLUSTER = "bench"


def _listener(port: int) -> socket.socket:
    sock = socket.create_server(("127.0.0.1", port), backlog=4096)
    sock.setblocking(False)
    return sock


async def relay(agents: int, clients: int, _unused: Path) -> None:
    """Pair the first agent's connection with the first client's, and so on."""
    loop = asyncio.get_running_loop()
    pumps = Pumps(lambda pump: None)
    with _listener(agents) as left, _listener(clients) as right:
        print("READY", flush=True)
        while True:
            agent, _ = await loop.sock_accept(left)
            client, _ = await loop.sock_accept(right)
            pumps.join(client, agent)


class _Agent(BaseHandler):
    def __init__(self, target: int) -> None:
        self._target = ("127.0.0.1", target)

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        session.accept_auth(AuthOk(b"0" * 16, b"0" * 32, "bench", 3600))

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect(self._target)
        except BlockingIOError:
            pass  # it is connected, or refused, when it becomes writable
        stream.attach(SocketSplice(sock))

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        print("session ended:", error, flush=True)


async def agent(relay_port: int, target: int, directory: Path) -> None:
    """The TLS server at the far end."""
    loop = asyncio.get_running_loop()
    context = inner_server_context((directory / "cert.pem").read_text(), (directory / "key.pem").read_text())
    sock = socket.create_connection(("127.0.0.1", relay_port))
    sock.setblocking(False)
    tune(sock)
    session = MuxSession(Side.ACCEPTOR, Kind.SESSION, _Agent(target), label="bench")
    await loop.connect_accepted_socket(session.protocol, sock, ssl=context)
    print("READY", flush=True)
    await session.wait_ended()


async def client(relay_port: int, listen: int, directory: Path) -> None:
    """The TLS client, with a local port; each connection becomes a stream."""
    loop = asyncio.get_running_loop()
    context = inner_client_context((directory / "ca.pem").read_text())
    sock = socket.create_connection(("127.0.0.1", relay_port))
    sock.setblocking(False)
    tune(sock)
    session = MuxSession(Side.INITIATOR, Kind.SESSION, BaseHandler(), label="bench")
    session.authenticate(Auth("oidc", "t" * 900))
    await loop.create_connection(session.protocol, sock=sock, ssl=context, server_hostname=cluster_server_name(CLUSTER))
    await session.wait_established()
    with _listener(listen) as listener:

        def accept() -> None:
            try:
                near, _ = listener.accept()
            except BlockingIOError:
                return
            near.setblocking(False)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session.open("tcp:bench", SocketSplice(near))

        loop.add_reader(listener, accept)
        print("READY", flush=True)
        print("session ended:", await session.wait_ended(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("relay", "agent", "client"))
    parser.add_argument("first", type=int)
    parser.add_argument("second", type=int)
    parser.add_argument("directory", type=Path, nargs="?", default=Path())
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()
    tune_allocator()
    role = {"relay": relay, "agent": agent, "client": client}[args.role]

    async def run() -> None:
        task = asyncio.ensure_future(role(args.first, args.second, args.directory))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            pass  # asked to end

    profile = cProfile.Profile() if args.profile else None
    if profile:
        profile.enable()
    uvloop.run(run())
    if profile:
        profile.disable()
        profile.dump_stats(args.profile)


if __name__ == "__main__":
    main()
