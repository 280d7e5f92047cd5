"""No mix-up passes: a login at a hostile issuer gives it no code, token or assertion that is good at another issuer.

Both issuers serve HTTPS, the honest one in the shapes of those that people use: what its discovery document announces,
whether it sends `iss`, and how it compares redirect URIs.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from aiohttp import web

from arcbridge.client.credentials.client_authentication import IssuerEndpoints
from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.client.credentials.login import Login
from arcbridge.client.credentials.login_callback import redirect_path
from arcbridge.client.credentials.token_cache import TokenCache, TokenSet
from arcbridge.errors import ConfigError, Unauthenticated
from arcbridge.settings.config import LoginConfig
from tests.client.login_station import Terminal, come_back, login_of, make, serving, with_browser
from tests.support.issuer import Issuer

ANY_PATH: dict[str, Any] = {"redirect_uris": ()}
SHAPES: dict[str, dict[str, Any]] = {
    # https://login.microsoftonline.com: no iss, the path compared and the port ignored, the page for codes elsewhere.
    "entra-id": {"response_iss": "none", "device_page": "{other}/devicelogin"},
    # One host for each organisation, no iss known of, redirect URIs compared as a whole.
    "okta": {"response_iss": "none"},
    # No iss; a client with redirectURIs, as our example has it, compares them as a whole.
    "dex": {"response_iss": "none"},
    # It sends iss and does not announce it, takes any path of loopback, and has its token endpoint on another host.
    "google": {
        **ANY_PATH,
        "response_iss": "sent",
        "metadata": {
            name: f"{{other}}/{path}"
            for name, path in (
                ("token_endpoint", "token"),
                ("device_authorization_endpoint", "device_authorization"),
                ("revocation_endpoint", "revoke"),
            )
        },
        "device_page": "{other}/device",
    },
    # It announces iss.
    "keycloak": {**ANY_PATH, "response_iss": "announced"},
}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("honest"), auto_login="alice") as issuer:
        yield issuer


@pytest.fixture(params=SHAPES)
def honest(process: Issuer, request: pytest.FixtureRequest) -> Issuer:
    """The issuer whose tokens are wanted. The redirect URI of former versions is registered there, too."""
    path = redirect_path(IssuerEndpoints("", process.url), "")
    registered = ["http://localhost", f"http://localhost{path}"]
    usual = {"redirect_uris": registered, "metadata": {}, "device_page": "{url}/device", "response_iss": "none"}
    process.settings(**usual | SHAPES[request.param])
    return process


class Hostile:
    """An issuer that the user has agreed to log in at, and that is after the tokens of the honest one."""

    def __init__(self, honest: Issuer, ca_file: Path) -> None:
        self.honest = honest
        self.ca_file = ca_file
        self.url = ""
        self.metadata: dict[str, Any] = {}
        self.change: dict[str, str] = {}
        """What it changes in a request that it hands on; `{url}` in a value is its own URL."""
        self.forms: list[dict[str, Any]] = []
        self.gains: list[dict[str, Any]] = []
        """Tokens of the honest issuer, for the codes that came here."""
        self.injects = ""
        """An id token that its token endpoint answers with."""
        self.device_page = ""

    async def discovery(self, request: web.Request) -> web.Response:
        names = ("authorization", "token", "device_authorization", "revocation")
        own = {f"{name}_endpoint": f"{self.url}/{name}" for name in names}
        return web.json_response({"issuer": self.url, **own, **self.metadata})

    async def hand_on(self, request: web.Request) -> web.Response:
        """Send the browser on to the honest issuer's page, with the whole request of the login."""
        change = {name: value.format(url=self.url) for name, value in self.change.items()}
        query = dict(request.query) | {"client_id": "cli"}
        query["redirect_uri"] += change.pop("redirect_query", "")
        if "redirect_path" in change:
            query["redirect_uri"] = f"http://localhost:{urlsplit(query['redirect_uri']).port}{change['redirect_path']}"
        query.pop("dpop_jkt", None)
        return web.Response(status=302, headers={"Location": f"{self.honest.url}/authorize?{urlencode(query)}"})

    async def answer(self, request: web.Request) -> web.Response:
        """Take what comes, and redeem a code at the honest issuer."""
        form = dict(await request.post())
        self.forms.append(form)
        if request.path == "/device_authorization":
            page = self.device_page.format(url=self.url)
            code = {"device_code": "d", "user_code": "AB-CD", "verification_uri": page, "interval": 0.01}
            return web.json_response({**code, "verification_uri_complete": f"{page}?user_code=AB-CD"})
        if self.injects:
            return web.json_response({"access_token": "a", "refresh_token": "r", "id_token": self.injects})
        stolen: dict[str, str] = {name: str(value) for name, value in form.items()} | {"client_id": "cli"}
        status, tokens = await asyncio.to_thread(self.honest.request, "POST", "/token", stolen)
        if status == 200:
            self.gains.append(tokens)
        return web.json_response({"error": "invalid_grant"}, status=400)


@pytest.fixture
async def hostile(honest: Issuer, tmp_path: Path) -> AsyncIterator[Hostile]:
    both = tmp_path / "both.pem"
    hostile = Hostile(honest, both)
    routes = (
        web.get("/.well-known/openid-configuration", hostile.discovery),
        web.get("/authorization", hostile.hand_on),
        web.post("/{path:.*}", hostile.answer),
    )
    async with serving(both, *routes) as hostile.url:
        both.write_bytes(both.read_bytes() + honest.ca_file.read_bytes())
        yield hostile


def login_at(hostile: Hostile, directory: Path, **settings: Any) -> tuple[Login, TokenCache, list[str]]:
    say: list[str] = []
    config = LoginConfig(issuer=hostile.url, client_id="cli", ca_file=hostile.ca_file, redirect_port=0, **settings)
    pages: asyncio.Queue[str] = asyncio.Queue()

    async def browser(url: str) -> bool:
        pages.put_nowait(url)
        return True

    login = login_of(config, directory, say.append, browser)
    login.pages = pages
    return login, login._cache, say


async def visit(hostile: Hostile, page: str) -> int:
    """Do as the user's browser, which is logged in at the honest issuer. Returns the status of the last answer."""
    url = page
    if url.startswith(hostile.url):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", urlsplit(url).port, ssl=ssl.create_default_context(cafile=hostile.ca_file)
        )
        writer.write(f"GET {url.removeprefix(hostile.url)} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        head = (await reader.read()).decode()
        writer.close()
        url = next(line.partition(": ")[2] for line in head.splitlines() if line.startswith("Location"))
    assert url.startswith(hostile.honest.url)
    status, location = await asyncio.to_thread(hostile.honest.request, "GET", url.removeprefix(hostile.honest.url))
    if status != 303:
        return int(status)
    back = urlsplit(str(location))
    return int((await come_back(back.port, f"{back.path or '/'}?{back.query}")).split()[1])


ATTACKS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "hands the request on": ({}, {}),
    "announces iss": ({"authorization_response_iss_parameter_supported": True}, {}),
    "puts iss into the redirect URI": ({}, {"redirect_query": "?iss={url}"}),
    "announces iss and puts it in": (
        {"authorization_response_iss_parameter_supported": True},
        {"redirect_query": "/?iss={url}"},
    ),
    "names the honest redirect URI": ({}, {"redirect_path": "HONEST"}),
    "names the redirect URI of former versions": ({}, {"redirect_path": ""}),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_b32_a_request_that_is_handed_on_gives_no_code(hostile: Hostile, tmp_path: Path, attack: str) -> None:
    hostile.metadata, change = ATTACKS[attack]
    hostile.change = dict(change)
    if change.get("redirect_path") == "HONEST":
        hostile.change["redirect_path"] = redirect_path(IssuerEndpoints("", hostile.honest.url), "")
    login, cache, _ = login_at(hostile, tmp_path / "cache", grant_type="authcode")
    task = asyncio.create_task(login.log_in())
    page = await login.pages.get()
    status = await visit(hostile, page)
    if status == 200:
        await asyncio.wait([task])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (hostile.gains, hostile.forms) == ([], [])
    assert status in (400, 404)
    assert cache.load() == TokenSet()


async def test_b31_the_honest_issuer_s_page_is_no_endpoint_of_another_one(hostile: Hostile, tmp_path: Path) -> None:
    hostile.metadata = {"authorization_endpoint": f"{hostile.honest.url}/authorize"}
    login, _, _ = login_at(hostile, tmp_path / "cache", grant_type="authcode")
    task = asyncio.create_task(login.log_in())
    opened = asyncio.create_task(login.pages.get())
    await asyncio.wait([task, opened], return_when=asyncio.FIRST_COMPLETED)
    if opened.done() and await visit(hostile, opened.result()) == 200:
        await asyncio.wait([task])
    opened.cancel()
    assert hostile.gains == []
    with pytest.raises(ConfigError, match="names its authorization_endpoint at") as caught:
        await task
    assert f"--issuer-origin {hostile.honest.url} (" in caught.value.message


@pytest.mark.parametrize("page", ["HONEST/device", "https://127.0.0.1\\@HONEST/device", "http://127.0.0.1/device"])
async def test_b34_a_code_is_not_sent_to_another_issuer_s_page(hostile: Hostile, tmp_path: Path, page: str) -> None:
    hostile.device_page = page.replace("HONEST", hostile.honest.url.removeprefix("https://" if "@" in page else ""))
    login, _, say = login_at(hostile, tmp_path / "cache", grant_type="device-code")
    with pytest.raises(
        ConfigError, match=r"page for device codes (at .*Your code could log in another user there|of .*cannot be used)"
    ):
        await login.log_in()
    assert say == []


async def test_b34_what_was_accepted_before_goes_on_with_a_further_page(hostile: Hostile, tmp_path: Path) -> None:
    """The flags replace all that is kept, and a settings file that names the issuer has to have them itself."""
    hostile.device_page = f"{hostile.honest.url}/device"
    before = ("https://login.example.org",)
    login, _, _ = login_at(hostile, tmp_path / "cache", grant_type="device-code", issuer_origins=before)
    with pytest.raises(ConfigError) as caught:
        await login.log_in()
    assert f"--issuer-origin {before[0]} --issuer-origin {hostile.honest.url} (" in caught.value.message
    assert f'issuer_origins = ["{before[0]}", "{hostile.honest.url}"]' in caught.value.message


@pytest.mark.parametrize("claims", [{}, {"iss": "HOSTILE", "aud": "other"}, {"aud": "cli"}], ids=str)
async def test_b35_another_issuer_s_id_token_ends_the_login(
    hostile: Hostile, tmp_path: Path, claims: dict[str, Any]
) -> None:
    claims = {name: value.replace("HOSTILE", hostile.url) for name, value in claims.items()}
    hostile.injects = hostile.honest.mint(claims=claims)
    hostile.device_page = "{url}/device"
    for more in ({}, {"relay_scopes": ("openid",)}):
        login, cache, _ = login_at(hostile, tmp_path / "cache", grant_type="device-code", **more)
        with pytest.raises(Unauthenticated, match="id token that is not its own, or not for the client cli"):
            await login.log_in()
        assert cache.load() == TokenSet()


async def test_b35_nor_is_one_taken_at_a_refresh(hostile: Hostile, tmp_path: Path) -> None:
    hostile.injects = hostile.honest.mint(aud="cli")
    login, cache, _ = login_at(hostile, tmp_path / "cache")
    kept = TokenSet(refresh_token="r")
    cache.save(kept)
    with pytest.raises(Unauthenticated, match="nothing of that answer was kept"):
        await login.tokens(interactive=False)
    assert cache.load() == kept


@pytest.mark.parametrize("grant", ["authcode", "device-code"])
async def test_the_honest_login_goes_on(honest: Issuer, tmp_path: Path, grant: str) -> None:
    """The origins are named where the shape has any: here the issuer's second name."""
    other = honest.url.replace("127.0.0.1", "localhost")
    person = Terminal(honest)
    if grant == "authcode":
        tokens = await with_browser(honest, tmp_path, issuer_origins=(other,)).log_in()
    else:
        tokens = await make(honest, tmp_path, person, issuer_origins=(other,)).log_in()
        page = honest.settings().device_page
        assert (f"To log in at {honest.url}, open {other}" in person.lines[0]) == page.startswith("{other}")
    assert read_unverified(tokens.id_token).issuer == honest.url
