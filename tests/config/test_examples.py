"""The annotated settings files: complete, true, and loaded by the very loader that the program uses."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.client.credentials import audience_parameters
from arcbridge.client.credentials.client_authentication import ClientAuthentication
from arcbridge.client.credentials.client_credentials import ClientCredentials
from arcbridge.client.credentials.workload import WorkloadTokens
from arcbridge.identity import authentication
from arcbridge.identity.claims import Identity, map_claims
from arcbridge.identity.policy import Policy
from arcbridge.identity.refusal import TokenRefused
from arcbridge.settings import config
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config_loader import load

CONFIG = Path(__file__).resolve().parents[2] / "config"
KINDS: dict[str, type[Any]] = {"relay": config.RelayConfig, "agent": config.AgentConfig, "client": config.ClientConfig}

# Durations are written as people write them; the loader turns them into the default.
_COMMENTED = re.compile(
    r"#(\[(?:targets|graph|regions|limits\.(?:groups|users|actors)|audit\.sinks|recording\.rules)\.[^\]]+\]"
    r"|[a-z_]+ = .*)"
)
NAMED = {
    ("targets",),
    ("graph",),
    ("regions",),
    ("limits", "groups"),
    ("limits", "users"),
    ("limits", "actors"),
    ("audit", "sinks"),
    ("recording", "rules"),
}
"""Tables whose keys are names that an operator gives."""


def keys(kind: type[Any], path: tuple[str, ...] = ()) -> set[str]:
    found: set[str] = set()
    for name, hint in typing.get_type_hints(kind).items():
        if is_dataclass(hint):
            found |= keys(typing.cast("type[Any]", hint), (*path, name))
        elif typing.get_origin(hint) is dict:
            found |= keys(typing.get_args(hint)[1], (*path, name, "*"))
        else:
            found.add(".".join((*path, name)))
    return found


def paths(document: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        shown = "*" if path in NAMED else key
        if isinstance(value, dict):
            found |= paths(value, (*path, shown))
        else:
            found[".".join((*path, shown))] = value
    return found


def uncommented(text: str) -> str:
    return "\n".join(match[1] if (match := _COMMENTED.fullmatch(line)) else line for line in text.splitlines())


def value_at(settings: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        settings = getattr(settings, name)
    return settings


def default_at(kind: type[Any], dotted: str) -> Any:
    *tables, last = dotted.split(".")
    for name in tables:
        kind = typing.get_type_hints(kind)[name]
    (field,) = [field for field in fields(kind) if field.name == last]
    return field.default if field.default is not MISSING else field.default_factory()


@pytest.mark.parametrize("role", KINDS)
def test_every_setting_is_there_and_no_other(role: str, tmp_path: Path) -> None:
    text = uncommented((CONFIG / f"{role}.toml").read_text())
    written = paths(tomllib.loads(text))
    assert set(written) == keys(KINDS[role])
    whole = tmp_path / f"{role}.toml"
    whole.write_text(text)
    load(KINDS[role], whole)


@pytest.mark.parametrize("role", KINDS)
def test_what_is_shown_as_default_is_the_default(role: str, tmp_path: Path) -> None:
    text = (CONFIG / f"{role}.toml").read_text()
    whole = tmp_path / f"{role}.toml"
    whole.write_text(uncommented(text))
    settings = load(KINDS[role], whole)
    active = set(paths(tomllib.loads(text)))
    wrong = {}
    for dotted in keys(KINDS[role]) - active:
        if "*" in dotted:
            continue
        default = default_at(KINDS[role], dotted)
        if default not in (None, "", ()) and value_at(settings, dotted) != default:
            wrong[dotted] = (value_at(settings, dotted), default)
    assert wrong == {}


@pytest.mark.parametrize("role", KINDS)
def test_every_setting_has_a_comment_above_it(role: str) -> None:
    lines = (CONFIG / f"{role}.toml").read_text().splitlines()
    bare = []
    for number, line in enumerate(lines):
        if _COMMENTED.fullmatch(line) or re.match(r"[a-z_]+ = ", line):
            above = [lines[n] for n in range(number - 1, max(-1, number - 8), -1)]
            if not any(text.startswith("# ") for text in above):
                bare.append(line)
    assert bare == []


def test_the_policy_is_read_and_denies_by_default() -> None:
    policy = Policy.load((CONFIG / "policy.toml").read_text())

    def identity(username: str, *groups: str) -> Identity:
        return Identity(username=username, uid="", groups=groups, extra={}, subject="s", issuer="i", expires_at=0.0)

    assert policy.allows(identity("oidc:root@example.org", "oidc:platform"), "anything")
    assert policy.allows(identity("oidc:anna@example.org"), "shop-eu")
    assert not policy.allows(identity("oidc:anna@example.org"), "prod-eu")
    assert not policy.allows(identity("anna@example.org"), "shop-eu")


def test_relay_and_agent_ask_for_different_audiences() -> None:
    relay = authentication.load(CONFIG / "relay-authentication.yaml")
    agent = authentication.load(CONFIG / "agent-authentication.yaml")
    audiences = [set(file.issuers[0].audiences) for file in (relay, agent)]
    assert not audiences[0] & audiences[1]


@pytest.mark.parametrize("role", ["relay", "agent"])
def test_the_files_that_the_settings_name_are_shipped(role: str) -> None:
    text = uncommented((CONFIG / f"{role}.toml").read_text())
    named = re.findall(r'^(?:authentication|policy) = "(.+)"', text, re.MULTILINE)
    assert named
    assert all((CONFIG / name).is_file() for name in named)


EXAMPLES = sorted(file for file in (CONFIG / "examples").rglob("*") if file.is_file())


def role_of(file: Path) -> str:
    """The role that a settings file of the examples is for; those of jobs are a client's."""
    return "client" if file.stem.startswith("ci") else file.stem


def named_in(directory: Path, suffix: str) -> list[Path]:
    return [file for file in EXAMPLES if file.parent == directory and file.suffix == suffix]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: str(file.relative_to(CONFIG / "examples")))
def test_every_file_of_the_examples_loads(file: Path) -> None:
    if file.suffix == ".json":
        assert json.loads(file.read_text())
    elif file.suffix == ".yaml":
        assert authentication.load(file).issuers
    elif file.suffix == ".yml":  # another program's settings
        assert yaml.safe_load(file.read_text())
    elif file.suffix == ".sh":
        assert file.stat().st_mode & 0o111
        subprocess.run(["sh", "-n", file], check=True)
    elif file.name == "policy.toml":
        assert Policy.load(file.read_text())
    else:
        settings = load(KINDS[role_of(file)], file)
        for name in ("authentication", "policy"):
            named = getattr(settings, name, None)
            assert named is None or named.is_file()
        if isinstance(settings, config.ClientConfig):
            login = settings.login
            if login.issuer:
                ClientAuthentication(login, environment=JOB)
            if login.grant_type == PROGRAM:
                ClientCredentials(login, environment=JOB)
            if login.workload:
                WorkloadTokens(login, environment=JOB)
            for word in (*login.command, *login.client_assertion_command):
                assert (file.parent / Path(word).name).is_file()


JOB = {"ACTIONS_ID_TOKEN_REQUEST_URL": "https://actions.example.org/token", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "secret"}
"""What a job of GitHub Actions finds in its environment."""


@pytest.mark.parametrize("directory", sorted({file.parent for file in EXAMPLES}), ids=lambda directory: directory.name)
def test_the_files_of_an_example_fit_together(directory: Path) -> None:
    """One issuer, an audience for each end, and clients that ask for what relay and agent want."""
    relay = authentication.load(directory / "relay-authentication.yaml").issuers[0]
    agent = authentication.load(directory / "agent-authentication.yaml").issuers[0]
    assert relay.url == agent.url
    assert not set(relay.audiences) & set(agent.audiences)
    forbidden = load(config.AgentConfig, directory / "agent.toml").forbidden_audiences
    assert set(forbidden) == set(relay.audiences)
    clients = [file for file in named_in(directory, ".toml") if role_of(file) == "client"]
    assert clients
    for file in clients:
        settings = load(config.ClientConfig, file)
        login = settings.login
        assert login.issuer in ("", relay.url)
        assert not login.audience or login.audience in relay.audiences
        if login.cluster_audience:
            assert login.cluster_audience.replace("{cluster}", settings.cluster or "prod-eu") in agent.audiences
        elif login.issuer:  # the id token's audience
            assert login.client_id in agent.audiences
        else:
            assert login.access_token_file
            assert login.id_token_file


@pytest.mark.parametrize(
    ("example", "scopes"),
    [
        ("keycloak", {"openid", "arcbridge-cluster"}),
        ("entra-id", {"openid", "profile", "offline_access", "api://33333333-3333-3333-3333-333333333333/.default"}),
        ("dex", {"openid", "email", "groups", "offline_access", "audience:server:client_id:arcbridge-cluster"}),
    ],
)
def test_what_a_login_asks_for_a_cluster(example: str, scopes: set[str]) -> None:
    login = load(config.ClientConfig, CONFIG / "examples" / example / "client.toml").login
    form = audience_parameters.for_cluster(login, login.cluster_audience)
    assert set(form.pop("scope").split()) == scopes
    assert form == {}
    assert set(audience_parameters.for_relay(login)["scope"].split()) <= set(login.scopes)


ANNA, SHOP = "anna@example.org", "example/shop"
NAMES: list[tuple[str, str, dict[str, Any], str, tuple[str, ...]]] = [
    ("keycloak", "agent", {"preferred_username": "anna", "groups": ["a"]}, "oidc:anna", ("oidc:a",)),
    ("entra-id", "agent", {"oid": "66", "upn": ANNA, "groups": ["77"]}, ANNA, ("77",)),
    ("entra-id", "agent", {"oid": "66", "idtyp": "app", "azp": "55"}, "66", ()),
    ("dex", "agent", {"email": ANNA, "email_verified": True, "groups": ["a"]}, f"oidc:{ANNA}", ("oidc:a",)),
    ("okta", "relay", {"sub": ANNA, "groups": ["a"]}, f"okta:{ANNA}", ("okta:a",)),
    ("okta", "agent", {"preferred_username": ANNA, "groups": ["a"]}, f"okta:{ANNA}", ("okta:a",)),
    (
        "google",
        "agent",
        {"email": "deployer@example-project.iam.gserviceaccount.com", "email_verified": True},
        "google:deployer@example-project.iam.gserviceaccount.com",
        (),
    ),
    (
        "github-actions",
        "agent",
        {"sub": f"repo:{SHOP}:environment:production", "repository": SHOP, "repository_owner_id": "1234567"},
        f"github:repo:{SHOP}:environment:production",
        (f"github:repo:{SHOP}",),
    ),
    (
        "gitlab",
        "agent",
        {"sub": f"project_path:{SHOP}", "project_path": SHOP, "namespace_id": "72", "ref_protected": "true"},
        f"gitlab:project_path:{SHOP}",
        (f"gitlab:project:{SHOP}",),
    ),
]


@pytest.mark.parametrize(("example", "end", "claims", "username", "groups"), NAMES)
def test_the_names_that_an_example_gives(
    example: str, end: str, claims: dict[str, Any], username: str, groups: tuple[str, ...]
) -> None:
    issuer = authentication.load(CONFIG / "examples" / example / f"{end}-authentication.yaml").issuers[0]
    identity = map_claims(issuer, {"sub": "subject", "exp": 1.0} | claims)
    assert (identity.username, identity.groups) == (username, groups)


@pytest.mark.parametrize(
    ("example", "claims"),
    [
        ("entra-id", {"oid": "66", "upn": ANNA, "_claim_names": {"groups": "src1"}}),
        ("google", {"email": "deployer@other.iam.gserviceaccount.com", "email_verified": True}),
        ("github-actions", {"sub": "repo:other/x", "repository": "other/x", "repository_owner_id": "7"}),
        ("gitlab", {"sub": "p", "project_path": SHOP, "namespace_id": "72", "ref_protected": "false"}),
        ("gitlab", {"sub": "p", "project_path": "o/x", "namespace_id": "7", "ref_protected": "true"}),
    ],
)
def test_what_an_example_refuses(example: str, claims: dict[str, Any]) -> None:
    issuer = authentication.load(CONFIG / "examples" / example / "agent-authentication.yaml").issuers[0]
    with pytest.raises(TokenRefused):
        map_claims(issuer, {"sub": "subject", "exp": 1.0} | claims)


@pytest.mark.parametrize("kind", KINDS)
def test_the_comment_of_a_table_stands_above_its_header(kind: str) -> None:
    """And no other table was put between the two."""
    text = (CONFIG / f"{kind}.toml").read_text(encoding="utf-8")
    (comment,) = re.findall(r"(?m)^((?:#.*\n)*)\[observe\]$", text)
    assert comment.startswith("# Metrics, health and logs"), "or [observe] lacks it"
    if kind == "agent":
        (spans,) = re.findall(r"(?m)^((?:#.*\n)*)\[tracing\]$", text)
        assert "Metrics" not in spans
