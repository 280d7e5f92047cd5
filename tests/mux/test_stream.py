"""Streams as transports: the conformance suite over memory and over TLS, then what is particular to a transport."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.mux.ends import LOOPS, connected, run
from tests.support.stream_conformance import CHECKS, check


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("link", ["memory", "tls"])
@pytest.mark.parametrize("loop", LOOPS)
def test_conformance(loop: str, link: str, name: str) -> None:
    async def main() -> None:
        async with connected(link) as ends:

            @asynccontextmanager
            async def pair() -> Any:
                yield await ends.stream()

            await check(pair, name)
            await asyncio.sleep(0.01 if link == "tls" else 0)
            for _ in range(20):
                await asyncio.sleep(0)
            # The session is as it was: no stream, no credit kept, and it still works.
            for session in (ends.client, ends.agent):
                assert session.streams_open == 0
                assert session._machine.unconsumed == 0
                session._machine.assert_invariants()
            mine, theirs = await ends.stream()
            await mine.write(b"still there")
            assert await theirs.read() == b"still there"

    run(loop, main)
