"""Batches by HTTP, and collectors that lie: redirects, endless and packed answers, and answers that never come."""

from __future__ import annotations

import asyncio
import json
import ssl
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from arcbridge.audit.sinks.collector import CollectorFailed, RecordsRefused
from arcbridge.audit.sinks.http import HttpTransport
from arcbridge.errors import ArcbridgeError, StateError, Unreachable
from arcbridge.settings.config import AuditSinkConfig
from tests.audit.sinks.test_syslog import records
from tests.support.collector import Collector

CA = trustme.CA()


@asynccontextmanager
async def serving(answer: bytes, tmp_path: Path, *, endless: bytes = b"", secure: bool = True,
                  **settings: Any) -> AsyncIterator[tuple[HttpTransport, list[bytes]]]:  # fmt: skip
    """A server that answers these bytes to each request, and then `endless` again and again."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("127.0.0.1").configure_cert(context)
    CA.cert_pem.write_to_path(tmp_path / "ca.pem")
    seen: list[bytes] = []
    tasks = set[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            while endless:
                writer.write(endless)
                await writer.drain()
            await reader.read()
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context if secure else None)
    port = server.sockets[0].getsockname()[1]
    scheme = "https" if secure else "http"
    defaults: dict[str, Any] = {"kind": "http", "address": f"{scheme}://127.0.0.1:{port}/in", "timeout": 5.0}
    if secure:
        defaults["ca_file"] = tmp_path / "ca.pem"
    transport = HttpTransport(AuditSinkConfig(**(defaults | settings)))
    try:
        yield transport, seen
    finally:
        await transport.close()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(("kind", "packed"), [("lines", False), ("array", False), ("lines", True)])
async def test_a_real_server_has_what_was_sent(tmp_path: Path, kind: str, packed: bool) -> None:
    sent = records("plain", "Jürgen", "\u2028")
    with Collector("http", tmp_path / "collector") as collector:
        token = tmp_path / "token"
        token.write_text("word\n")
        transport = HttpTransport(
            AuditSinkConfig(
                kind="http",
                address=f"https://127.0.0.1:{collector.port}/services/collector/raw?channel=1",
                ca_file=collector.ca,
                format=kind,
                gzip=packed,
                token_file=token,
                token_scheme="Splunk",
            )
        )
        await transport.send(sent[:2])
        token.write_text("other")
        await transport.send(sent[2:])
        await transport.close()
        assert list(map(json.loads, collector.lines)) == [json.loads(one.text) for one in sent]
        if kind == "lines":
            assert collector.lines == [one.text.decode() for one in sent]
        first, second = collector.requests
        assert (first["path"], first["Authorization"], second["Authorization"]) == (
            "/services/collector/raw?channel=1", "Splunk word", "Splunk other",
        )  # fmt: skip
        assert ("Content-Encoding" in first) == packed


async def test_a47_a_redirect_is_not_followed(tmp_path: Path) -> None:
    async with serving(b"HTTP/1.1 307 x\r\nLocation: https://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", tmp_path) as (
        transport, seen,
    ):  # fmt: skip
        with pytest.raises(CollectorFailed, match="redirects are not followed"):
            await transport.send(records("a"))
        assert len(seen) == 1


@pytest.mark.parametrize("later", ["", "Retry-After: 7\r\n"])
@pytest.mark.parametrize("status", [400, 401, 413, 422, 429, 503])
async def test_what_an_answer_means(tmp_path: Path, status: int, later: str) -> None:
    kind = RecordsRefused if status in (400, 422) or (status, later) == (413, "") else CollectorFailed
    answer = f"HTTP/1.1 {status} x\r\n{later}Content-Length: 0\r\n\r\n".encode()
    async with serving(answer, tmp_path) as (transport, _):
        with pytest.raises(CollectorFailed) as caught:
            await transport.send(records("a"))
    assert type(caught.value) is kind
    if kind is CollectorFailed:
        assert caught.value.retry_after == (7 if later else None)


async def test_a48_an_answer_without_end_is_cut(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(head, tmp_path, endless=b"10000\r\n" + b"x" * 65536 + b"\r\n") as (transport, _):
        with pytest.raises(Unreachable, match="larger than"):
            await transport.send(records("a"))


async def test_a48_a_packed_answer_is_not_unpacked(tmp_path: Path) -> None:
    """One of 64 KiB that would be 64 MiB, and one of 4 KiB: neither takes more memory than it has bytes."""

    async def peak(size: int) -> int:
        packed = zlib.compressobj(9, wbits=31)
        body = packed.compress(bytes(size)) + packed.flush()
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
        async with serving(head + body, tmp_path) as (transport, seen):
            tracemalloc.start()
            await transport.send(records("a"))
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert b"Accept-Encoding: identity" in seen[0]
            return found

    await peak(1 << 10)
    assert await peak(64 << 20) < await peak(4 << 20) + (1 << 20)


async def test_a48_an_answer_that_never_comes_has_a_deadline(tmp_path: Path) -> None:
    async with serving(b"", tmp_path, timeout=0.2) as (transport, _):
        with pytest.raises(Unreachable, match="no complete answer"):
            await transport.send(records("a"))


async def test_another_ca_gets_nothing(tmp_path: Path) -> None:
    async with serving(b"", tmp_path) as (transport, seen):
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
        with pytest.raises(Unreachable, match="certificate"):
            await transport.send(records("a"))
        assert seen == []


async def test_http_without_tls_goes_to_this_machine_and_through_no_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", tmp_path, secure=False) as (transport, seen):
        await transport.send(records("a"))
        assert seen[0].startswith(b"POST /in ")


@pytest.mark.parametrize("content", [None, b"", b"two words", b"\xff"])
async def test_a_token_that_cannot_be_read_is_told_without_it(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    async with serving(b"", tmp_path, token_file=file) as (transport, seen):
        with pytest.raises(StateError) as caught:
            await transport.send(records("a"))
        assert isinstance(caught.value, ArcbridgeError)
        assert "words" not in caught.value.message
        assert seen == []


async def test_a_client_certificate_is_shown_and_read_anew(tmp_path: Path) -> None:
    """The context is made again where a file has changed, and kept where none has."""
    issued = CA.issue_cert("client")
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    async with serving(answer, tmp_path, certificate=certificate, key=key) as (transport, seen):
        await transport.send(records("a"))
        first = transport._context()
        assert transport._context() is first
        other = CA.issue_cert("client")
        certificate.unlink()
        other.cert_chain_pems[0].write_to_path(certificate)
        key.unlink()
        other.private_key_pem.write_to_path(key)
        assert transport._context() is not first
        assert len(seen) == 1
