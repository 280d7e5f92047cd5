"""The page over real TLS with the real registry and policy; the issuer answers from memory, with a real key."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from arcbridge.identity import policy
from arcbridge.identity.authentication import AuthenticationConfig, IssuerConfig, PrefixedClaim
from arcbridge.identity.fetch import Reply
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.net.address import Address
from arcbridge.relay.http.administration import AdminApi
from arcbridge.relay.http.api import Api
from arcbridge.relay.page.facts import FactBook
from arcbridge.relay.page.login import CALLBACK, CookieSeal, PageLogin, PageSessions
from arcbridge.relay.page.site import PageSite
from arcbridge.settings.config import RelayPageConfig
from tests.relay.api_station import Relay, serving
from tests.support.clock import Clock
from tests.support.issuer_server import IssuerServer, Settings

ISSUER, CLIENT, PUBLIC = "https://issuer.test", "page", Address("relay.test", 443)
REDIRECT = f"{PUBLIC.origin}{CALLBACK}"
CONFIG = AuthenticationConfig(
    (IssuerConfig("jwt[0]", ISSUER, "", None, ("arcbridge-relay",), (), PrefixedClaim("sub", ""),
                  PrefixedClaim("groups", ""), None),)
)  # fmt: skip
ADMINS = """
[[allow]]
users = ["ann"]
clusters = ["shop-*", "bank"]

[[admin]]
groups = ["shop-operators"]
clusters = ["shop-*"]
what = ["tokens"]

[[admin]]
users = ["reader"]
clusters = ["shop-*"]
what = ["read"]

[[admin]]
users = ["twice"]
clusters = ["shop-*"]
what = ["read"]

[[admin]]
users = ["twice"]
clusters = ["b*"]
what = ["tokens", "sessions", "revocations"]

[[admin]]
users = ["chief"]
clusters = ["*"]
what = ["read"]
"""
GROUPS = {"sam": ["shop-operators", "chess"], "ann": ["chess"]}
"""Of those who have any."""


class MemoryIssuer:
    """Answers what the relay asks an issuer; `requests` are those to the token endpoint."""

    def __init__(self, clock: Clock) -> None:
        self._server = IssuerServer(None, Settings())
        self._server.url = ISSUER
        self._clock = clock
        self.requests: list[tuple[dict[str, str], Mapping[str, str]]] = []
        self.document: dict[str, object] = self._server.document(ISSUER)
        self.claims: dict[str, object] = {}
        """What the next id tokens have instead."""
        self.status = 200
        self.discoveries = 0
        """How often the discovery document was asked for."""
        self.answers = asyncio.Event()
        """While it is not set, nothing is answered."""
        self.answers.set()
        self.user, self.nonce = "chief", ""

    async def __call__(self, url: str, ca_pem: str | None) -> Reply:
        return await self.ask("GET", url, ca_pem, headers={})

    async def ask(
        self, method: str, url: str, ca_pem: object, *, headers: Mapping[str, str], body: bytes = b""
    ) -> Reply:
        if url.endswith("/jwks"):
            return Reply(200, json.dumps(self._server.published()).encode())
        if method == "GET":
            self.discoveries += 1
            await self.answers.wait()
            return Reply(200, json.dumps(self.document).encode())
        self.requests.append((dict(urllib.parse.parse_qsl(body.decode())), headers))
        await self.answers.wait()
        return Reply(self.status, json.dumps({"id_token": self.token(), "access_token": "x"}).encode())

    def token(self) -> str:
        now = self._clock.now
        claims = self._server.claims(self.user, CLIENT) | {"iat": int(now), "nbf": int(now), "exp": int(now) + 600}
        claims |= {"nonce": self.nonce, "groups": GROUPS.get(self.user, [])} | self.claims
        return self._server.sign(claims)


def login_of(issuer: MemoryIssuer, clock: Clock, tokens: TokenVerifier, **config: Any) -> PageLogin:
    """A login at this issuer; `tokens`: the relay's verifier."""
    verifier = TokenVerifier(AuthenticationConfig(()), issuer, clock, monotonic=clock)
    seal = CookieSeal(b"secret", "login")
    return PageLogin(
        RelayPageConfig(CLIENT, **config), ISSUER, REDIRECT, verifier, tokens, issuer.ask, seal, clock=clock,
        monotonic=clock,
    )  # fmt: skip


@dataclass
class PageRelay:
    """A relay with the page."""

    relay: Relay
    issuer: MemoryIssuer
    site: PageSite
    facts: FactBook
    directory: Path
    policy: policy.PolicyFile
    kept: dict[str, str] = field(default_factory=dict)
    """Cookies of the browser."""

    @asynccontextmanager
    async def asked(
        self, path: str, *, method: str = "GET", cookies: Mapping[str, str] | None = None, **headers: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for a path as a browser does; cookies that are set are kept."""
        connector = aiohttp.TCPConnector(ssl=self.relay.context(), force_close=True)
        jar = aiohttp.DummyCookieJar()
        given = self.kept if cookies is None else cookies
        sent = {"Cookie": "; ".join(f"{name}={value}" for name, value in given.items()), **headers}
        async with aiohttp.ClientSession(connector=connector, cookie_jar=jar) as session:
            url = URL(f"https://127.0.0.1:{self.relay.port}{path}", encoded=True)
            async with session.request(method, url, headers=sent, allow_redirects=False) as answer:
                for name, morsel in answer.cookies.items():
                    if morsel.value:
                        self.kept[name] = morsel.value
                    else:
                        self.kept.pop(name, None)
                yield answer

    async def text(self, path: str = "/page", **more: Any) -> tuple[int, str]:
        async with self.asked(path, **more) as answer:
            return answer.status, await answer.text()

    async def begin(self) -> dict[str, str]:
        """Go to the issuer; return what it is asked."""
        async with self.asked("/page/login") as answer:
            assert answer.status == 303
            url = urllib.parse.urlsplit(answer.headers["Location"])
        asked = dict(urllib.parse.parse_qsl(url.query))
        self.issuer.nonce = asked["nonce"]
        return asked

    async def log_in(self, user: str) -> tuple[int, str]:
        """Log in; return how the callback ended."""
        self.issuer.user = user
        asked = await self.begin()
        query = urllib.parse.urlencode({"code": "c", "state": asked["state"], "iss": ISSUER})
        return await self.text(f"{CALLBACK}?{query}", **CAME_BACK)

    def change_policy(self, text: str) -> None:
        (self.directory / "policy.toml").write_text(text)


CAME_BACK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
"""What a browser says of a person whom another site has sent here."""


@asynccontextmanager
async def paging(tmp_path: Path, audit_file: str = "") -> AsyncIterator[PageRelay]:
    """Serve a relay with the page."""
    made: list[tuple[PageSite, FactBook, MemoryIssuer, policy.PolicyFile]] = []

    def page(api: Api, administration: AdminApi) -> PageSite:
        clock = api.clock
        assert isinstance(clock, Clock)
        issuer = MemoryIssuer(clock)
        login = login_of(issuer, clock, TokenVerifier(CONFIG, issuer, clock))
        sessions = PageSessions(CookieSeal(b"secret", "session"), 3600.0, clock=clock)
        facts = FactBook(lambda: administration.relay, audit_file, clock=clock, monotonic=clock)
        file = policy.PolicyFile(tmp_path / "policy.toml")
        site = PageSite(api, facts, login, sessions, file, PUBLIC, ISSUER, monotonic=clock)
        made.append((site, facts, issuer, file))
        return site

    async with serving(tmp_path, None, page=page) as relay:
        (tmp_path / "policy.toml").write_text(ADMINS)
        ((site, facts, issuer, file),) = made
        yield PageRelay(relay, issuer, site, facts, tmp_path, file)


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the policy read at each look."""
    monkeypatch.setattr(policy, "CHECK_INTERVAL", 0.0)
