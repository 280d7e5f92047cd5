"""A login, and who sits before it: a terminal that is read, a browser that follows redirects, an issuer by a script."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import trustme
from aiohttp import web

from arcbridge.client.credentials.login import Login
from arcbridge.client.credentials.token_cache import TokenCache
from arcbridge.settings.config import LoginConfig
from tests.support.issuer import Issuer


class Terminal:
    """A terminal that reads the lines it shows, and acts on them as a person does."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.lines: list[str] = []
        self.waits: list[float] = []
        """The seconds of each wait that was shown."""
        self.acts = True
        self.denies = False

    def say(self, line: str) -> None:
        self.lines.append(line)
        code = re.search(r"enter the code (\S+)", line)
        if code and self.acts:
            self.issuer.deny(code[1]) if self.denies else self.issuer.approve(code[1])

    def waiting(self, text: str, limit: float) -> AbstractContextManager[object]:
        self.waits.append(limit)
        return nullcontext()


def login_of(
    config: LoginConfig, directory: Path, say: Callable[[str], object], browser: Any = None, **more: Any
) -> Login:
    cache = TokenCache(directory, "r", config)
    return Login(config, cache, say=say, open_browser=browser, environment={}, **{"poll_least": 0, **more})


def make(issuer: Issuer, directory: Path, person: Terminal | None = None, browser: Any = None, **more: Any) -> Login:
    """A login at an issuer by a device code, unless other settings are given."""
    usual = {"issuer": issuer.url, "client_id": "cli", "ca_file": issuer.ca_file, "grant_type": "device-code"}
    config = LoginConfig(**(usual | {"redirect_port": 0} | more))
    person = person or Terminal(issuer)
    return login_of(config, directory, person.say, browser, waiting=person.waiting)


async def browse(url: str, issuer: Issuer, *, change: dict[str, str] | None = None) -> tuple[int, str]:
    """Do as a browser: post the issuer's page and follow its redirect to loopback."""
    parts = urlsplit(url)
    status, location = await asyncio.to_thread(issuer.request, "GET", f"{parts.path}?{parts.query}")
    assert status == 303, location
    back = urlsplit(location)
    query = {key: values[0] for key, values in parse_qs(back.query).items()} | (change or {})
    answer = await come_back(back.port, f"{back.path or '/'}?{urlencode(query)}")
    return int(answer.split()[1]), answer


async def come_back(port: int | None, target: str) -> str:
    """Return what the listener on loopback answers to a browser that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return answer


def with_browser(
    issuer: Issuer,
    directory: Path,
    visit: Callable[[str], Awaitable[Any]] | None = None,
    *,
    change: dict[str, str] | None = None,
    **more: Any,
) -> Login:
    """A login by the authorization code flow; its `visits` are tasks of a browser that does at each URL as `visit`
    says, or follows every redirect. `change`: of parameters of the URL."""
    visits: list[asyncio.Future[Any]] = []

    async def browser(url: str) -> bool:
        for name, value in (change or {}).items():
            url = re.sub(rf"{name}=[^&]+", f"{name}={value}", url)
        visits.append(asyncio.ensure_future(visit(url) if visit is not None else browse(url, issuer)))
        return True

    login = make(issuer, directory, browser=browser, **({"grant_type": "authcode"} | more))
    login.visits = visits
    return login


@asynccontextmanager
async def serving(ca_file: Path, *routes: web.RouteDef) -> AsyncIterator[str]:
    """Serve over TLS on loopback, with a new CA in `ca_file`; the URL."""
    authority, context, app = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), web.Application()
    authority.cert_pem.write_to_path(str(ca_file))
    authority.issue_cert("127.0.0.1").configure_cert(context)
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class TokenEndpoint:
    """An issuer that answers each form with what comes next of `answers`, and keeps the DPoP headers that it got."""

    def __init__(self, *answers: tuple[int, dict[str, object], str]) -> None:
        self.answers = list(answers)
        self.seen: list[str | None] = []
        self.forms: list[dict[str, object]] = []
        self.metadata: dict[str, object] = {"dpop_signing_alg_values_supported": ["RS256", "ES256"]}
        self.url = ""
        self.text = ""
        """What is answered instead."""

    async def discovery(self, request: web.Request) -> web.Response:
        ends = {name: f"{self.url}/{name}" for name in ("token_endpoint", "device_authorization_endpoint")}
        return web.json_response({"issuer": self.url, **ends, **self.metadata})

    async def answer(self, request: web.Request) -> web.Response:
        self.seen.append(request.headers.get("DPoP"))
        self.forms.append(dict(await request.post()))
        if self.text:
            return web.Response(text=self.text, status=502)
        status, document, nonce = self.answers.pop(0)
        return web.json_response(document, status=status, headers={"DPoP-Nonce": nonce} if nonce else {})

    @asynccontextmanager
    async def serving(self, directory: Path, **settings: Any) -> AsyncIterator[LoginConfig]:
        """Serve; the settings of a login there."""
        routes = web.get("/.well-known/openid-configuration", self.discovery), web.post("/{path:.*}", self.answer)
        async with serving(directory / "ca.pem", *routes) as self.url:
            yield LoginConfig(issuer=self.url, client_id="cli", ca_file=directory / "ca.pem", **settings)
