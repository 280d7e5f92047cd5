"""aiohttp applications on loopback, over TLS or without, in a thread with an event loop of its own.

It has no routes: a subclass says which applications it serves, each at a port. Nothing listens after the `with` block.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import trustme
from aiohttp import web


class AppThread:
    """The thread. `ca_pem` is the CA's certificate, `urls` has the URL of each application while the thread runs."""

    def __init__(self, ca_name: str | None = None, *, tls: bool = True) -> None:
        ca = trustme.CA(organization_name=ca_name)
        self.ca_pem = ca.cert_pem.bytes().decode()
        self.urls: list[str] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if self._context is not None:
            ca.issue_cert("127.0.0.1", "localhost").configure_cert(self._context)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runners: list[web.AppRunner] = []

    def served(self) -> Sequence[web.Application]:
        """Return what is to be served."""
        raise NotImplementedError

    async def _serve(self) -> None:
        for app in self.served():
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            self._runners.append(runner)
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._context).start()
            self.urls.append(f"http{'s' if self._context else ''}://127.0.0.1:{runner.addresses[0][1]}")

    async def _end(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
