"""SPDY as port-forward speaks it: what opens the streams, what is read of the peer's, and with which bounds."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any, cast

import pytest

from arcbridge.agent.kube.port_forward import ForwardedPorts
from arcbridge.client.serving.pod_ports import spdy
from arcbridge.client.serving.pod_ports.spdy import (
    CHUNK,
    MAX_CONTROL,
    MAX_TEXT,
    PodReader,
    SpdyError,
    opening,
    payload,
    ping,
)


def data(body: bytes = b"", *, stream: int = 3, fin: bool = False) -> bytes:
    return stream.to_bytes(4, "big") + (fin << 24 | len(body)).to_bytes(4, "big") + body


def control(kind: int, body: bytes = b"", version: bytes = b"\x80\x03") -> bytes:
    return version + kind.to_bytes(2, "big") + len(body).to_bytes(4, "big") + body


REPLY = control(2, bytes(40))


class Sink:
    """The peer, as far as it is written to; it does not read."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return len(self.written)


async def read(came: bytes, *, step: int = 1 << 20) -> tuple[bytes, bytes]:
    """Return what the pod sent, and what was written back."""
    reader, sink = asyncio.StreamReader(CHUNK), Sink()

    async def feed() -> None:
        for start in range(0, len(came), step):
            reader.feed_data(came[start : start + step])
            await asyncio.sleep(0)
        reader.feed_eof()

    feeding = asyncio.create_task(feed())
    try:
        return b"".join([part async for part in PodReader(reader, cast(Any, sink)).payload()]), sink.written
    finally:
        feeding.cancel()


def test_the_agent_reads_the_port_of_what_is_sent() -> None:
    """The agent's reader of kubectl's bytes, for its audit log, is the other opinion."""
    seen = ForwardedPorts(False, lambda: None)
    seen.feed(memoryview(opening(8443) + payload(b"GET / HTTP/1.1") + ping(1) + payload(b"")))
    assert (seen.ports, seen.unread) == (["8443"], "")


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
async def test_payload_up_to_its_end(step: int) -> None:
    came = REPLY + REPLY + data(b"hel") + control(4, bytes(12)) + data(b"lo") + control(6, bytes((0, 0, 0, 2)))
    came += control(6, bytes((0, 0, 0, 1))) + data(stream=1, fin=True) + data(b"!", fin=True) + control(7, bytes(8))
    assert await read(came, step=step) == (b"hello!", control(6, bytes((0, 0, 0, 2))))


@pytest.mark.parametrize(
    ("came", "said"),
    [
        (data(b"x") + data(b"error forwarding: ", stream=1) + data(b"refused\n", stream=1, fin=True), "g: refused$"),
        (control(3, bytes((0, 0, 0, 3)) + bytes(4)), "reset"),
        (control(1, bytes(20)), "does not speak"),
        (control(6, bytes(4), version=b"\x80\x02"), "does not speak"),
        (control(2, bytes(MAX_CONTROL + 1)), "does not speak"),
        (control(6, bytes(8)), "does not speak"),
        (control(6), "does not speak"),
    ],
)
async def test_what_is_no_end_in_order(came: bytes, said: str) -> None:
    with pytest.raises(SpdyError, match=said):
        await read(came)


WHOLE = REPLY + data(b"hello", fin=True)


@pytest.mark.parametrize("came", [*(WHOLE[:-cut] for cut in range(1, 40, 3)), b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3])
async def test_a_cut_is_no_end(came: bytes) -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        await read(came)


async def test_d6_a_peer_that_asks_and_reads_no_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spdy, "MAX_UNREAD", 1000)
    with pytest.raises(SpdyError, match="reads no answers"):
        await read(control(6, bytes((0, 0, 0, 2))) * 100)


async def test_d6_memory_does_not_grow_with_what_the_other_end_sends() -> None:
    """Payload passes, an error's text is cut, and of a frame that claims 16 MiB no more is kept than of others."""

    async def peak(megabytes: int) -> int:
        reader = asyncio.StreamReader(CHUNK)
        pod = PodReader(reader, cast(Any, Sink()))
        body = bytes(1 << 20)

        async def feed() -> None:
            for _ in range(megabytes):
                for frame in (
                    data(body),
                    data(b"e" * 65536, stream=1),
                    data(b"?" * 65536, stream=9),
                    control(8, bytes(99)),
                ):
                    for start in range(0, len(frame), CHUNK):
                        reader.feed_data(frame[start : start + CHUNK])
                        while len(reader._buffer) > CHUNK:  # as a transport that is paused
                            await asyncio.sleep(0)
            reader.feed_data(data(fin=True))

        tracemalloc.start()
        try:
            feeding = asyncio.create_task(feed())
            total = 0
            async for part in pod.payload():
                total += len(part)
            await feeding
            assert total == megabytes << 20
            assert len(pod._text) <= MAX_TEXT
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert await peak(16) < 1.5 * await peak(2) < 8 << 20
