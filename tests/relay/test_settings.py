"""The relay's check: each mistake by its setting, all of them at once, and no file made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import arcbridge.relay.settings as module
from arcbridge.errors import ConfigError, StateError
from arcbridge.pki.authority import Authority
from arcbridge.relay.data_dir import open_authority, open_registry
from arcbridge.relay.settings import MOST_UNMATCHED, check, has_authority, require_complete, required, worker_count
from arcbridge.settings.config import (
    GraphConfig,
    ObserveConfig,
    RelayClientConfig,
    RelayConfig,
    RelayFleetConfig,
    RelayLimitsConfig,
    RelayLoginConfig,
    RelayPageConfig,
    RelayTlsConfig,
    RelayUserLimitsConfig,
)

AUTHENTICATION = """\
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer:
    url: https://login.test
    audiences: [relay]
  claimMappings:
    username: {claim: email, prefix: "oidc:"}
    groups: {claim: groups, prefix: "oidc:"}
"""
POLICY = '[[allow]]\nusers = ["*"]\ngroups = ["oidc:platform"]\nclusters = ["prod-*"]\n'
ADMIN = '[[admin]]\nusers = ["anna"]\ngroups = ["oidc:platform"]\nclusters = ["prod-*"]\nwhat = ["tokens"]\n'


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return open_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def good(tmp_path: Path, ca: Authority) -> RelayConfig:
    issued = ca.issue_server(["relay.test"])
    (tmp_path / "tls.crt").write_text(issued.certificate_pem)
    (tmp_path / "tls.key").write_text(issued.key_pem)
    (tmp_path / "other.key").write_text(ca.issue_server(["other.test"]).key_pem)
    for name in ("tls.key", "other.key"):
        (tmp_path / name).chmod(0o600)
    (tmp_path / "authentication.yaml").write_text(AUTHENTICATION)
    (tmp_path / "policy.toml").write_text(POLICY)
    return RelayConfig(
        public_address="relay.test:443",
        data_dir=tmp_path / "data",
        authentication=tmp_path / "authentication.yaml",
        policy=tmp_path / "policy.toml",
    )


def test_good_settings_have_no_problem_and_nothing_is_made(good: RelayConfig, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    checked = required(replace(good, tls=RelayTlsConfig(tmp_path / "tls.crt", tmp_path / "tls.key")))
    assert list(checked.problems) == []
    assert str(checked.public) == "relay.test:443"
    assert len(checked.policy.rules) == len(checked.issuers.issuers) == 1
    assert sorted(tmp_path.iterdir()) == before


def users(**limits: int) -> RelayLimitsConfig:
    return RelayLimitsConfig(users={"a": RelayUserLimitsConfig(**limits)})


def graph(at: Path, **more: Any) -> GraphConfig:
    tenant, secret = "11111111-1111-1111-1111-111111111111", at / "tls.key"
    return GraphConfig(("https://login.test",), tenant, "client", client_secret_file=secret, **more)


ERRORS: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (lambda at: {"public_address": ""}, "public_address: required but not set; give --public-address"),
    (lambda at: {"public_address": "http://relay.test"}, "public_address: "),
    (lambda at: {"public_address": "relay.example.org:443"}, "public_address: relay.example.org is the example's"),
    (lambda at: {"listen": "0.0.0.0:70000"}, "listen: "),
    (lambda at: {"graph": {"a": GraphConfig()}}, "graph.a.issuers: missing"),
    (lambda at: {"graph": {"a": graph(at, ca_file=at / "none")}}, "graph.a.ca_file: "),
    (lambda at: {"graph": {"a": graph(at, ca_file=at / "policy.toml")}}, "graph.a.ca_file: "),
    (lambda at: {"client": RelayClientConfig(at / "none")}, "client.directory: "),
    (lambda at: {"client": RelayClientConfig(at / "policy.toml")}, "client.directory: "),
    (lambda at: {"claim_sources": ("claims",)}, "claim_sources[0]: must be"),
    (lambda at: {"login": RelayLoginConfig(client_id="cli")}, "login.issuer: required with login.client_id"),
    (lambda at: {"observe": ObserveConfig(listen="nowhere")}, "observe.listen 'nowhere' is not host:port"),
    (lambda at: {"proof": "perhaps"}, "proof"),
    (lambda at: {"proxy_protocol_from": ("balancer",)}, "proxy_protocol_from: 'balancer' is no address or network"),
    (lambda at: {"workers": 65}, "workers: 1 to 64"),
    (lambda at: {"limits": RelayLimitsConfig(sessions=-5)}, "limits.sessions: must be at least 1, not -5"),
    (
        lambda at: {"limits": RelayLimitsConfig(loop_share_per_user=101)},
        "limits.loop_share_per_user: must be at most 100",
    ),
    (
        lambda at: {"limits": RelayLimitsConfig(loop_share_per_address=101)},
        "limits.loop_share_per_address: must be at most 100",
    ),
    (lambda at: {"limits": RelayLimitsConfig(pending_joins=0)}, "limits.pending_joins: must be at least 1"),
    (lambda at: {"limits": RelayLimitsConfig(join_deadline=0.0)}, "limits.join_deadline: must be above 0 s"),
    (lambda at: {"limits": users(sessions=-1)}, 'limits.users."a".sessions: must be 0'),
    (
        lambda at: {"limits": RelayLimitsConfig(actors={"a": RelayUserLimitsConfig(sessions=-1)})},
        'limits.actors."a".sessions: must be 0, for no bound',
    ),
    (lambda at: {"agent_certificate_life": 0.0}, "agent_certificate_life: must be above 0 s"),
    (lambda at: {"max_token_lifetime": 1.0}, "max_token_lifetime: must be from 60 s"),
    (lambda at: {"authentication": None}, "authentication: required but not set"),
    (lambda at: {"authentication": at / "none"}, "authentication: "),
    (lambda at: {"authentication": at}, "authentication: "),
    (lambda at: {"policy": None}, "policy: required but not set"),
    (lambda at: {"policy": at / "none"}, "policy: "),
    (lambda at: {"policy": at / "authentication.yaml"}, "not valid TOML"),
    (lambda at: {"tls": RelayTlsConfig(certificate=at / "tls.crt")}, "tls: certificate and key go together"),
    (lambda at: {"tls": RelayTlsConfig(at / "tls.crt", at / "none")}, "tls.key: "),
    (lambda at: {"tls": RelayTlsConfig(at / "tls.crt", at / "other.key")}, "tls.certificate: "),
    (lambda at: {"tls": RelayTlsConfig(at / "policy.toml", at / "tls.key")}, "tls.certificate: "),
    (lambda at: {"data_dir": at / "policy.toml"}, "data_dir: "),
    (lambda at: {"data_dir": at / "policy.toml" / "data"}, "data_dir: "),
    (lambda at: {"data_dir": Path("/proc/nope")}, "data_dir: /proc/nope cannot be made"),
    (lambda at: {"fleet": RelayFleetConfig(servers=("http://x",))}, "fleet.servers: "),
    (lambda at: {"fleet": RelayFleetConfig(servers=("nats://x:1",), user="a")}, "fleet: user and password_file"),
    (lambda at: {"fleet": RelayFleetConfig(servers=("nats://x:1",), credentials=at / "none")}, "fleet.credentials: "),
    (lambda at: {"fleet": RelayFleetConfig(servers=("nats://x:1",), ca_file=at / "tls.key")}, "fleet.ca_file: "),
    (
        lambda at: {"fleet": RelayFleetConfig(servers=("nats://x:1",), internal_address="x:y")},
        "fleet.internal_address: ",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[f"{n}-{row[1]}" for n, row in enumerate(ERRORS)])
def test_a_mistake_is_named(
    good: RelayConfig, tmp_path: Path, changes: Callable[[Path], dict[str, Any]], message: str
) -> None:
    found = [problem.message for problem in check(replace(good, **changes(tmp_path))).problems.errors]
    assert len(found) == 1
    assert found[0].startswith(message)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("", "policy: it has no [[allow]]"),
        (POLICY.replace("oidc:platform", "platform"), 'allow[0].groups: no token can give "platform"'),
        (POLICY.replace('"*"', '"anna"'), 'allow[0].users: no token can give "anna"'),
        (f"{POLICY}{ADMIN}", 'admin[0].users: no token can give "anna"'),
    ],
)
def test_a_policy_that_is_not_meant_is_a_warning(good: RelayConfig, tmp_path: Path, policy: str, message: str) -> None:
    (tmp_path / "policy.toml").write_text(policy)
    (found,) = required(good).problems.warnings
    assert found.message.startswith(message)
    assert found.place.source == str(tmp_path / "policy.toml")


def test_administrators_at_a_relay_that_takes_tokens_of_several_audiences(good: RelayConfig, tmp_path: Path) -> None:
    """One of them may be a cluster's, whose agents have seen such tokens."""
    (tmp_path / "policy.toml").write_text(POLICY + ADMIN.replace('"anna"', '"oidc:anna"'))
    assert not required(good).problems.warnings
    several = AUTHENTICATION.replace(
        "audiences: [relay]", "audiences: [relay, prod-1]\n    audienceMatchPolicy: MatchAny"
    )
    (tmp_path / "authentication.yaml").write_text(several)
    (found,) = required(good).problems.warnings
    assert "takes tokens for 2 audiences (prod-1, relay)" in found.message
    assert found.place.line == len(POLICY.splitlines()) + 1
    assert not required(replace(good, proof="required")).problems.warnings
    (tmp_path / "policy.toml").write_text(POLICY)
    assert not required(good).problems.warnings


def test_groups_that_no_issuer_gives(good: RelayConfig, tmp_path: Path) -> None:
    (tmp_path / "authentication.yaml").write_text(AUTHENTICATION.rpartition("    groups")[0])
    (found,) = required(good).problems.warnings
    assert "no issuer there says what groups a user has" in found.message


def test_names_from_expressions_may_be_any(good: RelayConfig, tmp_path: Path) -> None:
    text = AUTHENTICATION.replace('groups: {claim: groups, prefix: "oidc:"}', "groups: {expression: claims.roles}")
    (tmp_path / "authentication.yaml").write_text(text)
    (tmp_path / "policy.toml").write_text(POLICY.replace("oidc:platform", "platform"))
    assert list(required(good).problems) == []


def test_a_certificate_of_another_name_is_a_warning(good: RelayConfig, tmp_path: Path) -> None:
    tls = RelayTlsConfig(tmp_path / "tls.crt", tmp_path / "tls.key")
    (found,) = required(replace(good, public_address="other.test:443", tls=tls)).problems.warnings
    assert "is not for other.test" in found.message


def test_the_example_of_the_authentication_file_is_an_error_with_its_line(good: RelayConfig, tmp_path: Path) -> None:
    (tmp_path / "authentication.yaml").write_text(AUTHENTICATION.replace("login.test", "login.example.org"))
    (found,) = check(good).problems.errors
    assert str(found.place) == f"{tmp_path / 'authentication.yaml'}, line 5"
    assert "login.example.org is the example's name" in found.message


def test_a_directory_of_clients_that_others_can_change_is_refused(good: RelayConfig, tmp_path: Path) -> None:
    clients = tmp_path / "clients"
    settings = replace(good, client=RelayClientConfig(clients))
    (found,) = check(settings).problems.errors
    assert found.message.startswith(f"client.directory: {clients} is no directory")
    clients.mkdir()
    clients.chmod(0o777)
    (found,) = check(settings).problems.errors
    assert found.message.startswith("client.directory: every user of this machine can change")
    clients.chmod(0o700)
    assert list(check(settings).problems) == []


def test_a_ca_without_its_key(good: RelayConfig, ca: Authority) -> None:
    good.data_dir.mkdir()
    (good.data_dir / "ca.crt").write_text(ca.certificate_pem)
    (found,) = check(good).problems.errors
    assert "ca.key is missing" in found.message
    (good.data_dir / "ca.key").write_text(ca.issue_server(["x"]).key_pem)
    (good.data_dir / "ca.key").chmod(0o644)
    (found,) = check(good).problems.errors
    assert "ca.key is open to every user" in found.message
    with pytest.raises(StateError) as caught:
        open_authority(good.data_dir)
    assert found.message == f"data_dir: {caught.value.message}"
    (good.data_dir / "ca.key").chmod(0o600)
    (found,) = check(good).problems.errors
    assert "do not belong together" in found.message


def test_nothing_is_begun_with_settings_that_are_not_finished(good: RelayConfig, tmp_path: Path) -> None:
    unedited = replace(good, public_address="relay.example.org:443")
    with pytest.raises(ConfigError, match="the example's name"):
        require_complete(unedited)
    assert not (tmp_path / "data").exists()
    require_complete(good)
    open_authority(good.data_dir)
    assert has_authority(good)
    require_complete(unedited)  # a relay is there, whatever this command was told of it


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 65}, "1 to 64"),
        ({"workers": -1}, "1 to 64"),
        ({"workers": 2, "fleet": RelayFleetConfig(servers=("nats://127.0.0.1:1",))}, "together with fleet.servers"),
    ],
)
def test_counts_that_cannot_be(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        worker_count(replace(RelayConfig(), **settings))


def test_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_count(RelayConfig()) == 1
    assert worker_count(RelayConfig(workers=3)) == 3
    monkeypatch.setattr(module, "_cores", lambda: 100)
    assert worker_count(RelayConfig(workers=0)) == 64
    monkeypatch.setattr(module, "_cores", lambda: 1)
    assert worker_count(RelayConfig(workers=0, fleet=RelayFleetConfig(servers=("nats://h:1",)))) == 1
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        worker_count(RelayConfig(workers=2))


async def test_a_name_or_pattern_without_a_cluster_is_a_warning(good: RelayConfig, tmp_path: Path) -> None:
    """Once a cluster is enrolled. It is read in the registry, which is left as it was."""
    rule = '[[allow]]\nusers = ["*"]\nclusters = ["berlni", "berlin", "b*", "munich-*"]\n'
    (tmp_path / "policy.toml").write_text(rule)
    registry = await open_registry(good.data_dir)
    assert list(required(good).problems) == []
    token = await registry.create_join_token("berlin", uses=1, expires_at=4e9)
    await registry.redeem_join_token(token, "k" * 32, Authority.create("cluster CA").certificate_pem)
    assert len(required(good).problems.warnings) == 2, "also while a relay has it open"
    await registry.close()
    before = sorted(file.name for file in good.data_dir.iterdir())
    found = required(good).problems.warnings
    assert [str(one).partition(": ")[2] for one in found] == [
        'allow[0].clusters: no cluster that is enrolled is "berlni"; did you mean "berlin"?',
        'allow[0].clusters: no cluster that is enrolled is "munich-*"',
    ]
    assert found[0].place.line == 1
    assert sorted(file.name for file in good.data_dir.iterdir()) == before
    (tmp_path / "policy.toml").write_text(rule.replace('"b*"', ", ".join(f'"x{n}"' for n in range(500))))
    found = required(good).problems.warnings
    assert len(found) == MOST_UNMATCHED + 1
    assert "policy: 492 more names and patterns" in found[-1].message


def test_the_administrators_page(good: RelayConfig, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(POLICY + ADMIN)
    known = replace(good, tls=RelayTlsConfig(tmp_path / "tls.crt", tmp_path / "tls.key"))

    def found(**page: Any) -> list[str]:
        return [problem.setting for problem in check(replace(known, page=RelayPageConfig(**page))).problems]

    before = found()
    assert found(client_id="page", issuer="https://login.test", scopes=("openid", "groups")) == before
    secret = tmp_path / "secret"
    secret.write_text("a-secret\n")
    secret.chmod(0o600)
    assert found(client_id="page", client_secret_file=secret) == before
    for setting, page in (
        *(
            ("page.client_id", {"client_id": "", **more})
            for more in (
                {"issuer": "https://login.test"},
                {"client_secret_file": secret},
                {"scopes": ("openid",)},
                {"session": 900.0},
            )
        ),
        ("page.client_id", {"client_id": "relay"}),
        ("page.issuer", {"issuer": "https://login.test/"}),
        ("page.scopes", {"scopes": ("profile",)}),
        ("page.session", {"session": 60.0}),
        ("page.session", {"session": 86400.0}),
        ("page.client_secret_file", {"client_secret_file": tmp_path / "none"}),
    ):
        assert sorted(found(**{"client_id": "page", **page})) == sorted([*before, setting]), page
    two = AUTHENTICATION + AUTHENTICATION.partition("jwt:\n")[2].replace("login.test", "other.test")
    (tmp_path / "authentication.yaml").write_text(two)
    assert "page.issuer" in found(client_id="page")
    assert "page.issuer" not in found(client_id="page", issuer="https://other.test")
    # Browsers do not know the relay's own CA, and without an [[admin]] no person sees anything.
    (tmp_path / "policy.toml").write_text(POLICY)
    bare = replace(good, tls=RelayTlsConfig(), page=RelayPageConfig("page", "https://other.test"))
    warned = [problem.message for problem in check(bare).problems if problem.setting == "page.client_id"]
    assert [message.split(" ")[1] for message in warned] == ["browsers", "the"]
