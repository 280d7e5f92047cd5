"""What the administrators' page costs sessions: the echo of a keystroke through a relay beside 0 and 50 open pages.

The pages are live streams of five administrators at the same relay, each with a question of its own, so that none is
rendered for another one; they are read as a browser reads them. The kinds alternate.

    python -m bench.studies.page --rounds 5 --seconds 30
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import statistics
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, suppress
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any, Final

import aiohttp

from arcbridge.relay.page.site import OWN_STREAMS
from arcbridge.tasks import cancel_and_wait
from bench.result import rounded
from bench.studies.base import Study, run_alone
from bench.studies.nearest import keystrokes, serve_echo
from tests.support.world import ALICE, ApiServer, World, fixed_port

PAGES: Final = 50
PAUSE: Final = 0.005
"""Seconds between two keystrokes."""
ADMINS: Final = tuple(f"admin-{number}" for number in range(PAGES // OWN_STREAMS))
ADMIN: Final = f'\n[[admin]]\nusers = {[f"{name}@example.com" for name in ADMINS]}\nclusters = ["*"]\nwhat = ["read"]\n'


class Page(Study):
    """Issue 24, point 2."""

    name = "page"
    title = f"a keystroke beside {PAGES} open pages of administrators, and beside none"
    expected_s = 330.0

    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        runs: list[dict[str, Any]] = []
        with ExitStack() as stack:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            threading.Thread(target=serve_echo, args=(server,), daemon=True).start()
            (directory / "token").write_text("an-unused-token")
            api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=directory / "token")
            world = stack.enter_context(World(api, directory=directory / "world"))
            world.targets["echo"] = (f"127.0.0.1:{server.getsockname()[1]}", ALICE.groups)
            world.relay_settings, world.policy = 'page.client_id = "page"', world.policy + ADMIN
            world.start()
            cookies = []
            for name in ADMINS:
                world.issuer.settings(auto_login=name)
                cookies.append(_log_in(world))
            _, port = world.start_forward("echo")
            for turn in range(rounds):
                for pages in (0, PAGES) if turn % 2 else (PAGES, 0):
                    with _Pages(world, cookies, pages) as opened:
                        trips = keystrokes(port, seconds, pause=PAUSE, warm=100)
                        events = opened.events
                    ordered = sorted(trips)
                    p99 = ordered[len(ordered) * 99 // 100] * 1000
                    p50 = statistics.median(ordered) * 1000
                    runs.append({"pages": pages, "events": events, "p50_ms": rounded(p50), "p99_ms": rounded(p99)})
                    print(f"  {runs[-1]}", file=sys.stderr)
        found = {
            (name, pages): statistics.median(one[name] for one in runs if one["pages"] == pages)
            for name in ("p50_ms", "p99_ms")
            for pages in (0, PAGES)
        }
        values = {
            "none_p50_ms": found["p50_ms", 0], "pages_p50_ms": found["p50_ms", PAGES],
            "none_p99_ms": found["p99_ms", 0], "pages_p99_ms": found["p99_ms", PAGES],
            "p99_ratio": found["p99_ms", PAGES] / found["p99_ms", 0],
        }  # fmt: skip
        return {"values": {name: rounded(value) for name, value in values.items()}, "runs": runs, "notes": []}


def _context(world: World) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=world.issuer.ca_file)
    context.load_verify_locations(world.relay_config.parent / "data" / "ca.crt")
    return context


def _log_in(world: World) -> str:
    """Return the cookie of an administrator, whom the issuer logs in without asking."""
    jar = CookieJar()
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=_context(world)),
        urllib.request.HTTPCookieProcessor(jar),
    )
    with opener.open(f"{world.relay_url}/page/login", timeout=30) as answer:
        assert world.cluster in answer.read().decode()
    return "; ".join(f"{one.name}={one.value}" for one in jar)


class _Pages:
    """Pages that are open, in a thread of their own."""

    def __init__(self, world: World, cookies: list[str], count: int) -> None:
        self._url, self._count = f"{world.relay_url}/page/events", count
        self._cookies, self._context = cookies, _context(world)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._over = asyncio.Event()
        self.events = 0

    def __enter__(self) -> _Pages:
        self._thread.start()
        self._reading = asyncio.run_coroutine_threadsafe(self._read_all(), self._loop)
        end = time.monotonic() + 60
        while self.events < self._count:
            if self._reading.done() and self._count:
                self._reading.result()
            if time.monotonic() > end:
                raise TimeoutError(f"{self.events} of {self._count} pages are live")
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        with suppress(Exception):  # the study has an error of its own, or had it from `__enter__`
            self._reading.result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _read_all(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, ssl=self._context)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
            tasks = [asyncio.create_task(self._read(session, number)) for number in range(self._count)]
            over = asyncio.create_task(self._over.wait())
            done, _ = await asyncio.wait({over, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            await cancel_and_wait(*tasks, over)
            for task in done - {over}:
                task.result()

    async def _read(self, session: aiohttp.ClientSession, number: int) -> None:
        headers = {"Cookie": self._cookies[number % len(self._cookies)], "Sec-Fetch-Site": "same-origin"}
        while True:  # as a browser does, which begins a stream again that has ended
            async with session.get(f"{self._url}?q={number}", headers=headers) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    self.events += line.startswith(b"event: now")


if __name__ == "__main__":
    run_alone(Page(), rounds=5, seconds=30.0)
