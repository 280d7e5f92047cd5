"""A real browser without a window: Chromium, driven by the Chrome DevTools Protocol.

    async with Chromium(tmp_path / "browser", trusted=[certificate_pem]) as browser:
        await browser.open(url)
        await browser.type("#username", "anna")
        await browser.click("#login")
        assert "Welcome" in await browser.text_with("Welcome")

It knows no other certificates than those given and the system's, speaks to no proxy, and has a profile of its own.
`tests/support/browser.py` is for single pages, and for what an attacker's pages try.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.browser import chromium
from tests.support.processes import ManagedProcess, ProcessFailed

PATIENCE = 30.0
"""Seconds for a page to have what is waited for."""
_FLAGS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-proxy-server", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-port=0",
)


class Chromium:
    """One browser with one page. `trusted`: certificates (PEM) that it takes from servers besides those of the system's
    CAs."""

    def __init__(self, directory: Path, *, trusted: Sequence[bytes] = ()) -> None:
        self._directory = directory
        self._profile = directory / "profile"
        self._profile.mkdir(parents=True)
        keys = ",".join(_key_hash(pem) for pem in trusted)
        argv = [chromium(), *_FLAGS, f"--user-data-dir={self._profile}"]
        if keys:
            argv.append(f"--ignore-certificate-errors-spki-list={keys}")
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            argv.append("--no-sandbox")  # Chromium's sandbox refuses to be root's
        self._argv = [*argv, "about:blank"]
        self._numbers = itertools.count(1)
        self._process: ManagedProcess
        self._session: aiohttp.ClientSession
        self._page: aiohttp.ClientWebSocketResponse

    async def __aenter__(self) -> Self:
        environment = {"HOME": str(self._directory), "DISPLAY": None, "XDG_CONFIG_HOME": None, "XDG_CACHE_HOME": None}
        self._process = ManagedProcess(self._argv, log_dir=self._directory, name="chromium", env=environment)
        try:
            line = await self._process.line(r"DevTools listening on ws://(127\.0\.0\.1:\d+)/", timeout=PATIENCE)
            self._session = aiohttp.ClientSession()
            try:
                async with asyncio.timeout(PATIENCE):
                    self._page = await self._session.ws_connect(await self._first_page(line[1]), max_msg_size=0)
            except BaseException:
                await self._session.close()
                raise
        except BaseException:
            self._process.kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._page.close()
        await self._session.close()
        await asyncio.to_thread(self._process.stop)

    # -- acting -------------------------------------------------------------------------------------------------------

    async def open(self, url: str) -> None:
        """Go to a page, as if its address was typed."""
        answer = await self._ask("Page.navigate", url=url)
        if "errorText" in answer:
            raise ProcessFailed(f"{url}: {answer['errorText']}\n{self._process.tail()}")

    async def type(self, selector: str, text: str) -> None:
        """Type into a field of the page, once it is there."""
        await self._until(f"!!document.querySelector({json.dumps(selector)})")
        await self._run(f"document.querySelector({json.dumps(selector)}).focus()")
        await self._ask("Input.insertText", text=text)

    async def click(self, selector: str) -> None:
        """Click on what is at `selector`, once it is there."""
        await self._until(f"!!document.querySelector({json.dumps(selector)})")
        await self._run(f"document.querySelector({json.dumps(selector)}).click()")

    async def text_with(self, part: str) -> str:
        """Return the page's text once it has `part`."""
        await self._until(f"document.body && document.body.innerText.includes({json.dumps(part)})")
        return str(await self._run("document.body.innerText"))

    async def address(self) -> str:
        """Return where the browser is."""
        return str(await self._run("location.href"))

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _first_page(self, address: str) -> str:
        """Return where the page is led; the browser may listen before it has one."""
        while True:
            async with self._session.get(f"http://{address}/json/list") as answer:
                for one in await answer.json():
                    if one["type"] == "page":
                        return str(one["webSocketDebuggerUrl"])
            await asyncio.sleep(0.02)

    async def _until(self, condition: str) -> None:
        deadline = time.monotonic() + PATIENCE
        ready = f"document.readyState === 'complete' && {condition}"
        while not await self._run(ready):
            if time.monotonic() > deadline:
                seen = await self._run("location.href + '\\n' + (document.body ? document.body.innerText : '')")
                raise ProcessFailed(f"not within {PATIENCE:.0f} s: {condition}\n{seen}")
            await asyncio.sleep(0.02)

    async def _run(self, expression: str) -> Any:
        answer = await self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        # Between two pages there is nothing to evaluate in: as if the condition did not hold yet.
        return answer.get("result", {}).get("value")

    async def _ask(self, method: str, **parameters: object) -> dict[str, Any]:
        number = next(self._numbers)
        await self._page.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(PATIENCE):
            while True:
                answer = await self._page.receive_json()
                if answer.get("id") == number:
                    result: dict[str, Any] = answer.get("result", {})
                    return result


def _key_hash(certificate: bytes) -> str:
    key = x509.load_pem_x509_certificate(certificate).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(spki).digest()).decode()
