"""Syslog messages, read by a parser that was written from the RFCs, and by rsyslog; and receivers that lie."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.audit.chain import Chain, read_line
from arcbridge.audit.sinks import syslog
from arcbridge.audit.sinks.collector import CollectorFailed
from arcbridge.audit.sinks.syslog import SyslogTransport, message
from arcbridge.audit.sinks.tail import LogRecord
from arcbridge.settings.config import AuditSinkConfig
from tests.support.collector import Collector
from tests.support.collector_program import parse
from tests.support.eventually import until

CA = trustme.CA()


def records(*texts: str) -> list[LogRecord]:
    chain = Chain()
    found = []
    for text in texts:
        line = chain.seal(json.dumps({"ts": "2026-11-29T08:00:00.123Z", "event": "audit", "text": text},
                                     ensure_ascii=False))  # fmt: skip
        sealed = read_line(line)
        assert sealed is not None
        found.append(LogRecord(line, sealed))
    return found


def read(framed: bytes) -> dict[str, object]:
    count, _, rest = framed.partition(b" ")
    assert int(count) == len(rest), "octets are counted"
    return parse(rest)


@given(text=st.text(max_size=3000), host=st.text(max_size=300), most=st.sampled_from([2048, 8192]))
def test_a_message_is_what_the_rfcs_say(text: str, host: str, most: int) -> None:
    (record,) = records(text)
    found = read(
        message(record, AuditSinkConfig(facility=13, severity=5, max_message=most), host=host, app="arcbridge")
    )
    assert found["pri"] == str(13 * 8 + 5)
    assert (found["time"], found["id"], found["proc"]) == (
        "2026-11-29T08:00:00.123Z", "audit", record.sealed.head.chain,
    )  # fmt: skip
    data = found["sd"]
    assert isinstance(data, dict)
    assert (data["chain"], data["seq"], data["hash"]) == (record.sealed.head.chain, "0", record.sealed.head.hash)
    assert int(str(found["bytes"])) <= most
    whole = record.text.decode()
    if "cut" in data:
        sent = str(found["msg"]).encode()
        assert len(sent) + int(data["cut"]) == len(record.text)
        assert record.text.startswith(sent)
    else:
        assert found["msg"] == whole


def test_a_long_record_is_cut_and_says_so() -> None:
    (record,) = records("ä" * 9000)
    found = read(message(record, AuditSinkConfig(), host="h", app="a"))
    assert 8192 - 64 < int(str(found["bytes"])) <= 8192
    assert "cut" in dict(found["sd"])


def test_odd_times_and_events_do_not_break_the_header() -> None:
    chain = Chain()
    line = chain.seal('{"ts":"yesterday [at] noon","event":"a b]\\n"}')
    sealed = read_line(line)
    assert sealed is not None
    found = read(message(LogRecord(line, sealed), AuditSinkConfig(), host="", app="a"))
    assert (found["time"], found["id"], found["host"]) == ("-", "ab]", "-")


async def test_rsyslog_takes_them(tmp_path: Path) -> None:
    with Collector("rsyslog", tmp_path / "collector") as collector:
        sink = AuditSinkConfig(kind="syslog", address=f"127.0.0.1:{collector.port}", ca_file=collector.ca)
        sent = records("plain", "Jürgen", "x" * 7000, *map(str, range(50)))
        await SyslogTransport(sink, "relay").send(sent)
        await until(lambda: len(collector.lines) == len(sent))
        for record, line in zip(sent, collector.lines, strict=True):
            data, _, text = line.partition("\t")
            assert f'hash="{record.sealed.head.hash}"' in data
            assert text.lstrip("\ufeff") == record.text.decode()


# -- receivers that lie, or die ----------------------------------------------------------------------------------------

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def receiving(serve: Serve, tmp_path: Path) -> AsyncIterator[SyslogTransport]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("127.0.0.1").configure_cert(context)
    CA.cert_pem.write_to_path(tmp_path / "ca.pem")
    tasks = set[asyncio.Task[None]]()

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (OSError, ssl.SSLError):
            return

    server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    try:
        yield SyslogTransport(
            AuditSinkConfig(kind="syslog", address=f"127.0.0.1:{port}", ca_file=tmp_path / "ca.pem", timeout=5), "relay"
        )
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


MUCH = records(*["x" * 1000] * 3000)


def read_a_part(connection: ssl.SSLSocket) -> None:
    connection.recv(1000)


def end_in_order(connection: ssl.SSLSocket) -> None:
    """Send close_notify, and wait for nothing."""
    connection.recv(1000)
    connection.setblocking(False)
    with contextlib.suppress(OSError):
        connection.unwrap()


def read_nothing(_: ssl.SSLSocket) -> None:
    return


async def send_to(serve: Callable[[ssl.SSLSocket], None], tmp_path: Path, *, close_notify: bool = True) -> None:
    """Send to a receiver whose kernel closes the connection, as it does for a process that is killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("127.0.0.1").configure_cert(context)
    CA.cert_pem.write_to_path(tmp_path / "ca.pem")

    def run() -> None:
        connection, _ = server.accept()
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
            serve(secured)

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        sink = AuditSinkConfig(
            kind="syslog", address=address, ca_file=tmp_path / "ca.pem", timeout=5, close_notify=close_notify
        )
        ended = asyncio.create_task(asyncio.to_thread(run))
        try:
            await SyslogTransport(sink, "relay").send(MUCH)
        finally:
            await ended


@pytest.mark.parametrize("serve", [read_a_part, end_in_order, read_nothing])
async def test_a50_a_receiver_that_ends_before_it_has_read_has_nothing(
    serve: Callable[[ssl.SSLSocket], None], tmp_path: Path
) -> None:
    for close_notify in (True, False):
        with pytest.raises((CollectorFailed, OSError)):
            await send_to(serve, tmp_path, close_notify=close_notify)


async def test_a_receiver_that_reads_everything_has_everything(tmp_path: Path) -> None:
    got = bytearray()

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            got.extend(data)
        writer.close()

    async with receiving(slowly, tmp_path) as transport:
        await transport.send(MUCH)
    assert got.count(b"<110>1 ") == len(MUCH)


async def test_a49_an_end_without_close_notify_is_no_answer(tmp_path: Path) -> None:
    """Another host on the path can take every byte, and send FIN in the receiver's place."""

    def read_all(connection: ssl.SSLSocket) -> None:
        while connection.recv(65536):
            pass

    with pytest.raises(CollectorFailed, match="without close_notify"):
        await send_to(read_all, tmp_path)
    await send_to(read_all, tmp_path, close_notify=False)


async def test_a48_a_receiver_that_sends_without_end_is_left(tmp_path: Path) -> None:
    async def talkative(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with receiving(talkative, tmp_path) as transport:
        with pytest.raises(CollectorFailed, match="sends data"):
            await transport.send(records("a"))


async def test_another_ca_is_refused_and_gets_nothing(tmp_path: Path) -> None:
    got = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read())

    async with receiving(serve, tmp_path) as transport:
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
        with pytest.raises(CollectorFailed, match="its certificate is not good"):
            await transport.send(records("a"))
    assert not any(got)


def test_the_word_of_a_header_is_never_empty() -> None:
    assert syslog._word("ä b", 5) == "b"
    assert syslog._word("ä", 5) == "-"
