"""TLS towards the API server: which transport carries what, and that both keep the same promises."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from types import SimpleNamespace
from typing import cast

import pytest

from arcbridge.agent.kube import upstream_tls
from arcbridge.agent.kube.upstream_tls import connect_upstream
from arcbridge.mux import buffer
from arcbridge.mux.socket_error_poll import TransportErrorPoll
from arcbridge.net.tlstransport import HANDSHAKE_DEADLINE, TlsTransport, accept_tls
from tests.mux.ends import LOOPS, run, tcp_pair, tls_contexts
from tests.net.tlsends import send_key_updates

KINDS = (True, False)


class Taker(asyncio.BufferedProtocol):
    """The connection's owner: it keeps what comes."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.poll: TransportErrorPoll | None = None
        self.taken = b""
        self.came = asyncio.Event()
        self.lost: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return buffer.VIEW

    def buffer_updated(self, nbytes: int) -> None:
        self.taken += buffer.VIEW[:nbytes]
        if self.poll is not None:
            self.poll.was_read()
        self.came.set()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.poll is not None:
            self.poll.stop()
        self.lost.set_result(exc)


async def joined(repeatable: bool) -> tuple[Taker, TlsTransport, socket.socket]:
    """(the agent's end, the API server's transport, its socket)."""
    server, client = tls_contexts()
    near, far = await tcp_pair()
    made: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    apiserver = accept_tls(far, server, asyncio.Protocol(), on_handshake=made.set_result)
    taker = Taker()
    taker.poll = await connect_upstream(near, client, taker, "agent.test", repeatable=repeatable)
    assert await made is None
    return taker, apiserver, far


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("repeatable", KINDS)
def test_to_abort_in_the_middle_of_a_read_is_no_failure(loop: str, repeatable: bool) -> None:
    """aiofastnet 1.2 goes on to read after it, and reports its own full buffer to the exception handler."""

    async def main() -> None:
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        taker, apiserver, _ = await joined(repeatable)
        taker.transport.pause_reading()
        apiserver.write(bytes(400_000))
        await asyncio.sleep(0.01)
        taker.buffer_updated = lambda nbytes: taker.transport.abort()
        taker.transport.resume_reading()
        assert await asyncio.wait_for(taker.lost, 10) is None
        apiserver.abort()
        assert told == []

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("repeatable", KINDS)
def test_a_reset_behind_the_last_bytes_is_noticed(loop: str, repeatable: bool) -> None:
    async def main() -> None:
        taker, apiserver, far = await joined(repeatable)
        apiserver.write(b"the last")
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        apiserver.abort()
        assert await asyncio.wait_for(taker.lost, 10) is not None or taker.taken in (b"", b"the last")

    run(loop, main)


@pytest.mark.parametrize("repeatable", KINDS)
def test_j34_key_updates_of_an_api_server_end_its_connection(repeatable: bool) -> None:
    """docs/threats.md#J34: OpenSSL takes any number of them within one read."""

    async def main() -> None:
        server, client = tls_contexts()
        near, far = await tcp_pair()
        far.setblocking(True)

        def peer() -> None:
            with server.wrap_socket(far, server_side=True) as tls, suppress(OSError):
                send_key_updates(tls, 2000)
                tls.sendall(b"an answer")
                while tls.recv(65536):
                    pass

        peering = asyncio.ensure_future(asyncio.to_thread(peer))
        taker = Taker()
        taker.poll = await connect_upstream(near, client, taker, "agent.test", repeatable=repeatable)
        came = asyncio.ensure_future(taker.came.wait())
        await asyncio.wait({taker.lost, came}, return_when=asyncio.FIRST_COMPLETED)
        taken = taker.taken
        came.cancel()
        assert taker.transport is not None
        taker.transport.abort()
        await taker.lost
        await peering
        assert taken == b""

    run("uvloop", main)


@pytest.mark.parametrize("loop", LOOPS)
def test_without_aiofastnet_all_are_lossless(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_tls, "fast_tls", lambda: None)

    async def main() -> None:
        taker, apiserver, _ = await joined(True)
        assert isinstance(taker.transport, TlsTransport)
        assert taker.poll is None
        apiserver.close()
        await asyncio.wait_for(taker.lost, 10)

    run(loop, main)


def test_the_handshake_is_bounded_by_the_same_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_tls, "HANDSHAKE_DEADLINE", HANDSHAKE_DEADLINE / 100)

    async def main() -> None:
        _, client = tls_contexts()
        near, far = await tcp_pair()
        with pytest.raises((TimeoutError, ConnectionAbortedError)):
            await asyncio.wait_for(connect_upstream(near, client, Taker(), "agent.test", repeatable=True), 5)
        near.close()
        far.close()

    run("uvloop", main)


def test_a_release_that_cannot_be_asked_for_what_it_holds_carries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class SSLTransportBase:
        """Without `_do_read`."""

    async def main() -> None:
        taker, apiserver, _ = await joined(True)
        assert isinstance(taker.transport, TlsTransport)
        assert taker.poll is None
        taker.transport.abort()
        apiserver.abort()
        await taker.lost

    for other in (SimpleNamespace(ssl_transport=SimpleNamespace(SSLTransportBase=SSLTransportBase)), SimpleNamespace()):
        monkeypatch.setattr(upstream_tls, "fast_tls", lambda other=other: other)
        run("asyncio", main)
