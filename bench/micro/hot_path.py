"""Time per frame in wire and mux alone: no socket, no TLS, no loop; what a change there gains is seen at once.

    python -m bench.micro.hot_path

Nanoseconds, the median over many loop turns, with and without the history that resumption needs. `from socket`: a local
socket became readable, its 100 bytes leave as a frame. `to socket`: a frame came, its 100 bytes go into a local socket.
With 1 frame per loop turn that is a keystroke; with 16 it is what 32 busy connections look like.
"""

from __future__ import annotations

import asyncio
import os
import socket
from statistics import median
from time import monotonic, perf_counter_ns
from typing import Any, cast

import uvloop

from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.splice import SocketSplice
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Kind, Side

SIZE = 100
TURNS = 20_000


class _Sink:
    """A transport and a socket that take everything and cost nothing."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))

    def writelines(self, parts: list[bytes]) -> None:
        self.written.extend(map(bytes, parts))

    def abort(self) -> None: ...

    def close(self) -> None: ...

    def send(self, data: memoryview) -> int:
        return len(data)

    def getsockopt(self, level: int, option: int) -> int:
        return 0

    def recv_into(self, into: bytearray, size: int) -> int:
        return SIZE

    def fileno(self) -> int:
        return -1


class _Acceptor(BaseHandler):
    def __init__(self) -> None:
        self.streams: list[StreamTransport] = []

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        session.accept_auth(AuthOk(b"0" * 16, b"0" * 32, "bench", 3600))

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        stream.attach(_splice(stream))
        self.streams.append(stream)


def _splice(_stream: object = None) -> SocketSplice:
    splice = SocketSplice(cast(socket.socket, _Sink()))
    splice._reading = True  # the loop is not to watch a descriptor that does not exist
    return splice


class Pair:
    """A client's and an agent's session, each writing into a list that the other is fed from."""

    def __init__(self, streams: int, limits: Limits) -> None:
        self.near = MuxSession(Side.INITIATOR, Kind.SESSION, BaseHandler(), limits=limits)
        self.far = MuxSession(Side.ACCEPTOR, Kind.SESSION, _Acceptor(), limits=limits)
        self.near_wire, self.far_wire = _Sink(), _Sink()
        self.near.authenticate(Auth("oidc", "t"))
        near, far = self.near.protocol(), self.far.protocol()
        near.connection_made(cast(Any, self.near_wire))
        far.connection_made(cast(Any, self.far_wire))
        self.settle()
        self.splices = [_splice() for _ in range(streams)]
        for splice in self.splices:
            self.near.open("tcp:bench", splice)
        self.settle()

    def settle(self) -> None:
        """Pass everything both ways until nothing moves."""
        while True:
            self.near._flush()
            self.far._flush()
            if not self.near_wire.written and not self.far_wire.written:
                return
            self.pass_on(self.near_wire, self.far)
            self.pass_on(self.far_wire, self.near)

    @staticmethod
    def pass_on(wire: _Sink, to: MuxSession) -> None:
        data = b"".join(wire.written)
        wire.written.clear()
        if data:
            to.data_received(memoryview(data), monotonic())


async def measure(frames: int, limits: Limits) -> tuple[float, float]:
    """(from socket, to socket) nanoseconds per frame with `frames` per loop turn."""
    pair = Pair(frames, limits)
    readables = [splice._read for splice in pair.splices]
    from_socket, to_socket = [], []
    for _turn in range(TURNS // frames):
        begin = perf_counter_ns()
        for readable in readables:
            readable()
        pair.near._flush()
        from_socket.append(perf_counter_ns() - begin)
        data = memoryview(b"".join(pair.near_wire.written))
        pair.near_wire.written.clear()
        begin = perf_counter_ns()
        pair.far.data_received(data, monotonic())
        to_socket.append(perf_counter_ns() - begin)
        if pair.far._machine.sender.has_output:
            pair.settle()
        if not _turn % 64:
            await asyncio.sleep(0)  # the loop drops the handles that `settle` made needless
    return median(from_socket) / frames, median(to_socket) / frames


async def _all() -> None:
    for frames in (1, 16):
        for history, limits in (("kept", DEFAULT), ("not kept", Limits(replay=0))):
            from_socket, to_socket = await measure(frames, limits)
            print(
                f"{frames:3d} frames per turn, history {history:8}: from socket {from_socket:6.0f} ns   "
                f"to socket {to_socket:6.0f} ns   per frame",
                flush=True,
            )
    os._exit(0)  # sessions over sinks cannot end in order, and need not


def main() -> None:
    uvloop.run(_all())


if __name__ == "__main__":
    main()
