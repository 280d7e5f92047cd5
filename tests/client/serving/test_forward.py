"""Local TCP to a target: bytes, half-close both ways, resets with a reason, and no session."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from arcbridge.client.serving.forward import Forward, check_offered, check_target_name, reason
from arcbridge.client.session.restrictions import restricts_requests
from arcbridge.errors import ConfigError, PermissionRefused, SessionEnded, StreamReset
from arcbridge.net.join import JoinCode
from arcbridge.net.loopback import listen_at
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.records import JoinReply, Restrictions
from tests.client.far_side import Echo, FarSide
from tests.client.session.test_session_manager import make, running
from tests.support.eventually import until


@pytest.fixture
async def forward(far: FarSide, tmp_path: Path) -> AsyncIterator[Forward]:
    async with running(make(far, tmp_path)) as session:
        forward = Forward(session, "echo", listen_at("127.0.0.1", 0))
        forward.start()
        yield forward
        await forward.close()


async def connect(forward: Forward) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*forward._port._accepting._listening[0].getsockname()[:2])


async def settled(forward: Forward) -> None:
    await until(lambda: not forward.stats.open)


async def test_bytes_and_half_close(forward: Forward, far: FarSide) -> None:
    reader, writer = await connect(forward)
    blob = os.urandom(1_000_000)
    writer.write(blob)
    writer.write_eof()
    async with asyncio.timeout(20):
        assert await reader.read(-1) == blob
    writer.close()
    await settled(forward)
    assert far.targets == ["tcp:echo"]
    assert (forward.stats.bytes_to_cluster, forward.stats.bytes_from_cluster, forward.stats.failed) == (
        len(blob),
        len(blob),
        0,
    )


async def test_the_server_may_speak_first(forward: Forward, far: FarSide) -> None:
    class ResumeHandshake(Echo):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.stream.write(b"220 hello\r\n")

    far.protocol = lambda target: ResumeHandshake()
    reader, writer = await connect(forward)
    assert await reader.readline() == b"220 hello\r\n"
    writer.close()


@pytest.mark.parametrize("code", [ResetCode.UNKNOWN_TARGET, ResetCode.FORBIDDEN, ResetCode.CONNECT_FAILED])
async def test_a_refusal_is_a_reset(
    forward: Forward, far: FarSide, code: ResetCode, capsys: pytest.CaptureFixture[str]
) -> None:
    far.protocol = lambda target: code
    reader, writer = await connect(forward)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    await settled(forward)
    told = "".join(capsys.readouterr())
    assert told.count("connection cut") == 1
    assert "the agent" in told


async def test_without_a_session(forward: Forward, far: FarSide, capsys: pytest.CaptureFixture[str]) -> None:
    far.reply = JoinReply(code=JoinCode.NO_AGENT)
    reader, writer = await connect(forward)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    assert "has no connected agent" in "".join(capsys.readouterr())
    assert forward.stats.failed == 1


async def test_a_local_reset_reaches_the_target(forward: Forward, far: FarSide) -> None:
    lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    class Watch(Echo):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.set_result(exc)

    far.protocol = lambda target: Watch()
    reader, writer = await connect(forward)
    writer.write(b"x")
    await reader.readexactly(1)
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()
    assert isinstance(await asyncio.wait_for(lost, 20), StreamReset)


@pytest.mark.parametrize("name", ["", "a b", "../x", "é", "x" * 300, "a\n"])
def test_bad_target_names(name: str) -> None:
    with pytest.raises(ConfigError):
        check_target_name(name)


@pytest.mark.parametrize("offered", ["", "kubernetes tcp:db", "tcp:db", "kubernetes tcp:ab tcp:db"])
def test_a_target_that_is_offered_or_of_which_nothing_is_said(offered: str) -> None:
    check_offered("db", offered, "prod")


@pytest.mark.parametrize(
    ("offered", "said"),
    [
        ("kubernetes", "there is none for you"),
        ("kubernetes tcp:echo tcp:tcp:db", "you may use echo and 1 more"),
        (" ".join(f"tcp:t{n}" for n in range(25)), "t19 and 5 more"),
        ("kubernetes tcp:\x1b[31m tcp:echo", "you may use echo and 1 more"),
    ],
)
def test_a_target_that_is_not_offered(offered: str, said: str) -> None:
    with pytest.raises(PermissionRefused, match=re.escape(said)) as caught:
        check_offered("db", offered, "prod")
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("offered", ["", "kubernetes"])
def test_a_restricted_session_is_told_that_it_opens_no_target(offered: str) -> None:
    """And not to look for the target in the agent's settings, where it may well be."""
    with pytest.raises(PermissionRefused, match=r"restricted sessions open no TCP target.*\[restrict\]"):
        check_offered("db", offered, "prod", restricted=True)
    assert "open no TCP target" in reason(StreamReset(ResetCode.FORBIDDEN), "tcp:db", restricted=True)
    assert "is it running" in reason(StreamReset(ResetCode.CONNECT_FAILED), "tcp:db", restricted=True)
    assert restricts_requests(Restrictions(until=7, verbs="get"))
    assert not restricts_requests(Restrictions(until=7))


def test_reasons_are_sentences() -> None:
    for code in ResetCode:
        assert reason(StreamReset(code), "tcp:db")
    assert "999" in reason(StreamReset(999), "tcp:db")
    assert reason(SessionEnded(GoawayCode.REVOKED, "it was revoked"), "tcp:db") == "it was revoked"
    assert reason(OSError(), "tcp:db") == "OSError"
