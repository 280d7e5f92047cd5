"""One connection: it gives the shared buffer as a view, and hands over what was read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from arcbridge.errors import StateError
from arcbridge.mux import buffer
from arcbridge.mux.connection import peer_certificate
from arcbridge.wire.frames import HEADER_SIZE, FrameType, unpack_header
from arcbridge.wire.records import Auth
from tests.mux.ends import MemoryTransport, make_sessions

pytestmark = pytest.mark.usefixtures("faults")


async def test_a_slice_of_what_it_gives_is_no_copy() -> None:
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


class WritesNoted(MemoryTransport):
    """Notes each write; its TLS has shown a certificate."""

    def __init__(self, protocol: asyncio.BufferedProtocol, certificate: bytes) -> None:
        super().__init__(protocol, 64 * 1024)
        self.certificate = certificate
        self.writes: list[bytes] = []

    def get_extra_info(self, name: str, default: object = None) -> object:
        return SimpleNamespace(getpeercert=lambda binary: self.certificate) if name == "ssl_object" else default

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))
        super().write(data)


async def test_auth_is_made_from_the_certificate_and_leaves_in_the_first_flight() -> None:
    """A proof costs no round trip: what the peer showed is known before the first byte leaves."""
    ends = make_sessions(authenticate=False)
    left = WritesNoted(ends.client.protocol(lambda shown: Auth(token="t", proof=shown.decode())), b"shown")
    right = MemoryTransport(ends.agent.protocol(), 64 * 1024)
    left.peer, right.peer = right, left
    left.protocol.connection_made(left)
    right.protocol.connection_made(right)
    await ends.client.wait_established()
    kinds, at = [], 0
    while at < len(left.writes[0]):
        word, _ = unpack_header(left.writes[0][at : at + HEADER_SIZE])
        kinds.append(word & 0xFF)
        body = left.writes[0][at + HEADER_SIZE : at + HEADER_SIZE + (word >> 8)]
        at += HEADER_SIZE + (word >> 8)
        if kinds[-1] == FrameType.AUTH:
            assert Auth.decode(body) == Auth(token="t", proof="shown")
    assert kinds[:2] == [FrameType.HELLO, FrameType.AUTH]
    await ends.stop()


async def test_an_auth_that_cannot_be_made_ends_the_session_with_its_error() -> None:
    def fail(shown: bytes) -> Auth:
        raise StateError("the key is damaged")

    ends = make_sessions(authenticate=False)
    left = WritesNoted(ends.client.protocol(fail), b"shown")
    left.protocol.connection_made(left)
    with pytest.raises(StateError, match="damaged"):
        await ends.client.wait_established()
    assert left.writes == []
    assert left.is_closing()
    ends.agent.abort()
    await ends.agent.wait_ended()


async def test_the_certificate_of_a_connection_without_tls() -> None:
    assert peer_certificate(None) == b""
    assert peer_certificate(MemoryTransport(asyncio.BufferedProtocol(), 1)) == b""
