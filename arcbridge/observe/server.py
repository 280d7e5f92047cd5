"""The listener for machines that watch: /metrics, /livez, /readyz, /healthz, /statusz.

It is a listener of its own, on loopback by default, so that nothing of it is reachable where clients and agents
connect. It has no authentication: what it answers holds no user, path or secret. A web page gets nothing: requests that
a browser sends for one are refused, and so is a name that leads to loopback (DNS rebinding; docs/threats.md#W5).

| path | answers |
|---|---|
| `/livez`, `/healthz` | 200 `ok` while the event loop turns |
| `/readyz` | 200 `ok`, or 503 with one line per failed check; `?verbose` lists the others too |
| `/metrics` | Prometheus' text format, or OpenMetrics where the scraper asks for it |
| `/statusz` | version and start, as a page or as Kubernetes' object (`statusz`) |
"""

from __future__ import annotations

import asyncio
import ipaddress
import platform
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from arcbridge.build import build
from arcbridge.errors import ConfigError

from . import logging as logs
from . import statusz
from .health import Checks
from .listen import bind_message, split_listen
from .metrics import Buckets, Metrics

PATHS: Final = ("/healthz", "/livez", "/metrics", "/readyz", "/statusz")

KEEPALIVE: Final = 75.0
"""Seconds: longer than the usual scrape interval of 15 to 60 s, so that a scraper keeps one connection."""

CONNECTIONS: Final = 64
"""Connections at a time, more than scrapers and probes need; beyond them the oldest gives its place to the newest. A
flood must not take the descriptors that the role itself needs."""

LAG_INTERVAL: Final = 0.25
LAG_BOUNDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Server": "arcbridge"}


class ObserveServer:
    """Serves `metrics` and `checks` on `listen` (`host:port`, `[::1]:port`, `:port`; empty: no listener).

    `start` and `stop` belong to the role; both are called on its loop.
    """

    def __init__(
        self,
        listen: str,
        metrics: Metrics,
        checks: Checks,
        *,
        gather: Callable[[], Awaitable[None]] | None = None,
        toggled: Callable[[], object] | None = None,
    ) -> None:
        """`gather` is awaited before each scrape: for metrics that other processes have. `toggled` is called after
        SIGUSR1 has switched the log."""
        self.listen = listen
        self.address = ""
        """`host:port` that is bound; empty before `start` and where there is no listener."""
        self._metrics = metrics
        self._checks = checks
        self._gather = gather
        self._began, self._since = time.time(), time.monotonic()
        self._toggled = toggled
        self._lag = LoopLag()
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        metrics.histogram("event_loop_delay_seconds", "How late the event loop ran a timer.", None,
                          lambda: self._lag.delays)  # fmt: skip
        metrics.counter("log_events_omitted_total", "Log events left out because many like them came at once.", None,
                        logs.omitted)  # fmt: skip
        metrics.counter("log_lines_dropped_total", "Log lines lost because their stream stalled or failed.", None,
                        logs.dropped)  # fmt: skip
        metrics.gauge("ready", "1 if every readiness check passes.", None, lambda: int(not self._checks.failures()))

    async def start(self) -> str:
        """Bind and serve; return the bound address (`""` without a listener).

        Raises ConfigError where the address is malformed, taken, or not allowed; it names the setting.
        """
        self._lag.start()
        self._toggle_on_signal()
        if not self.listen:
            return ""
        host, port = split_listen(self.listen)
        app = web.Application(client_max_size=1024, middlewares=[_refuse_pages])
        for path, answer in zip(PATHS, (self._live, self._live, self._scrape, self._ready, self._status), strict=True):
            app.router.add_get(path, answer)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, keepalive_timeout=KEEPALIVE,
                               shutdown_timeout=1.0)  # fmt: skip
        await runner.setup()
        assert runner.server is not None
        connections = _BoundedConnections(runner.server)
        try:
            # Not `web.TCPSite`, which takes no other factory of connections than its runner's own.
            self._listening = await asyncio.get_running_loop().create_server(connections, host, port)
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            await self.stop()
            raise ConfigError(bind_message(self.listen, error)) from error
        self._runner = runner
        bound_host, bound_port = self._listening.sockets[0].getsockname()[:2]
        self.address = f"[{bound_host}]:{bound_port}" if ":" in bound_host else f"{bound_host}:{bound_port}"
        return self.address

    async def stop(self) -> None:
        """Close the listener and its connections; may be called more than once."""
        self._lag.stop()
        if self._loop is not None:
            self._loop.remove_signal_handler(signal.SIGUSR1)
            self._loop = None
        runner, self._runner = self._runner, None
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.close()
        if runner is not None:
            await runner.cleanup()

    def _toggle_on_signal(self) -> None:
        """SIGUSR1 switches the log between debug and the configured level, where the platform has such a signal."""
        number = getattr(signal, "SIGUSR1", None)
        if number is None or threading.current_thread() is not threading.main_thread():
            return
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(number, self._toggle)

    def _toggle(self) -> None:
        logs.toggle_debug()
        if self._toggled is not None:
            self._toggled()

    async def _live(self, request: web.Request) -> web.Response:
        return _plain("ok\n")

    async def _ready(self, request: web.Request) -> web.Response:
        results = self._checks.run()
        failed = [result for result in results if result.reason is not None]
        if not failed and "verbose" not in request.query:
            return _plain("ok\n")
        shown = results if "verbose" in request.query else failed
        lines = [
            f"[+] {result.name}: ok" if result.reason is None else f"[-] {result.name}: {result.reason}"
            for result in shown
        ]
        lines.append("not ready" if failed else "ready")
        return _plain("\n".join(lines) + "\n", 503 if failed else 200)

    async def _status(self, request: web.Request) -> web.Response:
        component, up = f"arcbridge-{self._metrics.role}", time.monotonic() - self._since
        wants_object = statusz.is_object(request.headers.get("Accept", ""))
        if wants_object is None:
            return _plain(f"text/plain is here, and {statusz.OBJECT}\n", 406)
        if wants_object:
            text = statusz.document(component, self._began, up, build(), PATHS)
            return web.Response(text=text, headers=_HEADERS, content_type="application/json")
        versions = {"Python version": platform.python_version(), "Binary version": build()}
        return _plain(statusz.page(component, self._began, up, versions, PATHS))

    async def _scrape(self, request: web.Request) -> web.Response:
        if self._gather is not None:
            await self._gather()
        body, content_type = self._metrics.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={**_HEADERS, "Content-Type": content_type})


class _BoundedConnections:
    """Makes the protocol of each connection, and closes the oldest ones where there are too many."""

    def __init__(self, server: web.Server) -> None:
        self._server = server

    def __call__(self) -> asyncio.Protocol:
        # One that is being closed stays among them for a turn of the loop.
        connections = [one for one in self._server.connections if one.transport is not None]
        for oldest in connections[: max(len(connections) - CONNECTIONS + 1, 0)]:
            oldest.force_close()
        return self._server()


@web.middleware
async def _refuse_pages(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer 403 to what a browser sends for a page.

    Over plain HTTP a browser marks only some requests (`Origin`). A page whose name has been made to lead here is of
    the same origin and marks none, but it has that name in `Host`, and on loopback no name but `localhost` is ours. In
    other networks a scraper may know this process by any name.
    """
    near: tuple[str, ...] | None = request.transport.get_extra_info("sockname") if request.transport else None
    foreign = near is not None and ipaddress.ip_address(near[0]).is_loopback and not _is_local(request.host)
    if foreign or "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") != "none":
        return _plain("this is not for web pages\n", 403)
    return await handler(request)


def _is_local(host: str) -> bool:
    """Return whether a `Host` header has an address, which no foreign name server can have a part in, or
    `localhost`."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _plain(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, headers=_HEADERS)


class LoopLag:
    """`start` and `stop` are called on the loop that is measured; `delays` holds seconds."""

    def __init__(self, interval: float = LAG_INTERVAL) -> None:
        self.delays = Buckets(LAG_BOUNDS)
        self._interval = interval
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to measure; nothing happens if it already does."""
        if self._timer is None:
            self._loop = asyncio.get_running_loop()
            self._arm(self._loop)

    def stop(self) -> None:
        """End measuring; the counters stay."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + self._interval
        self._timer = loop.call_at(due, self._fired, loop, due)

    def _fired(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self.delays.observe(max(0.0, loop.time() - due))
        self._arm(loop)
