"""Flag over environment over file over default."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from arcbridge.cli.parser import parse
from arcbridge.cli.settings import given_state_dir, load_settings, settings_file
from arcbridge.errors import ConfigError
from arcbridge.settings.flags import flags_of
from arcbridge.settings.problems import SettingsRefused
from arcbridge.settings.user_directories import shared_settings, user_directory


def settings(line: str, role: str = "client", **environment: str) -> object:
    return load_settings(parse(line.split(), role), environment)


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('relay = "file:1"\nkube_context = "file"\nport = 3\n[observe]\nlog_level = "error"\n')
    config = settings(
        f"--config {file} --relay flag:1",
        ARCBRIDGE_RELAY="environment:1",
        ARCBRIDGE_KUBE_CONTEXT="environment",
        ARCBRIDGE_CLUSTER="",
    )
    assert (config.relay_urls(), config.kube_context, config.port) == (("flag:1",), "environment", 3)
    assert config.observe.log_level == "error"


def test_the_state_directory_without_the_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    variable = {"ARCBRIDGE_STATE_DIR": "~/kept"}
    given = parse(["--state-dir", "~/own", "status"], "client")
    assert given_state_dir(given, variable) == Path("/home/alice/own")
    assert given_state_dir(parse(["status"], "client"), variable) == Path("/home/alice/kept")
    assert given_state_dir(parse(["status"], "client"), {"ARCBRIDGE_STATE_DIR": ""}) is None
    assert given_state_dir(parse(["status", "--state-dir", "own"], "client"), {}) == Path.cwd() / "own"


@pytest.mark.parametrize("flag", [flag for flag in flags_of("client") if flag.key], ids=lambda flag: flag.dest)
def test_every_flag_has_its_variable(flag: object) -> None:
    name = flag.variable
    value = {"port": "1", "log_level": "debug", "log_format": "json", "grant_type": "authcode"}.get(flag.dest, "1")
    changed = settings("", **{name: value})
    assert changed != settings("")


def test_a_misspelt_variable_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """It would set nothing, and a session would have rights that it was to give up. Those of a Service are a pod's."""
    given = {"ARCBRIDGE_READ_ONYL": "1", "ARCBRIDGE_RELAY_PORT": "tcp://10.0.0.1", "ARCBRIDGE_LISTEN": "a relay's"}
    for _ in "12":  # a process that reads its settings again (SIGHUP) says it once
        settings("", **given)
    said = "warning: environment variable ARCBRIDGE_READ_ONYL sets nothing; did you mean ARCBRIDGE_READ_ONLY?\n"
    assert capsys.readouterr().err == said


def test_switches_of_the_environment() -> None:
    assert not settings("", ARCBRIDGE_NO_CONTEXT_SWITCH="1").context_switch
    assert settings("", ARCBRIDGE_NO_CONTEXT_SWITCH="0").context_switch
    assert settings("", ARCBRIDGE_TRUST_FIRST_USE="yes").trust_first_use
    assert not settings("--no-token-mode", "agent").token_mode


def test_clusters(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('cluster = "x"\nclusters = ["y"]\n')
    config = settings(f"--config {file}")
    assert (config.cluster, config.clusters) == ("x", ("y",))
    config = settings(f"--config {file} -n a -n b")
    assert (config.cluster, config.clusters) == ("a", ("b",))
    config = settings("", ARCBRIDGE_CLUSTER="a,b, c")
    assert (config.cluster, config.clusters) == ("a", ("b", "c"))


def test_relays(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    for text in ('relay = "x:1"', 'relays = ["x:1", "y:1"]'):
        file.write_text(text)
        assert settings(f"--config {file}").relay_urls()[0] == "x:1"
        config = settings(f"--config {file} --relay a:1 --relay b:1,c:1")
        assert config.relay_urls() == ("a:1", "b:1", "c:1")
        config = settings(f"--config {file}", ARCBRIDGE_RELAY="d:1, e:1")
        assert config.relay_urls() == ("d:1", "e:1")
    file.write_text('relay = "x:1"\nrelays = ["y:1"]')
    with pytest.raises(ConfigError, match="put every relay into relays"):
        settings(f"--config {file}")
    assert settings(f"--config {file} --relay a:1").relay_urls() == ("a:1",)


def test_a_commands_own_flag_is_no_setting() -> None:
    assert settings("token create --cluster c", "relay")
    assert settings("forward x --listen 127.0.0.1:1").observe.listen == ""


def test_the_settings_file(tmp_path: Path) -> None:
    (tmp_path / "arcbridge").mkdir()
    own = tmp_path / "arcbridge" / "client.toml"
    invocation = parse([], "client")
    assert settings_file(invocation, {"XDG_CONFIG_HOME": str(tmp_path)}) is None
    own.mkdir()
    assert settings_file(invocation, {"XDG_CONFIG_HOME": str(tmp_path)}) is None
    own.rmdir()
    own.write_text("")
    assert settings_file(invocation, {"XDG_CONFIG_HOME": str(tmp_path)}) == own
    assert settings_file(invocation, {"XDG_CONFIG_HOME": str(own)}) is None, "what is below a file is absent"
    assert settings_file(invocation, {"XDG_CONFIG_HOME": str(tmp_path), "ARCBRIDGE_CONFIG": "/x"}) == Path("/x")
    assert settings_file(parse(["--config", "/y"], "client"), {"ARCBRIDGE_CONFIG": "/x"}) == Path("/y")


@pytest.mark.parametrize("role", ["client", "relay"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_settings_that_are_not_to_be_read(
    role: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no settings that are absent, except for a client those in the directory of a server."""
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    closed = shared_settings(environment) if shared else user_directory("config", environment)
    look = os.stat

    def guarded(path: Path, **options: Any) -> os.stat_result:
        if path == closed / f"{role}.toml":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **options)

    monkeypatch.setattr("arcbridge.settings.role_settings.os.stat", guarded)
    expected = None if shared and role == "client" else closed / f"{role}.toml"
    assert settings_file(parse([], role), environment) == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--port many", "flag --port: must be a whole number"),
        ("--port 70000", "between 0 and 65535"),
        ("--log-level loud", "observe.log_level: 'loud' is unknown; use debug"),
        ("--log-format xml", "observe.log_format"),
        ("--grant-type magic", "login.grant_type"),
    ],
)
def test_wrong_values(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(line)
    assert words in caught.value.message


def test_all_mistakes_of_the_settings_are_counted_and_the_first_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a: b.toml"
    file.write_text('[observe]\nlog_level = "loud"\nnonsense = 1\n')
    with pytest.raises(SettingsRefused) as caught:
        load_settings(parse(["--config", str(file), "--port", "many"], "client"), {"XDG_STATE_HOME": str(tmp_path)})
    first, *others = caught.value.problems
    assert len(others) == 2
    assert caught.value.message == f"{first} (and 2 more: `config check` lists them)"
    places = {problem.setting: str(problem.place) for problem in caught.value.problems}
    assert places == {
        "observe.nonsense": f"{file}, line 3",
        "port": "flag --port",
        "observe.log_level": f"{file}, line 2",
    }
    assert not any(str(file) in problem.message for problem in caught.value.problems)


def test_a_file_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    file = tmp_path / "none.toml"
    with pytest.raises(SettingsRefused) as caught:
        load_settings(parse(["--config", str(file)], "client"), {"XDG_STATE_HOME": str(tmp_path)})
    assert caught.value.message == f"{file}: cannot read the settings file: No such file or directory"


def test_verbose() -> None:
    assert settings("-v").observe.log_level == "debug"
    assert settings("--debug --log-level error").observe.log_level == "error"


class TestTiedToIssuer:
    """What a settings file says beside an issuer is for that one, whatever a flag or a relay names."""

    LOGIN = (
        '[login]\nclient_id = "c"\nredirect_path = "/"\nissuer_origins = ["https://o.example"]\n'
        'client_key_file = "k"\nclient_key_id = "1"\nissuer = "https://i.example"\n'
    )

    @pytest.mark.parametrize("more", ["", " --oidc-issuer-url https://i.example"])
    def test_b38_the_files_own_issuer(self, tmp_path: Path, more: str) -> None:
        file = tmp_path / "c.toml"
        file.write_text(self.LOGIN)
        login = settings(f"--config {file}{more}").login
        assert (login.redirect_path, login.issuer_origins) == ("/", ("https://o.example",))
        assert (login.client_key_file, login.client_key_id) == (tmp_path / "k", "1")

    def test_b38_another_one_gets_none_of_it(self, tmp_path: Path) -> None:
        file = tmp_path / "c.toml"
        file.write_text(self.LOGIN)
        for more, path in (("", ""), (" --redirect-path /mine", "/mine")):
            login = settings(f"--config {file}{more}", ARCBRIDGE_OIDC_ISSUER_URL="https://h.example").login
            assert (login.issuer, login.redirect_path, login.issuer_origins) == ("https://h.example", path, ())
            assert (login.client_key_file, login.client_key_id) == (None, "")

    @pytest.mark.parametrize("more", ["", " --oidc-issuer-url https://h.example"])
    def test_b37_a_file_that_names_none(self, tmp_path: Path, more: str) -> None:
        file = tmp_path / "c.toml"
        for line in ('client_secret_file = "s"', 'client_assertion_command = ["sh"]', 'redirect_path = "/"'):
            file.write_text(f'[login]\nclient_id = "c"\n{line}\n')
            with pytest.raises(SettingsRefused, match=rf"login\.{line.split()[0]}: is for one issuer"):
                settings(f"--config {file}{more}")
