"""A login, and who sits before it: a terminal that is read, a browser that follows redirects."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from arcbridge.client.credentials.login import Login
from arcbridge.client.credentials.token_cache import TokenCache
from arcbridge.settings.config import LoginConfig
from tests.support.issuer import Issuer


class Terminal:
    """A terminal that reads the lines it shows, and acts on them as a person does."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.lines: list[str] = []
        self.acts = True
        self.denies = False

    def say(self, line: str) -> None:
        self.lines.append(line)
        code = re.search(r"enter the code (\S+)", line)
        if code and self.acts:
            self.issuer.deny(code[1]) if self.denies else self.issuer.approve(code[1])


def make(
    issuer: Issuer,
    directory: Path,
    person: Terminal,
    *,
    browser: Any = None,
    ports: tuple[int, ...] = (0,),
    **more: Any,
) -> Login:
    settings: dict[str, Any] = {"grant_type": "device-code", **more}
    where, client = settings.pop("issuer", issuer.url), settings.pop("client_id", "cli")
    config = LoginConfig(issuer=where, client_id=client, ca_file=issuer.ca_file, **settings)
    return Login(
        config,
        TokenCache(
            directory, relay="r", issuer=config.issuer, client_id=client, scopes=config.scopes, audience=config.audience
        ),
        say=person.say,
        open_browser=browser,
        environment={},
        redirect_ports=ports,
    )


async def browse(url: str, issuer: Issuer, *, change: dict[str, str] | None = None) -> tuple[int, str]:
    """Do as a browser: post the issuer's page and follow its redirect to loopback."""
    parts = urlsplit(url)
    status, location = await asyncio.to_thread(issuer.request, "GET", f"{parts.path}?{parts.query}")
    assert status == 303, location
    back = urlsplit(location)
    query = {key: values[0] for key, values in parse_qs(back.query).items()} | (change or {})
    reader, writer = await asyncio.open_connection("127.0.0.1", back.port)
    writer.write(f"GET {back.path or '/'}?{urlencode(query)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split()[1]), answer


async def with_browser(issuer: Issuer, directory: Path, *, change: dict[str, str] | None = None, **more: Any) -> Login:
    """A login by the authorization code flow, with a browser that follows every redirect at once."""
    visits = []

    async def browser(url: str) -> bool:
        for name, value in (change or {}).items():
            url = re.sub(rf"{name}=[^&]+", f"{name}={value}", url)
        visits.append(asyncio.ensure_future(browse(url, issuer)))
        return True

    return make(issuer, directory, Terminal(issuer), browser=browser, grant_type="authcode", **more)
