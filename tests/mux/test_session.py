from __future__ import annotations
import pytest
from tests.mux.ends import LOOPS, connected, run

@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("link", ["memory", "tls"])
def test_bulk_both_ways(loop: str, link: str) -> None:
    async def main() -> None:
        import asyncio, hashlib, random
        data = random.Random(1).randbytes(5_000_000)
        async with connected(link) as ends:
            mine, theirs = await ends.stream()
            async def send(io):
                for at in range(0, len(data), 300_000):
                    await io.write(data[at:at+300_000])
                io.finish()
            got = await asyncio.gather(mine.read_all(), theirs.read_all(), send(mine), send(theirs))
            assert got[0] == data and got[1] == data
    run(loop, main)
