"""Tokens of jobs and pods: asked for with an audience of their own, which names the key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from arcbridge.client.credentials import workload
from arcbridge.client.credentials.jwt_unverified import claims_unverified, read_unverified
from arcbridge.client.credentials.workload import SERVICE_ACCOUNT, WorkloadTokens, assertion_of
from arcbridge.errors import ConfigError, Unauthenticated, Unreachable
from arcbridge.identity.proof import BindingKind, ProofKey, binding
from arcbridge.settings.config import LoginConfig
from tests.client.login_station import serving
from tests.support.issuer import Issuer
from tests.support.issuer_server import ACTIONS_SECRET


def settings(workload: str, **more: Any) -> LoginConfig:
    audiences = {"audience": "arcbridge-relay", "cluster_audience": "arcbridge-{cluster}"}
    return LoginConfig(workload=workload, **{**audiences, **more})


async def assertion(login: LoginConfig, environment: Mapping[str, str], directory: Path = SERVICE_ACCOUNT) -> str:
    ask = assertion_of(login, environment, directory)
    assert ask is not None
    return await ask()


@pytest.mark.parametrize(
    ("login", "words"),
    [
        (settings("github-actions", audience=""), "login.audience: required"),
        (settings("kubernetes", cluster_audience=""), "login.cluster_audience: required"),
        (settings("jenkins"), "login.workload: 'jenkins' is unknown; use github, gitlab, kubernetes"),
        (settings("github"), "id-token: write"),
        (settings("gitlab"), "no job of GitLab"),
        (settings("env:NOT_SET"), "NOT_SET is not set"),
        (settings("github-actions"), "id-token: write"),
        (settings("kubernetes"), "no pod"),
    ],
)
def test_settings_and_places_that_cannot_work(login: LoginConfig, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        WorkloadTokens(login, environment={}, service_account=tmp_path)


# -- GitHub Actions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer")) as issuer, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(issuer.ca_file))  # the system's CAs, as OpenSSL finds them
        yield issuer


def of_job(issuer: Issuer, secret: str = ACTIONS_SECRET) -> dict[str, str]:
    url = f"{issuer.url}/actions?api-version=2.0"
    return {"ACTIONS_ID_TOKEN_REQUEST_URL": url, "ACTIONS_ID_TOKEN_REQUEST_TOKEN": secret}


def job(issuer: Issuer, secret: str = ACTIONS_SECRET, **more: Any) -> WorkloadTokens:
    return WorkloadTokens(settings("github-actions"), environment=of_job(issuer, secret), **more)


async def test_the_issuer_s_ca_does_not_vouch_for_the_platform(
    issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`login.ca_file` may come from a relay's operator, who is not to read the job's secret."""
    (tmp_path / "none.pem").write_text("")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    before = issuer.requests("/actions")
    found = WorkloadTokens(settings("github-actions", ca_file=issuer.ca_file), environment=of_job(issuer))
    with pytest.raises(Unreachable, match="have this system trust the right") as caught:
        await found.tokens(interactive=False)
    assert ACTIONS_SECRET not in str(caught.value)
    login = LoginConfig(client_assertion_workload="github-actions", ca_file=issuer.ca_file)
    with pytest.raises(Unreachable, match="have this system trust the right"):
        await assertion(login, of_job(issuer))
    assert issuer.requests("/actions") == before


async def test_a_job_s_tokens_name_the_place_and_the_key(issuer: Issuer) -> None:
    found = job(issuer)
    relay = (await found.tokens(interactive=False)).access_token
    cluster = (await found.for_audience("arcbridge-a", interactive=False)).access_token
    key = found.key
    assert key is not None
    assert read_unverified(relay).audiences == (f"{key.audience()}@arcbridge-relay",)
    assert read_unverified(cluster).audiences == (f"{key.audience()}@arcbridge-a",)
    for token in (relay, cluster):
        bound = binding(claims_unverified(token))
        assert bound.kind is BindingKind.AUDIENCE
        assert bound.names(key.thumbprint)
    assert job(issuer).key is None, "in memory, of one process"
    own = ProofKey.generate()
    assert job(issuer, key=own).key is own


async def test_a_job_that_may_not_ask(issuer: Issuer) -> None:
    with pytest.raises(Unauthenticated, match="id-token: write") as caught:
        await job(issuer, "SECRET").tokens(interactive=False)
    assert "SECRET" not in str(caught.value)


async def test_a_service_that_is_down(issuer: Issuer) -> None:
    issuer.down()
    try:
        with pytest.raises(Unreachable, match=r"status 503\); try again$"):
            await job(issuer).tokens(interactive=False)
    finally:
        issuer.down(False)
    elsewhere = of_job(issuer) | {"ACTIONS_ID_TOKEN_REQUEST_URL": f"{issuer.url}/elsewhere"}
    with pytest.raises(Unreachable, match=r"status 404\): is ACTIONS_ID_TOKEN_REQUEST_URL what"):
        await WorkloadTokens(settings("github-actions"), environment=elsewhere).tokens(interactive=False)
    nowhere = {"ACTIONS_ID_TOKEN_REQUEST_URL": "https://127.0.0.1:1/x", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "x"}
    with pytest.raises(Unreachable, match=r"cannot reach 127\.0\.0\.1:1: connection refused"):
        await WorkloadTokens(settings("github-actions"), environment=nowhere).tokens(interactive=False)


# -- Kubernetes -------------------------------------------------------------------------------------------------------


class FakeApi:
    """The TokenRequest of an API server, and how it can go wrong; `tests/e2e` asks the real one."""

    def __init__(self, issuer: Issuer, directory: Path) -> None:
        self.issuer = issuer
        self.directory = directory
        self.asked: list[tuple[str, str, Any]] = []
        self.status = 201
        self.audiences: list[str] | None = None
        self.port = 0

    async def request(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append((request.path, request.headers["Authorization"], body))
        audiences = self.audiences or body["spec"]["audiences"]
        token = await asyncio.to_thread(self.issuer.mint, sub="system:serviceaccount:ci:builder", aud=audiences)
        return web.json_response({"status": {"token": token}}, status=self.status)

    @property
    def environment(self) -> dict[str, str]:
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}

    def pod(self) -> WorkloadTokens:
        return WorkloadTokens(settings("kubernetes"), environment=self.environment, service_account=self.directory)


@pytest.fixture
async def api(issuer: Issuer, tmp_path: Path) -> AsyncIterator[FakeApi]:
    api = FakeApi(issuer, tmp_path)
    async with serving(tmp_path / "ca.crt", web.post("/{path:.*}", api.request)) as url:
        api.port = int(url.rpartition(":")[2])
        (tmp_path / "token").write_text(own_token(issuer))
        yield api


def own_token(issuer: Issuer, **claims: Any) -> str:
    pod = {"kubernetes.io": {"namespace": "ci", "pod": {"name": "builder-1", "uid": "u-1"}}}
    return issuer.mint(sub="system:serviceaccount:ci:builder", aud="https://kubernetes", claims={**pod, **claims})


async def test_a_pod_asks_for_a_token_with_both_audiences(api: FakeApi) -> None:
    pod = api.pod()
    relay = (await pod.tokens(interactive=False)).access_token
    cluster = (await pod.for_audience("arcbridge-a", interactive=False)).access_token
    assert pod.key is not None
    assert read_unverified(relay).audiences == ("arcbridge-relay", pod.key.audience())
    assert binding(claims_unverified(cluster)).names(pod.key.thumbprint)
    path, authorization, body = api.asked[1]
    assert path == "/api/v1/namespaces/ci/serviceaccounts/builder/token"
    assert authorization == f"Bearer {(api.directory / 'token').read_text()}"
    assert body["spec"] == {
        "audiences": ["arcbridge-a", pod.key.audience()],
        "expirationSeconds": 3600,
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "builder-1", "uid": "u-1"},
    }


async def test_a_token_of_no_pod_is_bound_to_none(api: FakeApi) -> None:
    (api.directory / "token").write_text(own_token(api.issuer, **{"kubernetes.io": {"namespace": "ci"}}))
    await api.pod().tokens(interactive=False)
    assert "boundObjectRef" not in api.asked[0][2]["spec"]


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (403, Unauthenticated, "create serviceaccounts/token"),
        (401, Unauthenticated, "create serviceaccounts/token"),
        (500, Unreachable, "status 500"),
    ],
)
async def test_a_pod_that_gets_none(api: FakeApi, status: int, error: type[Exception], words: str) -> None:
    api.status = status
    with pytest.raises(error, match=words):
        await api.pod().tokens(interactive=False)


async def test_a_token_for_other_audiences_is_not_used(api: FakeApi) -> None:
    api.audiences = ["https://kubernetes"]
    with pytest.raises(Unauthenticated, match="other audiences"):
        await api.pod().tokens(interactive=False)


@pytest.mark.parametrize("subject", ["alice", "system:node:a", "system:serviceaccount:ci", "a:b:c:d"])
async def test_a_token_that_is_no_service_account_s(api: FakeApi, subject: str) -> None:
    (api.directory / "token").write_text(api.issuer.mint(sub=subject))
    with pytest.raises(Unauthenticated, match="not a ServiceAccount's"):
        await api.pod().tokens(interactive=False)
    assert api.asked == []


async def test_another_ca_than_the_pod_s(api: FakeApi, issuer: Issuer) -> None:
    file = api.directory / "ca.crt"
    for text, error, words in (
        (issuer.ca_file.read_text(), Unreachable, rf"not of the CA that is expected .*; that CA is in {file}$"),
        ("", ConfigError, f"{file} holds no PEM certificate"),
    ):
        file.write_text(text)
        with pytest.raises(error, match=words):
            await api.pod().tokens(interactive=False)
    assert api.asked == []


# -- tokens that were given before -----------------------------------------------------------------------------------


async def test_tokens_at_hand_are_chosen_by_their_audience_and_bound_to_no_key(issuer: Issuer) -> None:
    relay, cluster = issuer.mint(aud="arcbridge-relay"), issuer.mint(aud="arcbridge-a")
    environment = {"CI_SERVER_URL": issuer.url, "ONE": relay, "TWO": cluster, "THREE": "text"}
    for kind in ("gitlab", "env:ONE,TWO"):
        given = WorkloadTokens(settings(kind), environment=environment)
        assert given.key is None
        assert (await given.tokens(interactive=False)).access_token == relay
        assert (await given.for_audience("arcbridge-a", interactive=False)).access_token == cluster
        with pytest.raises(Unauthenticated, match='no token for audience "arcbridge-b"'):
            await given.for_audience("arcbridge-b", interactive=False)


# -- assertions for another issuer ------------------------------------------------------------------------------------

EXCHANGE = "api://AzureADTokenExchange"


async def test_a_job_s_assertion_is_for_the_issuer_and_names_no_key(issuer: Issuer) -> None:
    login = LoginConfig(client_assertion_workload="github-actions")
    text = await assertion(login, of_job(issuer))
    assert read_unverified(text).audiences == (EXCHANGE,)
    assert binding(claims_unverified(text)).kind is BindingKind.NONE
    with pytest.raises(ConfigError, match=r"login\.client_assertion_workload: this is no job of GitHub Actions"):
        assertion_of(login, {})


async def test_a_pod_s_assertion_is_for_the_issuer(api: FakeApi) -> None:
    login = LoginConfig(client_assertion_workload="kubernetes", client_assertion_audience="https://idp.example.org")
    text = await assertion(login, api.environment, api.directory)
    assert read_unverified(text).audiences == ("https://idp.example.org",)
    assert api.asked[0][2]["spec"]["audiences"] == ["https://idp.example.org"]
    api.audiences = ["another"]
    with pytest.raises(Unauthenticated, match="for other audiences than"):
        await assertion(login, api.environment, api.directory)


# -- Azure Pipelines; the whole way to a cluster is in tests/e2e/test_ci.py -------------------------------------------

STEP = {"SYSTEM_OIDCREQUESTURI": "https://dev.example.org/oidctoken", "SYSTEM_ACCESSTOKEN": "SECRET"}


@pytest.mark.parametrize(
    ("kind", "environment", "words"),
    [
        ("azure-pipelines:c", {}, "no step of Azure Pipelines"),
        ("azure-pipelines:c", {**STEP, "SYSTEM_ACCESSTOKEN": ""}, "SYSTEM_ACCESSTOKEN"),
        ("azure-pipelines:c", {**STEP, "SYSTEM_OIDCREQUESTURI": "http://dev"}, "no step"),
        ("azure-pipelines", STEP, "no service connection is named"),
        ("azure-pipelines:a&b", STEP, "no service connection is named"),
    ],
)
def test_steps_that_cannot_ask(kind: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assertion_of(LoginConfig(workload=kind), environment)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((401, {}), Unauthenticated, "gives this step no token"),
        ((302, {}), Unauthenticated, "gives this step no token"),
        ((404, {}), Unauthenticated, "knows no service connection c"),
        ((500, {}), Unreachable, "status 500.; try again$"),
        ((429, {}), Unreachable, "status 429.; try again$"),
        ((400, {}), Unreachable, "status 400.: is SYSTEM_OIDCREQUESTURI what the step was given"),
        ((200, {}), Unreachable, "gave no token"),
        ((200, {"oidcToken": 1}), Unreachable, "gave no token"),
    ],
)
async def test_refusals_name_no_token(
    answer: tuple[int, dict[str, Any]], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def request(method: str, url: str, *_: object, **__: object) -> tuple[int, dict[str, Any]]:
        asked.append(url)
        return answer

    monkeypatch.setattr(workload, "_request", request)
    by_task = {**STEP, "AZURESUBSCRIPTION_SERVICE_CONNECTION_ID": "c"}
    for kind, environment in (("azure-pipelines:c", STEP), ("azure-pipelines", by_task)):
        with pytest.raises(error, match=words) as caught:
            await assertion(LoginConfig(workload=kind), environment)
        assert "SECRET" not in str(caught.value)
    assert asked == 2 * ["https://dev.example.org/oidctoken?api-version=7.1&serviceConnectionId=c"]
