"""The agent's check: each mistake by its setting, all of them at once, and no file made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.settings import EXAMPLE_RECIPIENT, check, required
from arcbridge.errors import ConfigError
from arcbridge.settings.config import (
    AgentConfig,
    AgentLimitsConfig,
    AgentStateConfig,
    AuditConfig,
    ElevationConfig,
    KubernetesConfig,
    RecordingBucketConfig,
    RecordingConfig,
    RecordingRuleConfig,
    SessionConfig,
    TargetConfig,
    TracingConfig,
)

CA = (Path(__file__).parents[1] / "fuzz/corpus/certificate/p256").read_text()
PIN = "sha256:" + "1" * 64
AGE = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"


@pytest.fixture
def good(tmp_path: Path) -> AgentConfig:
    (tmp_path / "ca.pem").write_text(CA)
    for name, text in (("token", "token"), ("join-token", "id.secret")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    (tmp_path / "authentication.yaml").write_text(
        "apiVersion: apiserver.config.k8s.io/v1\nkind: AuthenticationConfiguration\njwt:\n"
        "- issuer: {url: https://login.test, audiences: [cluster]}\n"
        "  claimMappings: {username: {claim: sub, prefix: ''}}\n"
    )
    return AgentConfig(
        relays=("https://relay.test:443",),
        relay_ca_pin=PIN,
        join_token_file=tmp_path / "join-token",
        authentication=tmp_path / "authentication.yaml",
        forbidden_audiences=("relay",),
        token_mode=False,
        kubernetes=KubernetesConfig("https://api.test:6443", tmp_path / "ca.pem", tmp_path / "token"),
        state=AgentStateConfig(directory=tmp_path / "state"),
        audit=AuditConfig(file=str(tmp_path / "audit.jsonl")),
    )


def test_good_settings_have_no_problem_and_nothing_is_made(good: AgentConfig, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    checked = required(good)
    assert list(checked.problems) == []
    assert [str(relay) for relay in checked.relays] == ["relay.test:443"]
    assert checked.issuers is not None
    assert sorted(tmp_path.iterdir()) == before


def recording(at: Path, **fields: Any) -> RecordingConfig:
    """Settings of recordings that are good but for these fields."""
    rules = {"all": RecordingRuleConfig()}
    return replace(RecordingConfig((AGE,), at / "recordings", rules=rules), **fields)


def bucket(at: Path, **fields: Any) -> RecordingBucketConfig:
    (at / "key").write_text("word")
    (at / "key").chmod(0o600)
    good = RecordingBucketConfig(
        "https://store.test", "recordings", access_key_file=at / "key", secret_key_file=at / "key"
    )
    return replace(good, **fields)


ERRORS: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (lambda at: {"relays": ()}, "relays: required but not set"),
    (lambda at: {"relays": ("http://x",)}, "relays[0]: "),
    (lambda at: {"relays": ("https://x", "x:443")}, "relays[1]: x:443 is given twice"),
    (lambda at: {"relays": ("https://relay.example.org",)}, "relays[0]: relay.example.org is the example's name"),
    (lambda at: {"relay_ca_pin": "sha1:00"}, "relay_ca_pin: not a pin"),
    (lambda at: {"relay_ca_pin": "sha256:" + "0" * 64}, "relay_ca_pin: these zeros are the example's"),
    (lambda at: {"relay_ca_file": at / "none"}, "relay_ca_file: "),
    (lambda at: {"relay_ca_file": at / "token"}, "relay_ca_file: "),
    (lambda at: {"relay_ca_file": at / "ca.pem"}, "relay_ca_pin: contradicts relay_ca_file"),
    (lambda at: {"state": AgentStateConfig()}, "state: exactly one"),
    (lambda at: {"state": AgentStateConfig(directory=at / "x", secret="a/b")}, "state: exactly one"),
    (lambda at: {"state": AgentStateConfig(secret="alone")}, "state.secret: write namespace/name"),
    (lambda at: {"state": AgentStateConfig(directory=at / "token")}, "state.directory: "),
    (lambda at: {"control_connections": 0}, "control_connections: must be at least 1"),
    (lambda at: {"tracing": TracingConfig("http://collector.test/v1/traces")}, "tracing.endpoint: http:// is for a"),
    (lambda at: {"tracing": TracingConfig("collector.test:4318")}, "tracing.endpoint: a URL https://host[:port]"),
    (lambda at: {"tracing": TracingConfig("https://x.example.org/v1/traces")}, "tracing.endpoint: x.example.org is"),
    (lambda at: {"tracing": TracingConfig("https://x.test", at / "token")}, "tracing.ca_file: "),
    (lambda at: {"tracing": TracingConfig("", at / "ca.pem")}, "tracing.ca_file: is of no use without"),
    (
        lambda at: {"recording": RecordingConfig(recipients=(AGE,))},
        "recording.recipients: is of no use without a table",
    ),
    (lambda at: {"recording": RecordingConfig(directory=at)}, "recording.directory: is of no use without a table"),
    (lambda at: {"recording": recording(at, recipients=())}, "recording.recipients: required for recordings"),
    (
        lambda at: {"recording": recording(at, recipients=("age1x",))},
        "recording.recipients[0]: a recipient is a public",
    ),
    (
        lambda at: {"recording": recording(at, recipients=(AGE, EXAMPLE_RECIPIENT))},
        "recording.recipients[1]: is the example's key",
    ),
    (lambda at: {"recording": recording(at, directory=None)}, "recording.directory: required for recordings"),
    (lambda at: {"recording": recording(at, directory=at / "token")}, "recording.directory: "),
    (lambda at: {"recording": recording(at, directory_bytes=9)}, "recording.directory_bytes: must be at least 1048576"),
    (lambda at: {"recording": recording(at, session_bytes=9)}, "recording.session_bytes: must be at least 1048576"),
    (
        lambda at: {"recording": recording(at, bucket=bucket(at), session_bytes=5 * 1024**3)},
        "recording.session_bytes: must be at most 5367660544 with a bucket",
    ),
    (
        lambda at: {"recording": recording(at, bucket=RecordingBucketConfig(bucket="x"))},
        "recording.bucket.bucket: is of no",
    ),
    (
        lambda at: {"recording": recording(at, bucket=bucket(at, endpoint="http://x.test"))},
        "recording.bucket.endpoint: http:// is for a server on this machine's loopback alone; write https://",
    ),
    (
        lambda at: {"recording": recording(at, bucket=bucket(at, bucket="A_b"))},
        "recording.bucket.bucket: the name of a",
    ),
    (
        lambda at: {"recording": recording(at, bucket=bucket(at, secret_key_file=None))},
        "recording.bucket.secret_key_file: ",
    ),
    (
        lambda at: {"recording": recording(at, bucket=bucket(at, access_key_file=at / "none"))},
        "recording.bucket.access_",
    ),
    (lambda at: {"recording": recording(at, bucket=bucket(at, ca_file=at / "token"))}, "recording.bucket.ca_file: "),
    (lambda at: {"authentication": None}, "authentication: missing"),
    (lambda at: {"authentication": at / "none"}, "authentication: "),
    (lambda at: {"authentication": at / "token"}, "document: must be a mapping"),
    (lambda at: {"max_token_lifetime": 1.0}, "max_token_lifetime: must be from 60 s"),
    (lambda at: {"denylist_file": at / "none"}, "denylist_file: "),
    (lambda at: {"denylist_file": at / "token"}, "denylist_file: the denylist is not valid TOML"),
    (lambda at: {"join_token_file": None}, "join_token_file: required for the first start"),
    (lambda at: {"join_token_file": at / "none"}, "join_token_file: "),
    (lambda at: {"join_token_file": at / "token"}, "join_token_file: "),
    (lambda at: {"kubernetes": KubernetesConfig()}, "kubernetes.server: missing, and this is not a pod"),
    (lambda at: {"kubernetes": KubernetesConfig("http://x", token_file=at / "token")}, "kubernetes.server: must be"),
    (lambda at: {"kubernetes": KubernetesConfig("https://x")}, "kubernetes: needs token_file"),
    (lambda at: {"kubernetes": KubernetesConfig("https://x", token_file=at / "none")}, "kubernetes.token_file: "),
    (lambda at: {"kubernetes": KubernetesConfig("https://x", at / "token", at / "token")}, "kubernetes.ca_file: "),
    (
        lambda at: {
            "kubernetes": KubernetesConfig(
                "https://x", client_certificate_file=at / "ca.pem", client_key_file=at / "token"
            )
        },
        "kubernetes.client_certificate_file: ",
    ),
    (
        lambda at: {"kubernetes": KubernetesConfig("https://x", credential_bundle_file=at / "ca.pem")},
        "kubernetes.credential_bundle_file: ",
    ),
    (
        lambda at: {"kubernetes": KubernetesConfig("https://x", token_file=at / "token", drain_label="a")},
        "kubernetes.drain_label: write key=value",
    ),
    (
        lambda at: {"kubernetes": KubernetesConfig("https://x", token_file=at / "token", drain_label="a=b")},
        "kubernetes.drain_label: needs the pod's name",
    ),
    (lambda at: {"session": SessionConfig(max_age=9.0)}, "session.max_age: must be at least 10 s"),
    (lambda at: {"session": SessionConfig(drain=0.0)}, "session.drain: must be above 0 s"),
    (lambda at: {"session": SessionConfig(drain=1e6)}, "session.drain: must be above 0 s, and at most 24 h"),
    (lambda at: {"targets": {"db": TargetConfig("a:1")}}, "targets.db: needs users or groups"),
    (lambda at: {"limits": AgentLimitsConfig(streams=-1)}, "limits.streams: must be 0"),
    (lambda at: {"audit": AuditConfig(file=str(at / "none" / "audit"))}, "audit.file: "),
    (lambda at: {"audit": AuditConfig(file=str(at))}, "audit.file: "),
    (lambda at: {"audit": AuditConfig(on_failure="shrug")}, "audit.on_failure: "),
    (lambda at: {"elevation": ElevationConfig(default="read-only")}, "elevation.default: without elevation.groups"),
    (
        lambda at: {"elevation": ElevationConfig(("a",), default="none")},
        "elevation.default: must be one of all, read-only",
    ),
    (lambda at: {"elevation": ElevationConfig(("a",), "all", ())}, "elevation.default_groups: either"),
    (lambda at: {"elevation": ElevationConfig(("a",), "all", ("*", "b"))}, "elevation.default_groups: either"),
    (lambda at: {"elevation": ElevationConfig(tuple(f"g{n}" for n in range(33)))}, "elevation.groups: at most 32"),
]


def test_a_pod_that_leaves_needs_its_namespace(good: AgentConfig, tmp_path: Path) -> None:
    """Which the agent reads beside the token of its ServiceAccount."""
    config = replace(good, kubernetes=replace(good.kubernetes, drain_label="a=b"))
    (error,) = check(config, {"POD_NAME": "agent-x"}, tmp_path).problems.errors
    assert error.setting == "kubernetes.drain_label"
    assert error.message.startswith("kubernetes.drain_label: needs the pod's namespace, which is not in ")
    (tmp_path / "namespace").write_text("arc")
    assert check(config, {"POD_NAME": "agent-x"}, tmp_path).problems.errors == []


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[f"{n}-{row[1]}" for n, row in enumerate(ERRORS)])
def test_a_mistake_is_named(
    good: AgentConfig, tmp_path: Path, changes: Callable[[Path], dict[str, Any]], message: str
) -> None:
    config = replace(good, **changes(tmp_path))
    found = [problem.message for problem in check(config, {}, tmp_path / "none").problems.errors]
    assert len(found) == 1
    assert found[0].startswith(message)
    assert not (tmp_path / "state").exists()


WARNINGS: list[tuple[dict[str, Any], str]] = [
    ({"relay_ca_pin": ""}, "relay_ca_pin: missing"),
    ({"token_mode": True}, "token_mode: on"),
    ({"forbidden_audiences": ()}, "forbidden_audiences: empty"),
    ({"audit": AuditConfig(file="")}, "audit.file: empty"),
]


@pytest.mark.parametrize(("changes", "message"), WARNINGS, ids=[row[1] for row in WARNINGS])
def test_what_may_not_be_meant_is_a_warning(good: AgentConfig, changes: dict[str, Any], message: str) -> None:
    problems = required(replace(good, **changes)).problems
    (found,) = problems.warnings
    assert found.message.startswith(message)


def test_all_at_once(good: AgentConfig) -> None:
    config = replace(good, relays=("http://x",), control_connections=0, targets={"db": TargetConfig("a:1")})
    assert len(check(config).problems.errors) == 3
    with pytest.raises(ConfigError, match=r"relays\[0\].* \(and 2 more: `config check` lists them\)"):
        required(config)


def test_an_agent_that_only_enrols_needs_no_api_server(good: AgentConfig) -> None:
    config = replace(good, kubernetes=KubernetesConfig())
    required(config, serves=False)
    with pytest.raises(ConfigError, match=r"kubernetes\.server"):
        required(replace(config, state=AgentStateConfig(secret="a/b")), serves=False)


def test_a_secret_that_every_user_may_read_is_a_warning(good: AgentConfig, tmp_path: Path) -> None:
    (tmp_path / "token").chmod(0o644)
    (found,) = check(good).problems.warnings
    assert "every user of this machine may read" in found.message


def test_a_denylist_has_a_line(good: AgentConfig, tmp_path: Path) -> None:
    (tmp_path / "deny.toml").write_text('[[deny]]\nuser = "a"\n\n[[deny]]\nreason = "b"\nuser = 1\n')
    (found,) = check(replace(good, denylist_file=tmp_path / "deny.toml")).problems.errors
    assert found.place.line == 6


@pytest.mark.parametrize("group", ["system:masters", "SYSTEM:masters", "*", "", " a", "a\u200bb"])
def test_g2_what_may_be_lent_is_checked(good: AgentConfig, group: str) -> None:
    """Names of Kubernetes' own, and names that read differently elsewhere, are lent by no rule."""
    (error,) = check(replace(good, elevation=ElevationConfig(("fine", group))), {}).problems.errors
    assert error.setting == "elevation.groups[1]"


def test_what_is_lent_has_to_be_among_the_groups_that_requests_carry(good: AgentConfig) -> None:
    elevation = ElevationConfig(("operators",))
    kubernetes = replace(good.kubernetes, impersonate_groups=("dev",))
    (error,) = check(replace(good, elevation=elevation, kubernetes=kubernetes), {}).problems.errors
    assert error.message.startswith("elevation.groups[0]: 'operators' is not among kubernetes.impersonate_groups")
    kubernetes = replace(kubernetes, impersonate_groups=("dev", "operators"))
    assert check(replace(good, elevation=elevation, kubernetes=kubernetes), {}).problems.errors == []
