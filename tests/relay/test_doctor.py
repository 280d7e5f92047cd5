"""The relay's doctor beside no relay: what is missing is said, and nothing is made. Real processes: tests/e2e."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.pki.authority import Authority
from arcbridge.relay import doctor
from arcbridge.relay.data_dir import instance_lock, open_authority, open_registry
from arcbridge.relay.doctor import diagnose
from arcbridge.relay.settings import CheckedRelay, check
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig, RelayTlsConfig
from arcbridge.settings.problems import Place

AUTHENTICATION = """
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer: {url: "https://127.0.0.1:1", audiences: [relay]}
  claimMappings: {username: {claim: sub, prefix: ""}}
"""


@pytest.fixture
def config(tmp_path: Path) -> RelayConfig:
    (tmp_path / "authentication.yaml").write_text(AUTHENTICATION)
    (tmp_path / "policy.toml").write_text('[[allow]]\nusers = ["*"]\nclusters = ["*"]\n')
    return RelayConfig(
        public_address="127.0.0.1:1",
        data_dir=tmp_path / "data",
        authentication=tmp_path / "authentication.yaml",
        policy=tmp_path / "policy.toml",
    )


async def codes(config: RelayConfig) -> dict[str, Finding]:
    return {one.code: one for one in await diagnose(config) if one.state in (FindingState.FAILED, FindingState.WARNING)}


async def test_before_the_first_start_nothing_is_made(config: RelayConfig) -> None:
    found = await codes(config)
    assert set(found) == {"relay_ca", "registry", "issuer_unreachable", "relay_not_running"}
    assert all(one.remedy for one in found.values())
    assert not config.data_dir.exists()


async def test_a_relay_that_has_no_admin_socket_runs_all_the_same(config: RelayConfig) -> None:
    """As one of a version before it: its lock says that it runs."""
    with instance_lock(config.data_dir):
        found = {one.code: one for one in await diagnose(config)}
    assert "relay_not_running" not in found
    assert "it is of an older version, or is still starting" in found["relay_older"].detail
    assert found["relay_older"].remedy.startswith("ask again; if it stays so, restart it")
    assert "relay_not_running" in {one.code for one in await diagnose(config)}


async def test_what_is_there_is_left_as_it_is(config: RelayConfig) -> None:
    open_authority(config.data_dir)
    await (await open_registry(config.data_dir)).close()
    before = {path.name: path.stat().st_mtime_ns for path in config.data_dir.iterdir()}
    found = await codes(config)
    assert list(found) == ["issuer_unreachable", "relay_not_running", "public_address"]
    assert found["public_address"].remedy.startswith("if it stays so once the relay runs: set public_address")
    after = {path.name: path.stat().st_mtime_ns for path in config.data_dir.iterdir()}
    assert {name: after[name] for name in before} == before


async def test_all_that_a_start_would_refuse_is_found_and_what_it_would_warn_of(config: RelayConfig) -> None:
    """Not the two files alone: limits, listen, workers, a certificate without its key."""
    config.policy.write_text("")
    config = replace(
        config,
        listen="0.0.0.0:70000",
        limits=RelayLimitsConfig(sessions=-5),
        tls=RelayTlsConfig(certificate=config.policy),
    )
    found = [one for one in await diagnose(config, lambda setting: Place("relay.toml", 7)) if one.code == "config"]
    expected = [*check(config).problems.errors, *check(config).problems.warnings]
    assert len(expected) == 4
    assert sorted(one.detail.rpartition(": ")[2] for one in found) == sorted(
        problem.message.rpartition(": ")[2] for problem in expected
    )
    assert [(one.hop, one.state) for one in found] == [
        ("settings", FindingState.FAILED),
        ("settings", FindingState.FAILED),
        ("relay's certificate", FindingState.FAILED),
        ("policy", FindingState.WARNING),
    ]
    assert "relay.toml, line 7: limits.sessions: must be at least 1, not -5" in [one.detail for one in found]


async def test_without_a_usable_certificate_the_public_address_is_not_blamed(config: RelayConfig) -> None:
    open_authority(config.data_dir)
    found = await diagnose(replace(config, tls=RelayTlsConfig(config.policy, config.policy)))
    assert {("relay's certificate", FindingState.FAILED), ("public address", FindingState.SKIPPED)} <= {
        (one.hop, one.state) for one in found
    }


async def test_a_certificate_that_is_gone_since_the_check(
    config: RelayConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = open_authority(config.data_dir).issue_server(["127.0.0.1"])
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate.write_text(issued.certificate_pem)
    key.write_text(issued.key_pem)

    def check_then_remove(settings: RelayConfig) -> CheckedRelay:
        checked = check(settings)
        certificate.unlink()
        return checked

    monkeypatch.setattr(doctor, "check", check_then_remove)
    found = await codes(replace(config, tls=RelayTlsConfig(certificate, key)))
    for code in ("certificate", "public_address"):
        assert found[code].detail == f"tls.certificate: {certificate} cannot be read: No such file or directory"


async def test_a_ca_that_lost_its_key(config: RelayConfig) -> None:
    open_authority(config.data_dir)
    (config.data_dir / "ca.key").unlink()
    assert "ca.key" in (await codes(config))["relay_ca"].detail


async def test_agents_that_follow_a_ca_of_a_later_backup_are_named(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = open_authority(config.data_dir).pin, Authority.create("x").pin
    rows = [{"cluster": "prod", "relay_ca": other, "certificate_ca": first}]

    async def answer(data_dir: Path, question: dict[str, str]) -> list[dict[str, str]] | None:
        return rows if question["ask"] == "agents" else None

    monkeypatch.setattr(doctor, "ask", answer)
    found = (await codes(config))["relay_ca_rotation"]
    assert found.detail == f"cluster prod has an agent that follows {other}, which this relay does not have"
    assert "Restore a later backup" in found.remedy
    rows[0]["relay_ca"] = first
    assert "relay_ca_rotation" not in await codes(config)
