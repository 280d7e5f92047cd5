"""The listener to which the browser comes back: which answers give a code."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlencode

import pytest

from arcbridge.client.credentials.client_authentication import IssuerEndpoints
from arcbridge.client.credentials.login_callback import LoginCallback, check_redirect_path, redirect_path
from arcbridge.errors import ConfigError
from tests.client.login_station import come_back

ISSUER = "https://login.example.org"
SILENT = IssuerEndpoints(f"{ISSUER}/token", ISSUER)
ANNOUNCING = IssuerEndpoints(f"{ISSUER}/token", ISSUER, response_iss=True)


async def status_of(callback: LoginCallback, target: str) -> int:
    """Come back as a browser does, and return the status of the answer."""
    server = await asyncio.start_server(callback.serve, "127.0.0.1", 0)
    async with server:
        return int((await come_back(server.sockets[0].getsockname()[1], target)).split()[1])


@pytest.mark.parametrize(
    ("change", "silent", "announcing"),
    [
        ({}, 200, 400),
        ({"state": "other"}, 400, 400),
        ({"iss": "https://login.example.net"}, 400, 400),
        ({"iss": ISSUER}, 200, 200),
        ({"iss": [ISSUER, "https://login.example.net"]}, 400, 400),
        ({"iss": ["https://login.example.net", ISSUER]}, 400, 400),
        ({"iss": ["", ISSUER]}, 400, 400),
        ({"state": ["state", "other"], "iss": ISSUER}, 400, 400),
        ({"code": ["code", "other"], "iss": ISSUER}, 400, 400),
    ],
    ids=str,
)
async def test_b32_which_answers_give_a_code(change: dict[str, Any], silent: int, announcing: int) -> None:
    query = urlencode({"code": "code", "state": "state", **change}, doseq=True)
    for endpoints, status in ((SILENT, silent), (ANNOUNCING, announcing)):
        callback = LoginCallback("state", endpoints)
        assert await status_of(callback, f"/?{query}") == status
        assert callback.code.done() == (status == 200)
        await callback.finish()


async def test_b32_an_answer_at_the_path_of_another_issuer_gives_no_code() -> None:
    callback = LoginCallback("state", SILENT, "/login.example.org")
    for path in ("/", "/login.example.net", "/login.example.org/", "/x/../login.example.org"):
        assert await status_of(callback, f"{path}?code=code&state=state") == 404
    assert await status_of(callback, "/login.example.org?code=code&state=state") == 200
    await callback.finish()


class TestRedirectPath:
    @pytest.mark.parametrize(
        ("issuer", "path"),
        [
            ("https://login.example.org", "/login.example.org"),
            ("https://login.example.org/", "/login.example.org/"),
            ("https://login.example.org:8443/realms/a%2fb", "/login.example.org:8443/realms/a%252fb"),
            ("https://[::1]/a;b", "/%5B::1%5D/a%3Bb"),
        ],
    )
    def test_b32_each_issuer_that_does_not_announce_iss_has_its_own(self, issuer: str, path: str) -> None:
        assert redirect_path(IssuerEndpoints("", issuer), "") == path
        assert redirect_path(IssuerEndpoints("", issuer, response_iss=True), "") == ""
        assert redirect_path(IssuerEndpoints("", issuer), "/") == ""
        assert redirect_path(IssuerEndpoints("", issuer, response_iss=True), "/mine") == "/mine"

    @pytest.mark.parametrize("issuer", ["https://h.example/../login.example.org", "https://h.example/./x"])
    def test_b32_no_issuer_reaches_the_path_of_another_one(self, issuer: str) -> None:
        with pytest.raises(ConfigError, match="a browser would take out"):
            redirect_path(IssuerEndpoints("", issuer), "")

    @pytest.mark.parametrize(
        "setting", ["callback", "/a/../b", "/a?b", "/a#b", "/a b", "/\u00e4", "http://localhost/a"]
    )
    def test_a_setting_that_is_no_path(self, setting: str) -> None:
        with pytest.raises(ConfigError, match=r"^login\.redirect_path: must be a path"):
            check_redirect_path(setting)

    def test_settings_that_are_paths(self) -> None:
        for setting in ("", "/", "/callback", "/login.example.org:8443/a"):
            check_redirect_path(setting)
