"""The shared buffer: poisoned after each callback, no byte of one connection shows on another."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest

from arcbridge.mux import buffer
from arcbridge.net.tls import ALPN_JOIN
from arcbridge.relay import pipes, pump
from arcbridge.wire.frames import FrameType, frame
from arcbridge.wire.limits import DEFAULT
from tests.mux.ends import Recorder, connected
from tests.net.ends import client_context, server_contexts

pytestmark = pytest.mark.usefixtures("faults", "poisoned")


def test_a_full_frame_is_one_read_of_each_hop() -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(ALPN_JOIN).wrap_bio(to_client, to_server, server_hostname="relay.test")
    server = server_contexts()[ALPN_JOIN].wrap_bio(to_server, to_client, server_side=True)
    for end in (client, server, client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
    assert (client.version(), to_server.pending) == ("TLSv1.3", 0)
    full = frame(FrameType.DATA, 1, bytes(buffer.PAYLOAD))
    sent = 0
    while sent < len(full):
        sent += client.write(full[sent:])
    assert to_server.pending <= min(buffer.SIZE, pump.HELD, pipes.CAPACITY)
    assert buffer.PAYLOAD == DEFAULT.frame_alone == DEFAULT.ack_every


@pytest.mark.parametrize("views", [False, True])
async def test_owner_tagged_data_over_several_connections(views: bool) -> None:
    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        if views:

            def view_received(self, view: memoryview) -> None:
                self.transport.write(view)

        else:

            def data_received(self, data: bytes) -> None:
                self.transport.write(data)

        def eof_received(self) -> bool:
            return False

        def pause_writing(self) -> None:
            self.transport.pause_reading()

        def resume_writing(self) -> None:
            self.transport.resume_reading()

    async def conversation(number: int) -> None:
        async with connected("tls", agent_handler=Recorder(Echo)) as ends:
            mine, _ = await ends.stream()
            tag = b"%07d|" % number
            size = 1_500_000 // 8

            async def send() -> None:
                for _ in range(10):
                    await mine.write(tag * (size // 10))
                mine.finish()

            sending = asyncio.ensure_future(send())
            assert await mine.read_all() == tag * (size // 10) * 10
            await sending

    await asyncio.gather(*(conversation(n) for n in range(5)))
