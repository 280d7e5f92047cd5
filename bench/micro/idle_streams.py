"""What idle streams cost an end: resident bytes per open stream that moves nothing, machine and transport together.

    python -m bench.micro.idle_streams [STREAMS]

Two sessions in one process, joined in memory. A window is a promise and not a buffer: an idle stream must cost what its
objects cost, however large its window grew. Each stream has moved one keystroke, as an idle shell has.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path
from typing import Any

import uvloop

from arcbridge.mux.memory import tune_allocator
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Kind, Side

STREAMS = 1000


class _Wire(asyncio.Transport):
    """One end of a connection that is a function call."""

    def __init__(self) -> None:
        super().__init__()
        self.other: _Wire
        self.protocol: Any = None

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def write(self, data: bytes | bytearray | memoryview) -> None:
        asyncio.get_running_loop().call_soon(self.other.take, bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def take(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            into = self.protocol.get_buffer(-1)
            count = min(len(into), len(view))
            into[:count] = view[:count]
            self.protocol.buffer_updated(count)
            view = view[count:]

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None: ...

    def close(self) -> None: ...


class _Quiet(asyncio.Protocol):
    """Takes bytes, keeps none."""

    def view_received(self, view: memoryview) -> None: ...


class _Agent(BaseHandler):
    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        session.accept_auth(AuthOk(b"0" * 16, b"0" * 32, "bench", 3600))

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        stream.attach(_Quiet())
        stream.write(b"$ ")


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def measure(streams: int) -> float:
    """Resident bytes per stream and end."""
    limits = Limits(max_streams=2 * streams)
    client = MuxSession(Side.INITIATOR, Kind.SESSION, BaseHandler(), limits=limits)
    agent = MuxSession(Side.ACCEPTOR, Kind.SESSION, _Agent(), limits=limits)
    client.authenticate(Auth("oidc", "bench"))
    wires = _Wire(), _Wire()
    wires[0].other, wires[1].other = wires[1], wires[0]
    for wire, session in zip(wires, (client, agent), strict=True):
        wire.protocol = session.protocol()
        wire.protocol.connection_made(wire)
    await client.wait_established()
    client.open("warm", _Quiet())
    await asyncio.sleep(0.05)
    gc.collect()
    before = resident()
    for _ in range(streams):
        client.open("tcp:idle", _Quiet()).write(b"x")
    while len(agent.streams) < streams + 1:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    gc.collect()
    cost = (resident() - before) / streams / 2
    for session in (client, agent):
        session.abort()
    return cost


def main() -> None:
    """Print the figure."""
    tune_allocator()
    streams = int(sys.argv[1]) if len(sys.argv) > 1 else STREAMS
    cost = uvloop.run(measure(streams))
    print(f"{streams} idle streams: {cost / 1024:.2f} KiB resident per stream and end")


if __name__ == "__main__":
    main()
