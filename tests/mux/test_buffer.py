"""The shared buffer: poisoned after each callback, no byte of one connection shows on another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from arcbridge.mux import buffer
from tests.mux.ends import LOOPS, Recorder, connected, run


def test_the_view_is_of_the_buffer() -> None:
    assert len(buffer.VIEW) == buffer.SIZE
    buffer.VIEW[:4] = b"abcd"
    assert buffer.BUFFER[:4] == b"abcd"
    buffer.poison(3)
    assert buffer.BUFFER[:4] == b"\xdb\xdb\xdbd"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("views", [False, True])
def test_owner_tagged_data_over_several_connections(loop: str, views: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "POISON", True)

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

    async def main() -> None:
        await asyncio.gather(*(conversation(n) for n in range(5)))

    run(loop, main)
