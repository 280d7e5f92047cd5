"""The client's check: each mistake by its setting, and no file made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.settings import check, required
from arcbridge.settings.config import ClientConfig, LoginConfig, ObserveConfig

PIN = "sha256:" + "1" * 64
LOGIN = LoginConfig(issuer="https://login.test", client_id="arcbridge")


@pytest.fixture
def good(tmp_path: Path) -> ClientConfig:
    (tmp_path / "token").write_text("token")
    (tmp_path / "token").chmod(0o600)
    return ClientConfig(
        relays=("https://relay.test",),
        relay_ca_pin=PIN,
        cluster="prod",
        cluster_ca_pin=PIN,
        state_dir=tmp_path / "state",
        login=LOGIN,
    )


def program(at: Path, **changes: Any) -> LoginConfig:
    return replace(LOGIN, grant_type="client-credentials", client_secret_file=at / "token", **changes)


@pytest.mark.parametrize("changes", [{"cluster_audience": "arcbridge-{cluster}"}, {"one_token": True}])
def test_a_program_with_a_token_for_each_end(good: ClientConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert list(required(replace(good, login=program(tmp_path, **changes)), {}).problems) == []


def test_good_settings_have_no_problem_and_nothing_is_made(good: ClientConfig, tmp_path: Path) -> None:
    assert list(required(good, {}).problems) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["token"]


ERRORS: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (lambda at: {"relays": ()}, "relays: required but not set; log in: "),
    (lambda at: {"relay": "r"}, "relay: given together with relays"),
    (lambda at: {"relays": ("r", "http://r")}, "relays[1]: "),
    (lambda at: {"relays": ("relay.example.org",)}, "relays[0]: relay.example.org is the example's name"),
    (lambda at: {"relay_ca_pin": "x"}, "relay_ca_pin: not a pin"),
    (lambda at: {"relay_ca_file": at / "none"}, "relay_ca_file: "),
    (lambda at: {"relay_ca_file": at / "token"}, "relay_ca_file: "),
    (lambda at: {"cluster": "BAD"}, "cluster: "),
    (lambda at: {"clusters": ("good", "BAD")}, "clusters[1]: "),
    (lambda at: {"cluster_ca_pin": "sha256:" + "0" * 64}, "cluster_ca_pin: these zeros"),
    (lambda at: {"pins_file": at / "none"}, "pins_file: "),
    (lambda at: {"pins_file": at / "token"}, "pins_file: "),
    (lambda at: {"state_dir": at / "token"}, "state_dir: "),
    (lambda at: {"observe": ObserveConfig(listen="x")}, "observe.listen"),
    (lambda at: {"login": replace(LOGIN, client_id="")}, "login.client_id: required with login.issuer"),
    (lambda at: {"login": replace(LOGIN, issuer="")}, "login.issuer: required with login.client_id"),
    (lambda at: {"login": replace(LOGIN, issuer="http://login.test")}, "login.issuer: 'http://login.test' is not"),
    (lambda at: {"login": replace(LOGIN, issuer="https://login.example.org")}, "login.issuer: login.example.org is"),
    (lambda at: {"login": replace(LOGIN, ca_file=at / "token")}, "login.ca_file: "),
    (lambda at: {"login": replace(LOGIN, cluster_audience_by="magic")}, "login.cluster_audience_by: "),
    (lambda at: {"login": replace(LOGIN, client_key_id="k")}, "login.client_key_id: "),
    (lambda at: {"login": replace(LOGIN, client_key_file=at / "none")}, "login.client_key_file: "),
    (lambda at: {"login": replace(LOGIN, grant_type="client-credentials")}, "login.grant_type: "),
    (lambda at: {"login": replace(LOGIN, proof_key_file=at / "none")}, "login.proof_key_file: "),
    (lambda at: {"login": replace(LOGIN, proof_key_file=at / "token")}, "login.proof_key_file: "),
    (lambda at: {"login": replace(LOGIN, cluster_scopes=("a",))}, "login.cluster_scopes: "),
    (lambda at: {"login": LoginConfig(workload="moon")}, "login.workload: "),
    (
        lambda at: {"login": LoginConfig(access_token_file=at / "token", id_token_file=at / "token")},
        "login.access_token_file: is the cluster's file as well",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[f"{n}-{row[1]}" for n, row in enumerate(ERRORS)])
def test_a_mistake_is_named(
    good: ClientConfig, tmp_path: Path, changes: Callable[[Path], dict[str, Any]], message: str
) -> None:
    found = [problem.message for problem in check(replace(good, **changes(tmp_path)), {}).problems.errors]
    assert len(found) == 1
    assert found[0].startswith(message)


WARNINGS: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (lambda at: {"relay_ca_pin": ""}, "relay_ca_pin: missing"),
    (lambda at: {"cluster_ca_pin": "", "trust_first_use": True}, "trust_first_use: on"),
    (lambda at: {"login": LoginConfig()}, "login: nothing says where the relay's token comes from"),
    (lambda at: {"login": LoginConfig(access_token_file=at / "none")}, "login.access_token_file: "),
    (lambda at: {"token_file": at / "none"}, "token_file: "),
    (
        lambda at: {"login": LoginConfig(workload="github-actions", audience="a", cluster_audience="b")},
        "login.workload: this is no job",
    ),
    (lambda at: {"login": program(at)}, "login.cluster_audience: missing"),
]


@pytest.mark.parametrize(("changes", "message"), WARNINGS, ids=[row[1] for row in WARNINGS])
def test_what_may_not_be_meant_is_a_warning(
    good: ClientConfig, tmp_path: Path, changes: Callable[[Path], dict[str, Any]], message: str
) -> None:
    (found,) = required(replace(good, **changes(tmp_path)), {}).problems.warnings
    assert found.message.startswith(message)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"client_id": ""}, "login.client_id"),
        ({"redirect_port": 70000}, "login.redirect_port"),
        ({"cluster_audience": "a", "cluster_audience_by": "scope"}, "login.relay_scopes"),
        ({"client_key_id": "k"}, "login.client_key_id"),
        ({"grant_type": "client-credentials"}, "login.grant_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_of_a_login_is_of_the_setting_that_it_names(
    good: ClientConfig, changes: dict[str, Any], setting: str
) -> None:
    """By the setting its file and line are found."""
    (found,) = check(replace(good, login=replace(LOGIN, **changes)), {}).problems.errors
    assert found.setting == setting


@pytest.mark.parametrize(
    ("login", "setting"),
    [
        (LoginConfig(workload="gitlab", audience="a", cluster_audience="b"), "login.workload"),
        (LoginConfig(workload="kubernetes", audience="a", cluster_audience="b"), "login.workload"),
        (replace(LOGIN, grant_type="client-credentials", workload="azure-pipelines"), "login.workload"),
    ],
    ids=["gitlab", "kubernetes", "azure"],
)
def test_settings_of_a_job_may_be_checked_elsewhere(good: ClientConfig, login: LoginConfig, setting: str) -> None:
    (found,) = required(replace(good, login=login), {}).problems.warnings
    assert found.setting == setting
    assert found.message.startswith(f"{setting}: this is no ")
