"""`config check` and `config print`."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arcbridge.cli.configuration import as_data, as_toml
from arcbridge.cli.run import run
from arcbridge.errors import ExitCode
from arcbridge.settings.config import AgentConfig, AgentStateConfig, TargetConfig
from arcbridge.settings.config_loader import load
from tests.support.unprivileged import as_unprivileged_user, closed_directory

CONFIG = Path(__file__).resolve().parents[2] / "config"
CA = (Path(__file__).parents[1] / "fuzz/corpus/certificate/p256").read_text()
PIN = "sha256:" + "1" * 64
RELAY = """\
public_address = "relay.test:443"
data_dir = "data"
authentication = "authentication.yaml"
policy = "policy.toml"
[limits]
sessions = 100
"""
AGENT = f"""\
relays = ["https://relay.test"]
relay_ca_pin = "{PIN}"
join_token_file = "join-token"
authentication = "authentication.yaml"
forbidden_audiences = ["relay"]
token_mode = false
[kubernetes]
server = "https://api.test:6443"
ca_file = "ca.pem"
token_file = "token"
[state]
directory = "state"
[audit]
file = "audit.jsonl"
"""
CLIENT = f"""\
relays = ["https://relay.test"]
relay_ca_pin = "{PIN}"
state_dir = "state"
[login]
issuer = "https://login.test"
client_id = "arcbridge"
"""
AUTHENTICATION = """\
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer:
    url: https://login.test
    audiences: [arcbridge]
  claimMappings:
    username: {claim: email, prefix: "oidc:"}
    groups: {claim: groups, prefix: "oidc:"}
"""
POLICY = '[[allow]]\ngroups = ["oidc:platform"]\nclusters = ["prod-*"]\n'
FILES = {
    "relay.toml": RELAY,
    "agent.toml": AGENT,
    "client.toml": CLIENT,
    "authentication.yaml": AUTHENTICATION,
    "policy.toml": POLICY,
    "ca.pem": CA,
    "token": "token\n",
    "join-token": "id.secret\n",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    return tmp_path


def checked(role: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = run(["--role", role, "config", "check", "--config", str(directory / f"{role}.toml"), "-o", "json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_misspelt_variable_is_a_warning(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARCBRIDGE_LISTNE", "0.0.0.0:1")
    monkeypatch.setenv("ARCBRIDGE_LOOP", "asyncio")
    assert run(["--role", "relay", "config", "check", "--config", str(directory / "relay.toml")]) == ExitCode.DONE
    said = "environment variable ARCBRIDGE_LISTNE sets nothing; did you mean ARCBRIDGE_LISTEN?"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize("role", ["relay", "agent", "client"])
def test_good_ones(role: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(directory.iterdir())
    assert checked(role, directory, capsys) == (0, {"ok": True, "role": role, "problems": []})
    assert run(["--role", role, "config", "check", "--config", str(directory / f"{role}.toml")]) == 0
    assert capsys.readouterr().out.endswith(f"the settings of the {role} are complete and well-formed\n")
    assert sorted(directory.iterdir()) == before


MISTAKES: list[tuple[str, str, str, str, int, str]] = [
    # role, file, what is replaced, what by, line, what is said
    ("relay", "authentication.yaml", "/v1", "/v2", 1, "apiVersion: must be"),
    ("relay", "authentication.yaml", "kind: A", "kind: B", 2, "kind: must be"),
    ("relay", "authentication.yaml", "https://login.test", "http://login.test", 5, "must be an https URL"),
    ("relay", "authentication.yaml", "audiences: [arcbridge]", "audiences: []", 6, "at least one audience"),
    ("relay", "authentication.yaml", "audiences:", "audience:", 6, "issuer.audience: unknown field"),
    ("relay", "authentication.yaml", ', prefix: "oidc:"}\n    groups', "}\n    groups", 8, "prefix: must be given"),
    ("relay", "authentication.yaml", "  claimMappings:", "  claimMapping:", 4, "claimMappings: missing"),
    ("relay", "authentication.yaml", "jwt:", "jwt: [", 4, "not valid YAML"),
    ("relay", "authentication.yaml", "    url:", "    url: https://x.test\n    url:", 6, "key 'url' is given twice"),
    (
        "relay",
        "authentication.yaml",
        "  claimMappings:",
        '  claimValidationRules: [{expression: "claims.x ="}]\n  claimMappings:',
        7,
        "claimValidationRules[0].expression: ",
    ),
    ("relay", "authentication.yaml", "claim: email, ", "", 8, "needs claim or expression"),
    ("relay", "policy.toml", "groups", "group", 2, "allow[0].group: unknown key"),
    ("relay", "policy.toml", "prod-*", "PROD", 3, "allow[0].clusters[0]: only lower-case"),
    ("relay", "policy.toml", '["oidc:platform"]', "[]", 1, "allow[0]: needs users or groups"),
    ("relay", "policy.toml", '"prod-*"', "prod", 3, "not valid TOML"),
    ("relay", "relay.toml", "sessions = 100", "sessions = -5", 6, "limits.sessions: must be at least 1, not -5"),
    ("relay", "relay.toml", "sessions = 100", 'sessions = "many"', 6, "limits.sessions must be a whole number"),
    ("relay", "relay.toml", "sessions = 100", "session = 100", 6, "unknown setting 'limits.session'; did you mean"),
    ("relay", "relay.toml", '"data"', '"/proc/nope"', 2, "data_dir: /proc/nope cannot be made"),
    ("relay", "relay.toml", "relay.test", "relay.example.org", 1, "is the example's name"),
    ("relay", "relay.toml", '"policy.toml"', '"none.toml"', 4, "none.toml does not exist"),
    ("relay", "relay.toml", "[limits]", "[limits", 5, "not valid TOML"),
    ("relay", "relay.toml", "[limits]", '[observe]\nlog_level = "loud"\n[limits]', 6, "log_level: 'loud' is unknown"),
    ("agent", "authentication.yaml", "https://login.test", "https://login.example.org", 5, "is the example's name"),
    ("agent", "agent.toml", "[state]", '[targets.db]\naddress = "db:5432"\n[state]', 11, "needs users or groups"),
    ("agent", "agent.toml", PIN, "sha256:1", 2, "relay_ca_pin: not a pin"),
    ("agent", "agent.toml", 'directory = "state"', "", 11, "exactly one of state.directory and state.secret"),
    ("agent", "agent.toml", '"audit.jsonl"', '"none/audit.jsonl"', 14, "audit.file: "),
    ("agent", "agent.toml", "[state]", "[limits]\nstreams = -1\n[state]", 12, "limits.streams: must be 0"),
    ("agent", "ca.pem", CA, "no certificate", 1, "not a PEM certificate"),
    ("agent", "token", "token", "two words", 1, "holds no token"),
    ("agent", "join-token", "id.secret", "secret", 1, "holds no join token"),
    ("client", "client.toml", 'client_id = "arcbridge"', "", 4, "login.client_id: required with login.issuer"),
    ("client", "client.toml", "https://relay.test", "http://relay.test", 1, "only https:// is spoken here"),
    ("client", "client.toml", "https://login.test", "login.test", 5, "is not an https:// URL"),
    ("client", "client.toml", "[login]", 'cluster = "BAD"\n[login]', 4, "not a cluster name"),
]


@pytest.mark.parametrize(
    ("role", "file", "old", "new", "line", "words"), MISTAKES, ids=[f"{row[1]}-{n}" for n, row in enumerate(MISTAKES)]
)
def test_a_mistake_is_found_with_file_and_line(
    directory: Path, capsys: pytest.CaptureFixture[str], role: str, file: str, old: str, new: str, line: int, words: str
) -> None:
    text = (directory / file).read_text()
    assert old in text
    (directory / file).write_text(text.replace(old, new, 1))
    before = sorted(directory.iterdir())
    code, document = checked(role, directory, capsys)
    assert (code, document["ok"]) == (ExitCode.USAGE, False)
    errors = [problem for problem in document["problems"] if problem["severity"] == "error"]
    found = [problem for problem in errors if words in problem["message"]]
    assert found, errors
    assert (found[0]["source"], found[0]["line"]) == (str(directory / file), line)
    assert sorted(directory.iterdir()) == before, "nothing is made"


def test_all_mistakes_at_once(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "relay.toml").write_text(RELAY.replace("100", "-5").replace("relay.test", "x y") + "agent = 1\n")
    (directory / "authentication.yaml").write_text(AUTHENTICATION.replace("/v1", "/v2").replace("https", "http"))
    (directory / "policy.toml").write_text(POLICY.replace("prod", "PROD") + "[[allow]]\nuser = []\n")
    assert run(["--role", "relay", "config", "check", "--config", str(directory / "relay.toml")]) == ExitCode.USAGE
    said = capsys.readouterr()
    assert said.out == (
        f"{directory / 'relay.toml'}: the relay does not start with these settings: "
        f"{len(said.err.splitlines())} errors\n"
    )
    assert len(said.err.splitlines()) == 9
    assert f"error: {directory / 'policy.toml'}, line 5: allow[1].user: unknown key" in said.err


@pytest.mark.parametrize("role", ["relay", "agent", "client"])
def test_the_annotated_files_are_refused_until_they_are_edited(
    role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in CONFIG.glob("*.*"):
        shutil.copy(file, tmp_path)
    code, document = checked(role, tmp_path, capsys)
    assert code == ExitCode.USAGE
    assert any("is the example's name" in problem["message"] for problem in document["problems"])


def test_token_create_with_an_unedited_example_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in CONFIG.glob("*.*"):
        shutil.copy(file, tmp_path)
    text = (tmp_path / "relay.toml").read_text()
    (tmp_path / "relay.toml").write_text(text.replace('#data_dir = "/var/lib/arcbridge"', 'data_dir = "data"'))
    before = sorted(tmp_path.iterdir())
    for command in (
        ["token", "create", "--cluster", "a"],
        ["token", "list"],
        ["token", "delete", "a"],
        ["cluster", "list"],
        ["cluster", "revoke", "a"],
        ["cluster", "restore", "a"],
        ["user", "revoke", "a"],
        ["user", "restore", "a"],
        ["user", "list"],
    ):
        assert run(["--role", "relay", "--config", str(tmp_path / "relay.toml"), *command]) != 0
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert sorted(tmp_path.iterdir()) == before
    assert run(["--role", "relay", "--config", str(tmp_path / "relay.toml"), "token", "create", "--cluster", "a"]) == 2
    line = text.splitlines().index('public_address = "relay.example.org:443"') + 1
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path / 'relay.toml'}, line {line}: public_address: relay.example.org is the example's name"
    )


@pytest.mark.parametrize("role", ["relay", "agent"])
def test_a_start_says_what_the_check_says(role: str, directory: Path) -> None:
    file = directory / f"{role}.toml"
    file.write_text(file.read_text().replace("authentication.yaml", "none.yaml"))
    command = [sys.executable, "-m", "arcbridge", "--role", role, "--config", str(file)]
    started = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    check = subprocess.run([*command, "config", "check"], capture_output=True, text=True, timeout=60, check=False)
    assert (started.returncode, check.returncode) == (ExitCode.USAGE, ExitCode.USAGE)
    assert started.stderr.splitlines()[-1] == check.stderr.splitlines()[0]
    assert "none.yaml" in started.stderr
    assert not (directory / "data").exists()
    assert not (directory / "state").exists()


@pytest.mark.parametrize(
    ("role", "setting", "replaced"),
    [
        ("relay", "data_dir", '"data"'),
        ("relay", "policy", '"policy.toml"'),
        ("relay", "authentication", '"authentication.yaml"'),
        ("agent", "join_token_file", '"join-token"'),
        ("agent", "kubernetes.token_file", '"token"'),
        ("agent", "kubernetes.ca_file", '"ca.pem"'),
        ("agent", "state.directory", '"state"'),
        ("agent", "audit.file", '"audit.jsonl"'),
    ],
)
def test_a_directory_that_may_not_be_searched_is_a_finding_of_check_and_start(
    role: str, setting: str, replaced: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its line and what to do; a start says the same, and nothing is made."""
    with closed_directory() as closed:
        directory = closed.parent
        for name, text in FILES.items():
            (directory / name).write_text(text)
            (directory / name).chmod(0o644)
            (closed / name).write_text(text)
        file = directory / f"{role}.toml"
        file.write_text(file.read_text().replace(replaced, f'"{closed / replaced.strip(chr(34))}"'))
        line = 1 + next(n for n, text in enumerate(file.read_text().splitlines()) if str(closed) in text)
        command = ["--role", role, "--config", str(file)]
        # What the two import when they need it may be where the other user sees nothing.
        importlib.import_module(f"arcbridge.{role}.service")
        run([*command, "config", "check"])
        capsys.readouterr()
        with as_unprivileged_user(closed):
            codes = run([*command, "config", "check"]), run(command)
        said = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
        assert codes == (ExitCode.USAGE, ExitCode.USAGE)
        found = [one for one in said if one.startswith(f"error: {file}, line {line}: {setting}: ")]
        assert found, said
        assert all(f"this user may search nothing in {closed}: let it (chmod, chgrp)" in one for one in found)
        assert not (directory / "data").exists()
        assert not (directory / "state" / "credential.json").exists()


@pytest.mark.parametrize(
    "command",
    ["token list", "token create --cluster a", "cluster list", "session list", "user list", "cluster revoke a"],
)
def test_an_operators_command_by_a_user_who_may_not_use_data_dir(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with closed_directory() as closed:
        for name, text in FILES.items():
            (closed.parent / name).write_text(text)
            (closed.parent / name).chmod(0o644)
        (closed / "data").mkdir(mode=0o700)
        file = closed.parent / "relay.toml"
        file.write_text(RELAY.replace('"data"', f'"{closed / "data"}"'))
        importlib.import_module("arcbridge.relay.admin")
        run(["--role", "relay", *command.split(), "--config", str(file)])
        capsys.readouterr()
        with as_unprivileged_user(closed):
            code = run(["--role", "relay", *command.split(), "--config", str(file)])
        said = capsys.readouterr().err.splitlines()
        assert code in (ExitCode.USAGE, ExitCode.FAILURE)
        assert said[-1].startswith("error: ")
        assert "internal error" not in said[-1]
        assert str(closed / "data") in said[-1]


def test_what_is_printed_loads_again(tmp_path: Path) -> None:
    config = AgentConfig(
        relays=('a"b:1',),
        relay_ca_pin=PIN,
        authentication=tmp_path / "a",
        targets={"db": TargetConfig("10.0.0.1:5432", groups=("x",)), "we.ird": TargetConfig("h:1")},
        state=AgentStateConfig(directory=tmp_path),
    )
    (tmp_path / "c.toml").write_text(as_toml(config))
    assert load(AgentConfig, tmp_path / "c.toml") == config
    assert json.loads(json.dumps(as_data(config)))["targets"]["db"]["groups"] == ["x"]


def test_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "client.toml"
    file.write_text('relay = "https://r"\n')
    assert run(["--role", "client", "config", "check", "--config", str(file)]) == 0
    assert "complete and well-formed; 2 warnings" in capsys.readouterr().out
    assert run(["--role", "client", "--config", str(file), "config", "print", "-o", "json", "--port", "5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["relay"], printed["port"]) == ("https://r", 5)
    assert run(["--role", "client", "--config", str(file), "config", "print"]) == 0
    assert 'relay = "https://r"' in capsys.readouterr().out
    file.write_text("rely = 1\n")
    assert run(["--role", "client", "config", "check", "--config", str(file)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"error: {file}, line 1: unknown setting 'rely'; did you mean 'relay'?"
    assert run(["--role", "client", "config", "check", "--config", str(file), "--port", "none"]) == 2
    assert "error: flag --port: must be a whole number, not 'none'" in capsys.readouterr().err
