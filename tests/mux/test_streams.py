"""The streams of a session are reset together, and the session goes on."""

from __future__ import annotations

import pytest

from arcbridge.errors import StreamReset
from arcbridge.wire.frames import ResetCode
from tests.mux.ends import connected

pytestmark = pytest.mark.usefixtures("faults")


async def test_all_streams_can_be_reset_and_the_session_goes_on() -> None:
    async with connected("tls") as ends:
        pairs = [await ends.stream() for _ in range(3)]
        ends.agent.streams.reset_all(ResetCode.LIMIT)
        for mine, theirs in pairs:
            for io in (mine, theirs):
                with pytest.raises(StreamReset) as caught:
                    await io.read()
                assert caught.value.code == ResetCode.LIMIT
        mine, theirs = await ends.stream()
        await mine.write(b"on")
        assert await theirs.read() == b"on"
