"""Settings of the way to the API server, and what is read again while the agent runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from arcbridge.agent.kube.apiserver import REREAD, AnswerFailed, ApiServer, endpoint_of
from arcbridge.errors import ConfigError
from arcbridge.settings.config import KubernetesConfig
from tests.support.clock import Clock
from tests.support.fake_apiserver import FakeApiServer, chunked, closing, dying, reply

from .bench import reachable

TOKEN = Path("/nowhere/token")


def test_in_cluster(tmp_path: Path) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    end = endpoint_of(KubernetesConfig(), environ, tmp_path)
    assert end.authority == "[fd00::1]:6443"
    assert end.ca_file == tmp_path / "ca.crt"
    assert end.token_file == tmp_path / "token"


def test_in_cluster_by_a_pod_certificate(tmp_path: Path) -> None:
    bundle = tmp_path / "credential-bundle.pem"
    end = endpoint_of(KubernetesConfig(credential_bundle_file=bundle), {"KUBERNETES_SERVICE_HOST": "a"}, tmp_path)
    assert (end.bundle_file, end.token_file, end.ca_file) == (bundle, None, tmp_path / "ca.crt")


def test_by_settings() -> None:
    end = endpoint_of(KubernetesConfig(server="https://api.example", token_file=TOKEN), {})
    assert end.authority == "api.example:443"
    assert end.ca_file is None


@pytest.mark.parametrize(
    ("names", "expected"), [(("*",), None), ((), frozenset()), (("dev", "ops"), frozenset({"dev", "ops"}))]
)
def test_groups_that_may_be_impersonated(
    tmp_path: Path, names: tuple[str, ...], expected: frozenset[str] | None
) -> None:
    in_cluster = {"KUBERNETES_SERVICE_HOST": "a"}
    assert endpoint_of(KubernetesConfig(impersonate_groups=names), in_cluster, tmp_path).impersonable == expected
    settings = KubernetesConfig(server="https://a", token_file=TOKEN, impersonate_groups=names)
    assert endpoint_of(settings, {}).impersonable == expected


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "kubernetes.server: missing"),
    ({"server": "http://a:1", "token_file": TOKEN}, "must be https"),
    ({"server": "https://", "token_file": TOKEN}, "must be https"),
    ({"server": "https://a/path", "token_file": TOKEN}, "nothing more"),
    ({"server": "https://u:p@a", "token_file": TOKEN}, "nothing more"),
    ({"server": "https://a:x", "token_file": TOKEN}, "kubernetes.server"),
    ({"server": "https://a"}, "needs token_file"),
    ({"server": "https://a", "client_key_file": TOKEN}, "belong together"),
    ({"server": "https://a", "credential_bundle_file": TOKEN, "token_file": TOKEN}, "is a whole credential"),
    ({"server": "https://a", "token_file": TOKEN, "impersonate_groups": ("*", "dev")}, "kubernetes.impersonate_groups"),
    ({"server": "https://a", "token_file": TOKEN, "impersonate_groups": ("",)}, "kubernetes.impersonate_groups"),
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


async def test_a_rotated_token_and_ca_count_without_a_restart(tmp_path: Path) -> None:
    clock = Clock(0.0)
    async with reachable(tmp_path, clock) as (fake, api):
        before, own = api.credentials(own=True)
        assert own == "Bearer agent-own-token"
        assert api.credentials(own=False)[1] == ""
        fake.token_file.write_text("rotated")
        assert api.credentials(own=True)[1] == "Bearer agent-own-token"
        clock.now += REREAD
        assert api.credentials(own=True)[1] == "Bearer rotated"
        trustme.CA().cert_pem.write_to_path(str(fake.ca_file))
        clock.now += REREAD
        assert api.credentials(own=True)[0] is not before
        fake.token_file.unlink()
        clock.now += REREAD
        assert api.credentials(own=True)[1] == "Bearer rotated", "a half-replaced file changes nothing"
        assert "token" in api.reload_error


async def test_a_delete_whose_connection_dies_is_never_repeated(fake: FakeApiServer, api: ApiServer) -> None:
    fake.routes["/x"] = dying
    for method in ("DELETE", "PUT", "POST", "PATCH"):
        with pytest.raises(AnswerFailed):
            await api.ask(method, "/x")
    assert [request.method for request in fake.requests] == ["DELETE", "PUT", "POST", "PATCH"]


async def test_each_call_has_a_connection_of_its_own(fake: FakeApiServer, api: ApiServer) -> None:
    fake.routes["/x"] = reply(201, b'{"a": 1}', "Set-Cookie: a=b")
    for method, document in (("GET", None), ("GET", None), ("POST", {})):
        assert await api.ask(method, "/x", document) == (201, {"a": 1})
    assert [request.connection for request in fake.requests] == [1, 2, 3]
    assert fake.last.body == b"{}"
    assert not any(request.header("cookie") for request in fake.requests)


@pytest.mark.parametrize("data", [b"", b"SSH-2.0\r\n\r\n", chunked(200, b"x", end=False), reply(200, b"x" * 1001)])
async def test_an_answer_that_is_not_usable(fake: FakeApiServer, api: ApiServer, data: bytes) -> None:
    fake.routes["/x"] = closing(data)
    with pytest.raises(AnswerFailed):
        await api.ask("GET", "/x", most=1000)


async def test_a_header_cannot_become_two(fake: FakeApiServer, api: ApiServer) -> None:
    with pytest.raises(AnswerFailed):
        await api.ask("GET", "/x", token="1\r\nImpersonate-User: root")
    assert fake.requests == []


async def test_a_call_to_a_server_that_is_down_is_counted(fake: FakeApiServer, api: ApiServer) -> None:
    fake.stop()
    with pytest.raises(AnswerFailed):
        await api.ask("GET", "/x")
    assert api.upstream.unreachable == 1
