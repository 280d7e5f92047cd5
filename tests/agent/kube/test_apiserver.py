"""Settings of the way to the API server, and what is read again while the agent runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from arcbridge.agent.kube.apiserver import REREAD, ApiServer, endpoint_of
from arcbridge.config import KubernetesConfig
from arcbridge.errors import ConfigError
from tests.support.fake_apiserver import Exchange, FakeApiServer, reply

TOKEN = Path("/nowhere/token")


def test_in_cluster(tmp_path: Path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    end = endpoint_of(KubernetesConfig(), environ, tmp_path)
    assert end.authority == "[fd00::1]:6443"
    assert end.ca_file == tmp_path / "ca.crt"
    assert end.token_file == tmp_path / "token"


def test_by_settings() -> None:
    end = endpoint_of(KubernetesConfig(server="https://api.example", token_file=TOKEN), {})
    assert end.authority == "api.example:443"
    assert end.ca_file is None


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "kubernetes.server: missing"),
    ({"server": "http://a:1", "token_file": TOKEN}, "must be https"),
    ({"server": "https://", "token_file": TOKEN}, "must be https"),
    ({"server": "https://a/path", "token_file": TOKEN}, "nothing more"),
    ({"server": "https://u:p@a", "token_file": TOKEN}, "nothing more"),
    ({"server": "https://a:x", "token_file": TOKEN}, "kubernetes.server"),
    ({"server": "https://a"}, "needs token_file"),
    ({"server": "https://a", "client_key_file": TOKEN}, "belong together"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[row[1] for row in BAD])
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        endpoint_of(KubernetesConfig(**settings), {})


def test_an_odd_service_port() -> None:
    with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_PORT"):
        endpoint_of(KubernetesConfig(), {"KUBERNETES_SERVICE_HOST": "a", "KUBERNETES_SERVICE_PORT": "tcp://x"})


async def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"token: cannot be read"):
        ApiServer(endpoint_of(KubernetesConfig(server="https://a", token_file=tmp_path / "token"), {}))
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match="holds no token"):
        ApiServer(endpoint_of(KubernetesConfig(server="https://a", token_file=tmp_path / "token"), {}))
    (tmp_path / "ca").write_text("nonsense")
    config = KubernetesConfig(server="https://a", token_file=tmp_path / "token", ca_file=tmp_path / "ca")
    with pytest.raises(ConfigError, match=r"kubernetes\.ca_file"):
        ApiServer(endpoint_of(config, {}))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_rotated_token_and_ca_count_without_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    async with FakeApiServer.serving(tmp_path) as fake:
        config = KubernetesConfig(server=fake.url, ca_file=fake.ca_file, token_file=fake.token_file)
        api = ApiServer(endpoint_of(config, {}), clock=clock)
        try:
            assert api.authorization() == "Bearer agent-own-token"
            fake.token_file.write_text("rotated")
            assert api.authorization() == "Bearer agent-own-token"
            clock.now += REREAD
            assert api.authorization() == "Bearer rotated"
            before = api.tls(own=True)
            trustme.CA().cert_pem.write_to_path(str(fake.ca_file))
            clock.now += REREAD
            assert api.tls(own=True) is not before
            fake.token_file.unlink()
            clock.now += REREAD
            assert api.authorization() == "Bearer rotated", "a half-replaced file changes nothing"
            assert "token" in api.reload_error
        finally:
            await api.close()


async def test_a_delete_whose_connection_dies_is_never_repeated(tmp_path: Path) -> None:
    async with FakeApiServer.serving(tmp_path) as fake:
        config = KubernetesConfig(server=fake.url, ca_file=fake.ca_file, token_file=fake.token_file)
        api = ApiServer(endpoint_of(config, {}))

        async def die(exchange: Exchange) -> None:
            exchange.reset()

        fake.routes["/x"] = die
        try:
            for method in ("DELETE", "PUT", "POST", "PATCH"):
                with pytest.raises(aiohttp.ClientError):
                    await api.request(method, "/x", [], own=True)
            assert [request.method for request in fake.requests] == ["DELETE", "PUT", "POST", "PATCH"]
        finally:
            await api.close()


async def test_gets_share_a_connection_and_others_do_not(tmp_path: Path) -> None:
    async with FakeApiServer.serving(tmp_path) as fake:
        config = KubernetesConfig(server=fake.url, ca_file=fake.ca_file, token_file=fake.token_file)
        api = ApiServer(endpoint_of(config, {}))
        fake.routes["/x"] = reply(200, b"ok", "Set-Cookie: a=b")
        try:
            for method, own in (("GET", True), ("GET", True), ("POST", True), ("POST", True), ("GET", False)):
                response = await api.request(method, "/x", [], own=own)
                await response.read()
                response.release()
            assert [request.connection for request in fake.requests] == [1, 1, 2, 3, 4]
            assert not any(request.header("cookie") for request in fake.requests)
        finally:
            await api.close()
