"""The listener for machines that watch, over real sockets."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp
import pytest
import structlog

from arcbridge.errors import ConfigError
from arcbridge.observe import logging as logs
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.server import CONNECTIONS, LoopLag, ObserveServer


@pytest.fixture
async def checks() -> Checks:
    return Checks()


@pytest.fixture
async def address(checks: Checks) -> AsyncIterator[str]:
    server = ObserveServer("127.0.0.1:0", Metrics("relay"), checks)
    yield await server.start()
    await server.stop()
    await server.stop()


async def get(url: str) -> tuple[int, str, dict[str, str]]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text(), dict(response.headers)


async def test_live_and_ready(address: str, checks: Checks) -> None:
    assert (await get(f"http://{address}/livez"))[:2] == (200, "ok\n")
    assert (await get(f"http://{address}/readyz"))[:2] == (200, "ok\n")
    reasons: list[str | None] = ["no relay is connected", None]
    checks.add("control", lambda: reasons[0])
    checks.add("keys", lambda: None)
    assert (await get(f"http://{address}/readyz"))[:2] == (503, "[-] control: no relay is connected\nnot ready\n")
    verbose = (503, "[-] control: no relay is connected\n[+] keys: ok\nnot ready\n")
    assert (await get(f"http://{address}/readyz?verbose"))[:2] == verbose
    assert (await get(f"http://{address}/healthz"))[:2] == (200, "ok\n")
    reasons.pop(0)
    assert (await get(f"http://{address}/readyz?verbose"))[:2] == (200, "[+] control: ok\n[+] keys: ok\nready\n")


async def test_metrics_name_role_and_readiness(address: str, checks: Checks) -> None:
    status, text, headers = await get(f"http://{address}/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert headers["Server"] == "arcbridge"
    assert "arcbridge_relay_ready 1.0" in text
    assert "arcbridge_relay_event_loop_delay_seconds_bucket" in text
    checks.add("down", lambda: "x")
    assert "arcbridge_relay_ready 0.0" in (await get(f"http://{address}/metrics"))[1]


async def test_other_paths_and_methods_are_refused(address: str) -> None:
    assert (await get(f"http://{address}/debug"))[0] == 404
    async with aiohttp.ClientSession() as session, session.post(f"http://{address}/livez", data=b"x") as response:
        assert response.status == 405


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/livez", "/statusz"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9464"}, 200),
        ({"Host": "LOCALHOST."}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:9464"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),  # an operator who types the address
        ({"Host": "rebound.example:9464"}, 403),
        ({"Host": "localhost.example"}, 403),
        ({"Host": "127.0.0.1.example:9464"}, 403),
        ({"Host": "127.0.0.1:9464", "Origin": "https://page.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 403),
    ],
)
async def test_w5_a_web_page_gets_nothing(address: str, path: str, headers: dict[str, str], status: int) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}{path}", headers=headers) as response:
        assert response.status == status
        assert (await response.text() == "this is not for web pages\n") == (status == 403)


async def test_w5_names_are_for_other_networks() -> None:
    """A scraper in the cluster may know a pod by a name of its own."""
    server = ObserveServer("0.0.0.0:0", Metrics("relay"), Checks())
    port = int((await server.start()).rpartition(":")[2])
    addresses: set[str] = set()
    with suppress(socket.gaierror):  # a container may not know its own name
        addresses = {str(one[4][0]) for one in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address, status in {"127.0.0.1": 403, **{one: 200 for one in addresses if not one.startswith("127.")}}.items():
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{address}:{port}/metrics", headers={"Host": "agent.pods.svc:9464"}) as response,
        ):
            assert response.status == status
    await server.stop()


async def test_w1_a_flood_of_connections_takes_the_places_of_its_oldest(address: str) -> None:
    host, port = address.rsplit(":", 1)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    held = [await asyncio.open_connection(host, int(port)) for _ in range(3 * CONNECTIONS)]
    assert (await get(f"http://{address}/livez"))[:2] == (200, "ok\n")
    async with asyncio.timeout(30):  # the ends that the server has cut come one by one
        while len(open_still := [reader for reader, _ in held if not reader.at_eof()]) > CONNECTIONS:
            await asyncio.sleep(0.01)
    assert open_still == [reader for reader, _ in held[-len(open_still) :]], "the oldest went"
    assert CONNECTIONS - 2 <= len(open_still) <= CONNECTIONS
    for _, writer in held:
        writer.close()
    if before:
        async with asyncio.timeout(30):
            while len(os.listdir("/proc/self/fd")) > before + 2:
                await asyncio.sleep(0.01)


async def test_stop_closes_the_listener_and_its_connections() -> None:
    server = ObserveServer("127.0.0.1:0", Metrics("relay"), Checks())
    host, port = (await server.start()).rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    await server.stop()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


async def test_ipv6_address_is_written_with_brackets() -> None:
    server = ObserveServer("[::1]:0", Metrics("relay"), Checks())
    try:
        address = await server.start()
    except ConfigError:
        pytest.skip("this machine has no IPv6 loopback")
    assert address.startswith("[::1]:")
    assert (await get(f"http://{address}/livez"))[0] == 200
    await server.stop()


async def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        server = ObserveServer(listen, Metrics("relay"), Checks())
        with pytest.raises(ConfigError, match=f"observe.listen '{listen}': the port is in use"):
            await server.start()
        await server.stop()


async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such address"):
        await ObserveServer("192.0.2.1:0", Metrics("relay"), Checks()).start()


async def test_sigusr1_switches_the_log_level_and_back() -> None:
    stream = io.StringIO()
    logs.configure("relay", "warning", "json", stream)
    server = ObserveServer("", Metrics("relay"), Checks())
    await server.start()
    try:
        for expected in ("debug", "warning"):
            os.kill(os.getpid(), signal.SIGUSR1)
            async with asyncio.timeout(30):
                while logs.level() != expected:
                    await asyncio.sleep(0)
    finally:
        await server.stop()
        logs.shutdown()
        structlog.reset_defaults()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert stream.getvalue().count("log.level_changed") == 2


async def test_a_blocked_loop_shows() -> None:
    lag = LoopLag(0.01)
    lag.start()
    lag.start()
    time.sleep(0.12)  # noqa: ASYNC251 - blocking the loop is what is measured
    while not sum(lag.delays.counts):
        await asyncio.sleep(0)
    lag.stop()
    assert lag.delays.total >= 0.1
    seen = sum(lag.delays.counts)
    await asyncio.sleep(0.05)
    assert sum(lag.delays.counts) == seen
    lag.stop()
