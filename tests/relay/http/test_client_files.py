"""What the relay serves of a directory of clients, over real sockets; tests/e2e/test_client_download.py runs it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from arcbridge.relay.admission import Ticket
from arcbridge.relay.http import client_files
from arcbridge.relay.http.answers import set_headers
from arcbridge.relay.http.client_files import ADDRESS_RATE, CHUNK, HEADER, RATE, ClientFiles, DownloadRate
from arcbridge.relay.http.server import HttpApiServer
from tests.relay.station import places

HEAD = b"#!/bin/sh\n# arcbridge 1.2.3, the client, for linux-x86_64. Behind this script ...\n"
BODY = HEAD + os.urandom(400_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


class Served:
    """One application with the routes, on loopback."""

    def __init__(self, port: int, files: ClientFiles) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.files = files
        self.spent = 0
        """Requests that were counted."""

    def count(self) -> None:
        self.spent += 1

    async def get(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[int, bytes, aiohttp.typedefs.LooseHeaders]:
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method, self.url + path, headers={k.replace("_", "-"): v for k, v in headers.items()}
            ) as got,
        ):
            return got.status, await got.read(), got.headers


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "clients"
    directory.mkdir(mode=0o755)
    (directory / "arcbridge-linux-x86_64").write_bytes(BODY)
    (directory / "SHA256SUMS").write_text("not a client")
    return directory


@pytest.fixture
async def serve(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[Path | None], object]]:
    monkeypatch.setattr(client_files, "LOOK_INTERVAL", 0.0)
    async with contextlib.AsyncExitStack() as stack:

        async def begin(directory: Path | None) -> Served:
            files = ClientFiles(directory, lambda request: served.count())
            app = web.Application()
            app.on_response_prepare.append(set_headers)
            app.router.add_get("/v1/clusters", _clusters)
            files.install(app)
            api, admission = HttpApiServer(app), places()

            def ticket() -> Ticket:
                found = admission.enter("127.0.0.1")
                assert isinstance(found, Ticket)
                return found

            await api.start()
            stack.push_async_callback(api.close, 0.1)
            server = await asyncio.get_running_loop().create_server(lambda: api(ticket()), "127.0.0.1", 0)
            stack.callback(server.close)
            served = Served(server.sockets[0].getsockname()[1], files)
            return served

        yield begin


async def _clusters(request: web.Request) -> web.Response:
    return web.json_response([])


async def test_the_list_names_platform_version_and_sum(serve, directory: Path) -> None:
    served = await serve(directory)
    async with aiohttp.ClientSession() as session, session.get(served.url + "/client/") as answer:
        assert await answer.json() == [
            {
                "platform": "linux-x86_64",
                "version": "1.2.3",
                "sha256": DIGEST,
                "size": len(BODY),
                "path": "/client/linux-x86_64",
            }
        ]


async def test_a_directory_on_a_disk_that_stalls_holds_up_no_list_of_clusters(
    serve, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, hold, looks = await serve(directory), threading.Event(), []

    def stalls(directory: Path) -> dict[str, object]:
        looks.append(directory)
        hold.wait(30)
        return {}

    monkeypatch.setattr(client_files, "LOOK_WAIT", 0.01)
    monkeypatch.setattr(served.files, "_look_again", stalls)
    try:
        async with asyncio.timeout(10):
            for _ in range(3):
                assert (await served.get("/v1/clusters"))[0] == 200
        assert len(looks) == 1
    finally:
        hold.set()


async def test_a_download_and_its_sum(serve, directory: Path) -> None:
    served = await serve(directory)
    status, body, headers = await served.get("/client/linux-x86_64")
    assert (status, body) == (200, BODY)
    assert headers["Content-Length"] == str(len(BODY))
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, body, _ = await served.get("/client/linux-x86_64.sha256")
    assert (status, body.decode()) == (200, f"{DIGEST}  arcbridge\n")


async def test_head_and_other_methods(serve, directory: Path) -> None:
    served = await serve(directory)
    status, body, headers = await served.get("/client/linux-x86_64", "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(BODY)))
    assert (await served.get("/client/linux-x86_64", "POST"))[0] == 405


@pytest.mark.parametrize(
    "path",
    [
        "/client/linux-aarch64",
        "/client/SHA256SUMS",
        "/client/../secret",
        "/client/..%2fsecret",
        "/client/%2e%2e/secret",
        "/client/linux-x86_64/",
        "/client/linux-x86_64%00",
        "/client/.sha256",
        "/client",
    ],
)
async def test_nothing_else_is_served(serve, directory: Path, path: str) -> None:
    (directory.parent / "secret").write_text("secret")
    served = await serve(directory)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 404 "), answer
    assert b"secret" not in answer


async def test_without_a_directory_there_are_no_paths(serve) -> None:
    served = await serve(None)
    assert (await served.get("/client/"))[0] == 404
    _, _, headers = await served.get("/v1/clusters")
    assert HEADER not in headers


async def test_clients_learn_the_version_where_they_ask_for_clusters(serve, directory: Path) -> None:
    other = directory / "arcbridge-win32-amd64.exe"
    other.write_bytes(b"MZ")
    (directory / "arcbridge-win32-amd64.exe.version").write_text("1.3.0\n")
    served = await serve(directory)
    _, _, headers = await served.get("/v1/clusters")
    assert headers[HEADER] == "linux-x86_64=1.2.3,win32-amd64=1.3.0"
    _, _, headers = await served.get("/client/")
    assert HEADER not in headers


async def test_a_new_file_is_taken_over(serve, directory: Path) -> None:
    served = await serve(directory)
    await served.files.look()
    new = BODY.replace(b"1.2.3", b"1.2.4")
    (directory / "new").write_bytes(new)
    (directory / "new").rename(directory / "arcbridge-linux-x86_64")
    (file,) = (await served.files.look()).values()
    assert (file.version, file.sha256) == ("1.2.4", hashlib.sha256(new).hexdigest())
    (directory / "arcbridge-linux-x86_64").unlink()
    assert await served.files.look() == {}


async def test_a_file_that_was_replaced_meanwhile_is_not_sent(
    serve, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes would not be those of the sum that was told."""
    served = await serve(directory)
    await served.files.look()
    monkeypatch.setattr(client_files, "LOOK_INTERVAL", 3600.0)
    (directory / "arcbridge-linux-x86_64").write_bytes(BODY + b"!")
    status, body, headers = await served.get("/client/linux-x86_64")
    assert (status, headers["Retry-After"]) == (503, "2")
    assert b"replaced" in body
    status, body, _ = await served.get("/client/linux-x86_64")
    assert (status, body) == (200, BODY + b"!"), "it was looked at anew"


async def test_one_that_takes_nothing_keeps_no_other_from_downloading(serve, directory: Path) -> None:
    with (directory / "arcbridge-linux-aarch64").open("wb") as file:
        file.truncate(64 * 1024**2)  # beyond what sockets hold
    served = await serve(directory)
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(b"GET /client/linux-aarch64 HTTP/1.1\r\nHost: x\r\n\r\n")
        slow.setblocking(False)
        assert (await asyncio.get_running_loop().sock_recv(slow, 100)).startswith(b"HTTP/1.1 200 ")
        assert (await served.get("/client/linux-x86_64"))[1] == BODY


async def test_requests_of_an_address_are_bounded(serve, directory: Path) -> None:
    served = await serve(directory)
    for path in ("/client/", "/client/linux-x86_64", "/client/linux-x86_64.sha256"):
        await served.get(path, "HEAD")
    assert served.spent == 3, "as those of every path without a credential: tests/relay/http/test_api_limits.py"


async def test_bytes_per_second_are_bounded(serve, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(client_files, "RATE", 200_000)
    # The time stands still: what the machine takes for the download would be bytes that may be sent.
    monkeypatch.setattr(client_files, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    served = await serve(directory)
    monkeypatch.setattr(client_files.asyncio, "sleep", sleep)
    assert (await served.get("/client/linux-x86_64"))[1] == BODY
    assert max(waits) == pytest.approx(1.0, abs=0.01), "400,000 bytes with a burst of 200,000 and as many a second"


async def test_l10_what_is_not_sent_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_files, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    rate = DownloadRate()
    rate.bytes.take(1000.0, RATE)
    waits = [asyncio.ensure_future(rate.wait(f"10.0.0.{number % 100}", CHUNK)) for number in range(1000)]
    await asyncio.sleep(0)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    assert rate.bytes.wait(1000.0, CHUNK) == CHUNK / RATE, "one chunk: nobody is before it"


async def test_l10_an_address_delays_another_one_by_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    now, yield_turn = 1000.0, asyncio.sleep

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        await yield_turn(0)

    monkeypatch.setattr(client_files, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(client_files.asyncio, "sleep", sleep)
    rate, sent = DownloadRate(), list[str]()

    async def send(address: str) -> None:
        await rate.wait(address, CHUNK)
        sent.append(address)

    rate.bytes.take(now, RATE)
    await asyncio.gather(*(send("10.0.0.1") for _ in range(100)), send("10.0.0.2"))
    assert sent.index("10.0.0.2") <= 1
    begun = now
    await asyncio.gather(*(send("10.0.0.1") for _ in range(ADDRESS_RATE // CHUNK * 3)))
    assert now - begun > 1.9, "three bursts, of which the first one may be there"


async def test_a_file_that_others_can_change_is_not_offered(serve, directory: Path) -> None:
    (directory / "arcbridge-linux-x86_64").chmod(0o666)
    served = await serve(directory)
    assert await served.files.look() == {}
    (directory / "arcbridge-linux-x86_64").chmod(0o644)
    assert list(await served.files.look()) == ["linux-x86_64"]


async def test_what_is_no_file_is_not_offered(serve, directory: Path) -> None:
    (directory / "arcbridge-linux-aarch64").mkdir()
    (directory / "arcbridge-darwin-arm64").touch()
    (directory / "arcbridge-Linux-x86").write_bytes(BODY)
    served = await serve(directory)
    assert list(await served.files.look()) == ["linux-x86_64"]
