"""Logins against a real issuer: device code, authorization code with PKCE, refresh with rotation."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from arcbridge.client import login as login_module
from arcbridge.client.jwt_unverified import read_unverified
from arcbridge.client.login import Login
from arcbridge.client.token_cache import TokenCache
from arcbridge.config import LoginConfig
from arcbridge.errors import ConfigError, Unauthenticated, Unreachable
from tests.support.issuer import Issuer


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer"), auto_login="alice") as issuer:
        yield issuer


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
    config = LoginConfig(issuer=settings.pop("issuer", issuer.url), client_id="cli", ca_file=issuer.ca_file, **settings)
    return Login(
        config,
        TokenCache(directory, issuer=config.issuer, client_id="cli", scopes=config.scopes, audience=config.audience),
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
    writer.write(f"GET /?{urlencode(query)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split()[1]), answer


class TestDeviceCode:
    async def test_it_logs_in_and_keeps(self, issuer: Issuer, tmp_path: Path) -> None:
        person = Terminal(issuer)
        login = make(issuer, tmp_path, person)
        tokens = await login.tokens(interactive=True)
        assert read_unverified(tokens.id_token).subject == "alice"
        assert tokens.access_token != tokens.id_token
        assert person.lines[0].startswith(f"To log in, open {issuer.url}/device in a browser and enter the code ")
        shown = len(person.lines)
        assert await login.tokens(interactive=False) == tokens
        assert len(person.lines) == shown

    async def test_refused(self, issuer: Issuer, tmp_path: Path) -> None:
        person = Terminal(issuer)
        person.denies = True
        with pytest.raises(Unauthenticated, match="refused in the browser"):
            await make(issuer, tmp_path, person).tokens(interactive=True)

    async def test_too_late(self, issuer: Issuer, tmp_path: Path) -> None:
        person = Terminal(issuer)
        person.acts = False
        issuer.settings(device_lifetime=1.0)
        try:
            with pytest.raises(Unauthenticated, match="expired before"):
                await make(issuer, tmp_path, person).tokens(interactive=True)
        finally:
            issuer.settings(device_lifetime=600.0)

    async def test_a_client_that_is_not_interactive(self, issuer: Issuer, tmp_path: Path) -> None:
        with pytest.raises(Unauthenticated, match="arcbridge --role client login"):
            await make(issuer, tmp_path, Terminal(issuer)).tokens(interactive=False)


class TestAuthorizationCode:
    async def test_it_logs_in(self, issuer: Issuer, tmp_path: Path) -> None:
        visits: list[asyncio.Task[tuple[int, str]]] = []

        async def browser(url: str) -> bool:
            assert "code_challenge_method=S256" in url
            visits.append(asyncio.ensure_future(browse(url, issuer)))
            return True

        tokens = await make(issuer, tmp_path, Terminal(issuer), browser=browser, grant_type="authcode").tokens(
            interactive=True
        )
        assert read_unverified(tokens.id_token).subject == "alice"
        status, page = await visits[0]
        assert status == 200
        assert "You may close this window" in page

    async def test_an_answer_to_another_login_is_refused(self, issuer: Issuer, tmp_path: Path) -> None:
        seen: list[int] = []
        visits = []

        async def visit(url: str) -> None:
            seen.append((await browse(url, issuer, change={"state": "foreign"}))[0])
            seen.append((await browse(url, issuer, change={"iss": "https://foreign"}))[0])
            seen.append((await browse(url, issuer))[0])

        async def browser(url: str) -> bool:
            visits.append(asyncio.ensure_future(visit(url)))
            return True

        login = make(issuer, tmp_path, Terminal(issuer), browser=browser, grant_type="authcode")
        await login.tokens(interactive=True)
        await visits[0]
        assert seen == [400, 400, 200]

    async def test_w12_another_user_gets_no_answer_and_gives_none(
        self, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another user knows `state` from the browser's command line and brings a code of an account of its own."""
        others: list[bool] = []
        monkeypatch.setattr(login_module, "is_other_user", lambda sock: others.pop())
        answers: list[str] = []
        visits = []

        async def visit(url: str) -> None:
            back = urlsplit(parse_qs(urlsplit(url).query)["redirect_uri"][0])
            state = parse_qs(urlsplit(url).query)["state"][0]
            others.append(True)
            reader, writer = await asyncio.open_connection("127.0.0.1", back.port)
            writer.write(f"GET /?{urlencode({'state': state, 'code': 'other'})} HTTP/1.1\r\n\r\n".encode())
            try:
                answers.append((await reader.read()).decode())
            except ConnectionError:
                answers.append("")
            writer.close()
            others.append(False)
            answers.append((await browse(url, issuer))[1])

        async def browser(url: str) -> bool:
            visits.append(asyncio.ensure_future(visit(url)))
            return True

        tokens = await make(issuer, tmp_path, Terminal(issuer), browser=browser, grant_type="authcode").log_in()
        await visits[0]
        assert answers[0] == ""
        assert answers[1].startswith("HTTP/1.1 200")
        assert read_unverified(tokens.id_token).subject == "alice"

    async def test_a_foreign_nonce(self, issuer: Issuer, tmp_path: Path) -> None:
        visits = []

        async def browser(url: str) -> bool:
            changed = re.sub(r"nonce=[^&]+", "nonce=foreign", url)
            visits.append(asyncio.ensure_future(browse(changed, issuer)))
            return True

        with pytest.raises(Unauthenticated, match="another login"):
            await make(issuer, tmp_path, Terminal(issuer), browser=browser, grant_type="authcode").log_in()
        await visits[0]
        assert not list(tmp_path.glob("*.json"))

    async def test_the_browser_never_returns(
        self, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(login_module, "BROWSER_WAIT", 0.1)

        async def browser(url: str) -> bool:
            return False

        person = Terminal(issuer)
        with pytest.raises(Unauthenticated, match="the login took longer than"):
            await make(issuer, tmp_path, person, browser=browser, grant_type="authcode").log_in()
        assert person.lines[0].startswith(f"To log in, open {issuer.url}/")

    @pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
    async def test_squatted_ports(self, issuer: Issuer, tmp_path: Path, family: int, host: str) -> None:
        """docs/threats.md#W12: a browser may go to either address of `localhost`."""
        with socket.socket(family) as squatter:
            try:
                squatter.bind((host, 0))
            except OSError:
                pytest.skip(f"no {host}")
            squatter.listen()
            taken = squatter.getsockname()[1]
            with pytest.raises(Unauthenticated, match=f"local ports {taken} are in use"):
                await make(issuer, tmp_path, Terminal(issuer), grant_type="authcode", ports=(taken,)).log_in()


class TestRefresh:
    async def test_rotation_is_followed(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path, Terminal(issuer))
        first = await login.log_in()
        second = await login.tokens(interactive=False, force=True)
        third = await login.tokens(interactive=False, force=True)
        assert len({first.refresh_token, second.refresh_token, third.refresh_token}) == 3
        assert read_unverified(third.id_token).subject == "alice"

    async def test_parallel_processes_refresh_once(self, issuer: Issuer, tmp_path: Path) -> None:
        await make(issuer, tmp_path, Terminal(issuer)).log_in()
        before = issuer.requests("/token")
        logins = [make(issuer, tmp_path, Terminal(issuer)) for _ in range(5)]
        found = await asyncio.gather(*(one.tokens(interactive=False, force=True) for one in logins))
        assert len({tokens.access_token for tokens in found}) == 1
        assert issuer.requests("/token") == before + 1

    async def test_a_revoked_one_asks_again(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path, Terminal(issuer))
        tokens = await login.log_in()
        issuer.request("POST", "/revoke", {"token": tokens.refresh_token, "client_id": "cli"})
        with pytest.raises(Unauthenticated, match="login has ended"):
            await login.tokens(interactive=False, force=True)
        assert (await login.tokens(interactive=True, force=True)).access_token != tokens.access_token

    async def test_what_is_usable_bridges_an_outage(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path, Terminal(issuer))
        tokens = await login.log_in()
        old = Login(
            login._config, login._cache, say=print, clock=lambda: time.time() + 0.9 * 3600, environment={}
        )  # most of their life is over
        issuer.down()
        try:
            assert await old.tokens(interactive=False) == tokens
            with pytest.raises(Unreachable):
                await old.tokens(interactive=False, force=True)
        finally:
            issuer.down(False)
        assert (await old.tokens(interactive=False)).access_token != tokens.access_token


async def test_settings_are_required(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, issuer="https://x", client_id="", scopes=(), audience="")
    with pytest.raises(ConfigError, match="client_id"):
        Login(LoginConfig(issuer="https://x"), cache, say=print)
