"""One connection: it gives the shared buffer as a view, and hands over what was read."""

from __future__ import annotations

import asyncio

import pytest

from arcbridge.errors import ConnectionLost
from arcbridge.mux import buffer
from arcbridge.mux.connection import WRITE_HIGH
from arcbridge.wire.limits import Limits
from tests.mux.ends import LOOPS, connect_in_memory, connect_over_tls, make_sessions, run, tcp_pair, tls_contexts


@pytest.mark.parametrize("loop", LOOPS)
def test_a_slice_of_what_it_gives_is_no_copy(loop: str) -> None:
    async def main() -> None:
        ends = make_sessions()
        given = ends.client.protocol().get_buffer(-1)
        assert len(given) == buffer.SIZE
        given[10:12] = b"ok"
        piece = given[10:]
        piece[:2] = b"no"
        assert buffer.BUFFER[10:12] == b"no", "asyncio's TLS reads a second record into a slice"
        ends.client.abort()
        ends.agent.abort()
        await ends.agent.wait_ended()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_it_sets_write_limits_and_holds_its_transport(loop: str) -> None:
    async def main() -> None:
        ends = make_sessions()
        left, _ = connect_in_memory(ends)
        assert left.high == WRITE_HIGH
        assert ends.client.transport is left
        await ends.client.wait_established()
        await ends.stop()
        assert ends.client.transport is None

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_tcp_end_without_close_notify_is_a_loss(loop: str) -> None:
    """The socket ends; TLS did not: whatever the transport makes of it, the session is lost, not over."""

    async def main() -> None:
        ends = make_sessions(limits=Limits(replay=0))
        near, _ = await connect_over_tls(ends)
        await ends.agent.wait_established()
        mine, theirs = await ends.stream()
        await mine.write(b"part of it")
        assert await theirs.read() == b"part of it"
        near.shutdown(1)
        with pytest.raises(ConnectionLost):
            await theirs.read()
        assert isinstance(await ends.client.wait_ended(), ConnectionLost)
        await ends.stop()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_handshake_that_fails_leaves_the_session_waiting(loop: str) -> None:
    async def main() -> None:
        ends = make_sessions()
        _, client_context = tls_contexts()
        near, far = await tcp_pair()
        connecting = asyncio.ensure_future(
            asyncio.get_running_loop().create_connection(
                ends.client.protocol, sock=near, ssl=client_context, server_hostname="agent.test"
            )
        )
        await asyncio.sleep(0.01)
        far.close()
        with pytest.raises(OSError):  # noqa: PT011
            await connecting
        assert not ends.client.closed
        ends.client.abort()
        ends.agent.abort()
        await ends.agent.wait_ended()

    run(loop, main)
