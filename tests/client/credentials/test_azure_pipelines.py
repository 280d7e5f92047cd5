"""The assertion of a job of Azure Pipelines; the whole way to a cluster is in `tests/e2e/test_ci.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.credentials import azure_pipelines
from arcbridge.client.credentials.azure_pipelines import AzurePipelines, is_azure_pipelines
from arcbridge.client.credentials.tokens import refuse_contradictions, with_defaults
from arcbridge.errors import ConfigError, Unauthenticated, Unreachable
from arcbridge.settings.config import LoginConfig

STEP = {"SYSTEM_OIDCREQUESTURI": "https://dev.example.org/oidctoken", "SYSTEM_ACCESSTOKEN": "SECRET"}


def test_which_service_connection() -> None:
    assert AzurePipelines.of("azure-pipelines:c-1", STEP).connection == "c-1"
    task = {**STEP, "AZURESUBSCRIPTION_SERVICE_CONNECTION_ID": "c-2"}
    assert AzurePipelines.of("azure-pipelines", task).connection == "c-2"


@pytest.mark.parametrize(
    ("workload", "environment", "words"),
    [
        ("azure-pipelines:c", {}, "no step of Azure Pipelines"),
        ("azure-pipelines:c", {**STEP, "SYSTEM_ACCESSTOKEN": ""}, "SYSTEM_ACCESSTOKEN"),
        ("azure-pipelines:c", {**STEP, "SYSTEM_OIDCREQUESTURI": "http://dev"}, "no step"),
        ("azure-pipelines", STEP, "no service connection is named"),
        ("azure-pipelines:a&b", STEP, "no service connection is named"),
    ],
)
def test_places_that_cannot_be(workload: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AzurePipelines.of(workload, environment)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((401, {}), Unauthenticated, "gives this step no token"),
        ((302, {}), Unauthenticated, "gives this step no token"),
        ((404, {}), Unauthenticated, "knows no service connection c"),
        ((500, {}), Unreachable, "status 500"),
        ((200, {}), Unreachable, "gave no token"),
        ((200, {"oidcToken": 1}), Unreachable, "gave no token"),
    ],
)
async def test_refusals_name_no_token(
    answer: tuple[int, dict[str, Any]], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def request(*_: object) -> tuple[int, dict[str, Any]]:
        return answer

    monkeypatch.setattr(azure_pipelines, "request", request)
    with pytest.raises(error, match=words) as caught:
        await AzurePipelines.of("azure-pipelines:c", STEP).assertion()
    assert "SECRET" not in str(caught.value)


def test_it_is_for_an_issuer_to_trade_in() -> None:
    assert is_azure_pipelines("azure-pipelines:x")
    assert not is_azure_pipelines("azure-pipelines-x")
    with pytest.raises(ConfigError, match="needs login"):
        refuse_contradictions(LoginConfig(workload="azure-pipelines"))
    login = LoginConfig(workload="azure-pipelines", issuer="https://login.example.org")
    refuse_contradictions(login)
    assert with_defaults(login) is login
    with pytest.raises(ConfigError, match="given together with"):
        refuse_contradictions(LoginConfig(workload="github", issuer="https://login.example.org"))


def test_usual_audiences(tmp_path: Path) -> None:
    found = with_defaults(LoginConfig(workload="github"))
    assert (found.audience, found.cluster_audience) == ("arcbridge-relay", "arcbridge-{cluster}")
    own = with_defaults(LoginConfig(workload="github", audience="a", cluster_audience="b"))
    assert (own.audience, own.cluster_audience) == ("a", "b")
    assert with_defaults(LoginConfig()) == LoginConfig()
