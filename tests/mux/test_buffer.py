"""The shared buffer: poisoned after each callback, no byte of one connection shows on another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.mux.ends import Recorder, connected

pytestmark = pytest.mark.usefixtures("faults", "poisoned")


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
