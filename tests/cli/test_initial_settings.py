"""`config init`: the annotated files, filled; nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcbridge.cli import initial_settings
from arcbridge.cli.initial_settings import fill, initial_files, template
from arcbridge.cli.parser import parse
from arcbridge.cli.run import run
from arcbridge.errors import ConfigError, ExitCode
from arcbridge.identity import authentication
from arcbridge.identity.policy import Policy
from arcbridge.pki.enrolment import JoinToken
from arcbridge.settings.config import AgentConfig, ClientConfig, RelayConfig
from arcbridge.settings.config_loader import load

PIN = "sha256:" + "1" * 64
RELAY = ["--public-address", "relay.test:8443", "--issuer", "https://login.test", "--group", "platform"]


def init(role: str, directory: Path, *flags: str) -> int:
    return run(["--role", role, "config", "init", "--directory", str(directory), *flags])


def problems(role: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    run(["--role", role, "config", "check", "--config", str(directory / f"{role}.toml"), "-o", "json"])
    found: list[dict[str, str]] = json.loads(capsys.readouterr().out)["problems"]
    return found


def test_a_relay_is_complete_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "new" / "etc"
    assert init("relay", directory, *RELAY, "--group", "oidc:ops", "--data-dir", str(tmp_path / "data")) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].strip() == f"arcbridge --role relay --config {directory / 'relay.toml'}"
    assert said.err == ""
    assert problems("relay", directory, capsys) == []
    config = load(RelayConfig, directory / "relay.toml")
    assert (config.public_address, config.listen) == ("relay.test:8443", "0.0.0.0:8443")
    assert config.data_dir == tmp_path / "data"
    assert not config.data_dir.exists()
    (issuer,) = authentication.load(directory / "relay-authentication.yaml").issuers
    assert (issuer.url, issuer.audiences) == ("https://login.test", ("arcbridge-relay",))
    login = config.login
    assert (login.issuer, login.client_id) == ("https://login.test", "arcbridge")
    assert (login.audience, login.cluster_audience) == ("arcbridge-relay", "arcbridge-{cluster}")
    (rule,) = Policy.load((directory / "policy.toml").read_text()).rules
    assert rule.groups == {"oidc:platform", "oidc:ops"}
    assert (directory / "relay.toml").read_text().count("#") > 100, "the comments are there"


def test_a_file_is_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would have been left, and /etc/arcbridge written."""
    assert init("relay", tmp_path, *RELAY, "--config", str(tmp_path / "relay.toml")) == ExitCode.USAGE
    assert "give --directory DIR" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_group_no_user_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init("relay", tmp_path, *RELAY[:4]) == 0
    assert Policy.load((tmp_path / "policy.toml").read_text()).rules == ()
    assert "so no user may reach any cluster" in capsys.readouterr().err


def test_an_agent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--relay", "https://relay.test", "--relay-ca-pin", PIN, "--issuer", "https://login.test")
    assert init("agent", tmp_path, *flags, "--state-secret", "arc/agent", "--no-token-mode") == ExitCode.USAGE
    assert "flag --audience: required with --issuer; give the audience of the tokens" in capsys.readouterr().err
    flags = (*flags, "--audience", "arcbridge-berlin")
    assert init("agent", tmp_path, *flags, "--state-secret", "arc/agent") == 0
    config = load(AgentConfig, tmp_path / "agent.toml")
    assert (config.relays, config.relay_ca_pin) == (("https://relay.test",), PIN)
    assert (config.state.secret, config.state.directory, config.token_mode) == ("arc/agent", None, False)
    assert config.forbidden_audiences == ("arcbridge-relay",)
    assert config.authentication == tmp_path / "agent-authentication.yaml"
    (issuer,) = authentication.load(config.authentication).issuers
    assert (issuer.url, issuer.audiences, issuer.rules) == ("https://login.test", ("arcbridge-berlin",), ())
    (left,) = problems("agent", tmp_path, capsys)
    assert "this is not a pod" in left["message"]


def test_a_client(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relays = ("--relay", "https://a.test", "--relay", "https://b.test")
    flags = (*relays, "-n", "prod", "-n", "test", "--client-id", "ours")
    assert init("client", tmp_path, *flags, "--issuer", "https://login.test", "--relay-ca-pin", PIN) == 0
    config = load(ClientConfig, tmp_path / "client.toml")
    assert config.relay_urls() == ("https://a.test", "https://b.test")
    assert (config.cluster, config.clusters) == ("prod", ("test",))
    assert (config.login.issuer, config.login.client_id) == ("https://login.test", "ours")
    assert (config.login.audience, config.login.cluster_audience) == ("arcbridge-relay", "arcbridge-{cluster}")
    assert problems("client", tmp_path, capsys) == []


@pytest.mark.parametrize("role", ["relay", "agent", "client"])
def test_what_is_left_to_edit_is_named(role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(role, tmp_path) == 0
    said = capsys.readouterr()
    assert "is the example's name" in said.err
    assert said.out.splitlines()[-1].endswith("config check")


def test_nothing_is_overwritten_and_then_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policy.toml").write_text("mine")
    assert init("relay", tmp_path, *RELAY) == ExitCode.USAGE
    assert f"error: {tmp_path / 'policy.toml'}: exists, and nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["policy.toml"]
    assert (tmp_path / "policy.toml").read_text() == "mine"


def test_a_file_as_a_package_installs_it_is_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second command has flags; the third one finds what the second one wrote."""
    assert init("relay", tmp_path) == 0
    assert init("relay", tmp_path, *RELAY) == 0
    assert problems("relay", tmp_path, capsys) == []
    filled = {path: path.read_text() for path in tmp_path.iterdir()}
    assert len(filled) == 3
    assert init("relay", tmp_path, *RELAY[:2]) == ExitCode.USAGE
    assert "exists, and nothing is overwritten" in capsys.readouterr().err
    assert {path: path.read_text() for path in tmp_path.iterdir()} == filled


@pytest.mark.parametrize("role", ["relay", "agent"])
def test_on_a_machine_with_the_package_the_unit_is_the_next_command(
    role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command in the foreground would run as root, with state of root. An agent's records go to the rotated file."""
    (tmp_path / f"arcbridge-{role}.service").touch()
    monkeypatch.setattr(initial_settings, "_UNITS", tmp_path)
    monkeypatch.setattr(initial_settings, "_AUDIT_FILE", str(tmp_path / "audit.jsonl"))
    monkeypatch.setattr(initial_settings, "_is_root", lambda: True)
    etc = tmp_path / "etc"
    monkeypatch.setattr(initial_settings, "shared_settings", lambda _environment: etc)
    etc.mkdir()
    for name, text in initial_files(parse(["config", "init"], role), root=True, service=True).items():
        (etc / name).write_text(text)
    flags = {
        "relay": [*RELAY, "--data-dir", str(tmp_path / "data")],
        "agent": [
            *("--relay", "https://relay.test", "--relay-ca-pin", PIN, "--issuer", "https://login.test"),
            *("--audience", "arcbridge-berlin", "--state-dir", str(tmp_path / "state")),
            *("--kube-server", "https://api.test:6443", "--kube-token-file", str(tmp_path / "token")),
            *("--join-token-file", str(tmp_path / "join-token")),
        ],
    }[role]
    for name, text in (("token", "x"), ("join-token", JoinToken.create().text)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    assert run(["--role", role, "config", "init", *flags]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].strip() == f"systemctl enable --now arcbridge-{role}", said.err
    if role == "agent":
        assert load(AgentConfig, etc / "agent.toml").audit.file == str(tmp_path / "audit.jsonl")


def test_the_agent_of_a_package_writes_the_audit_file_that_is_rotated() -> None:
    config = Path(__file__).resolve().parents[2] / "config"
    text = initial_files(parse(["config", "init"], "agent"), root=True, service=True)["agent.toml"]
    (file,) = (line for line in text.splitlines() if line.startswith("file = "))
    assert f"{json.loads(file.removeprefix('file = '))} {{" in (config / "logrotate/arcbridge-agent").read_text()


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert init("client", tmp_path / "file") == ExitCode.USAGE
    assert "cannot be written" in capsys.readouterr().err


def test_an_ordinary_user_keeps_the_data_beside_the_settings() -> None:
    given = parse(["config", "init", "--public-address", "r.test"], "relay")
    assert 'data_dir = "relay-data"' in initial_files(given, root=False)["relay.toml"]
    assert '#data_dir = "/var/lib/arcbridge"' in initial_files(given, root=True)["relay.toml"]
    assert 'directory = "agent-state"' in initial_files(parse(["config", "init"], "agent"), root=False)["agent.toml"]


def test_a_wrong_flag_is_an_error() -> None:
    with pytest.raises(ConfigError, match="flag --workers: must be a whole number"):
        initial_files(parse(["config", "init", "--workers", "many"], "relay"), root=True)


def test_fill() -> None:
    text = 'a = 1\n#b = "x"\n[t]\n#a = 2\n#[t.u]\n#b = 3\n'
    assert fill(text, "a", True) == text.replace("a = 1", "a = true", 1)
    assert fill(text, "b", 'q"') == text.replace('#b = "x"', 'b = "q\\""')
    assert fill(text, "t.a", ("x", "y")) == text.replace("#a = 2", 'a = ["x", "y"]')
    with pytest.raises(ConfigError, match=r"t\.b: has no line"):
        fill(text, "t.b", 1)


@pytest.mark.parametrize("name", ["relay.toml", "agent.toml", "client.toml", "policy.toml"])
def test_the_files_of_a_clone_are_those_of_config(name: str) -> None:
    assert template(name) == (Path(__file__).resolve().parents[2] / "config" / name).read_text()
    with pytest.raises(ConfigError, match="missing from this installation"):
        template(f"no-{name}")
