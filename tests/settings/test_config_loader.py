"""The loader: precedence, strictness, and messages that let a person find the mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.errors import ConfigError
from arcbridge.settings.config import AgentConfig, ClientConfig, RelayConfig
from arcbridge.settings.config_loader import Given, load, parse_duration

CONFIG = Path(__file__).parents[2] / "config"


def write(directory: Path, text: str) -> Path:
    path = directory / "settings.toml"
    path.write_text(text)
    return path


class TestPrecedence:
    def test_given_over_file_over_default(self, tmp_path: Path) -> None:
        file = write(tmp_path, 'listen = "127.0.0.1:1"\npublic_address = "file:443"\n')
        config = load(RelayConfig, file, {"listen": Given("127.0.0.1:2", "flag --listen")})
        assert (config.listen, config.public_address) == ("127.0.0.1:2", "file:443")
        assert config.agent_certificate_life == 7 * 86400

    def test_given_reaches_into_tables(self, tmp_path: Path) -> None:
        file = write(tmp_path, '[observe]\nlisten = "127.0.0.1:9"\n')
        config = load(ClientConfig, file, {"observe.log_level": Given("debug", "flag --log-level")})
        assert (config.observe.listen, config.observe.log_level) == ("127.0.0.1:9", "debug")


class TestValues:
    def test_durations(self, tmp_path: Path) -> None:
        file = write(tmp_path, 'agent_certificate_life = "1d12h"\n[limits]\njoin_deadline = 20\n')
        config = load(RelayConfig, file)
        assert (config.agent_certificate_life, config.limits.join_deadline) == (36 * 3600, 20.0)

    @pytest.mark.parametrize(
        ("text", "seconds"), [("10m", 600), ("1h30m", 5400), ("2.5s", 2.5), ("7", 7), ("250ms", 0.25)]
    )
    def test_duration_text(self, text: str, seconds: float) -> None:
        assert parse_duration(text) == seconds

    @pytest.mark.parametrize("text", ["", "m", "10 parsecs", "-1", "inf", "nan", "1m-1s"])
    def test_no_durations(self, text: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 the message is the caller's
            parse_duration(text)

    def test_paths_are_relative_to_the_file(self, tmp_path: Path) -> None:
        file = write(tmp_path, 'policy = "policy.toml"\ndata_dir = "/var/x"\n[tls]\nkey = "../k"\n')
        config = load(RelayConfig, file)
        assert config.policy == tmp_path / "policy.toml"
        assert config.data_dir == Path("/var/x")
        assert config.tls.key == tmp_path / ".." / "k"

    def test_paths_of_flags_are_relative_to_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert load(RelayConfig, None, {"policy": Given("p", "flag --policy")}).policy == tmp_path / "p"

    def test_an_empty_path_is_none(self, tmp_path: Path) -> None:
        assert load(RelayConfig, write(tmp_path, 'policy = ""\n')).policy is None

    def test_texts_that_mean_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert load(AgentConfig, write(tmp_path, '[audit]\nfile = "audit.jsonl"\n')).audit.file == str(
            tmp_path / "audit.jsonl"
        )
        assert load(AgentConfig, write(tmp_path, '[audit]\nfile = "-"\n')).audit.file == "-"
        assert load(ClientConfig, write(tmp_path, 'file = ""\n')).file == ""
        monkeypatch.chdir(tmp_path)
        assert load(ClientConfig, None, {"file": Given("kube", "flag --file")}).file == str(tmp_path / "kube")
        assert load(ClientConfig, None, {"file": Given("-", "flag --file")}).file == "-"

    def test_tables_by_name(self, tmp_path: Path) -> None:
        file = write(tmp_path, '[targets.db]\naddress = "10.0.0.1:5432"\ngroups = ["dba"]\n')
        target = load(AgentConfig, file).targets["db"]
        assert (target.address, target.users, target.groups) == ("10.0.0.1:5432", (), ("dba",))

    def test_lists(self, tmp_path: Path) -> None:
        assert load(AgentConfig, write(tmp_path, 'relays = ["a:1", "b:2"]\n')).relays == ("a:1", "b:2")
        assert load(AgentConfig, None, {"relays": Given("a:1, b:2", "environment variable X")}).relays == ("a:1", "b:2")

    @pytest.mark.parametrize(("text", "value"), [("1", True), ("yes", True), ("false", False), ("0", False)])
    def test_booleans_of_the_environment(self, text: str, value: bool) -> None:
        assert load(AgentConfig, None, {"token_mode": Given(text, "environment variable X")}).token_mode is value


class TestStrictness:
    @pytest.mark.parametrize(
        ("kind", "text", "expected"),
        [
            (RelayConfig, "\nlisen = 'x'\n", "line 2: unknown setting 'lisen'; did you mean 'listen'?"),
            (
                RelayConfig,
                "[limits]\nsession = 3\n",
                "line 2: unknown setting 'limits.session'; did you mean 'limits.sessions'?",
            ),
            (
                RelayConfig,
                "[login]\nworkers = 2\n",
                "line 2: unknown setting 'login.workers'; 'workers' belongs to no table: move it above the ",
            ),
            (RelayConfig, "[limits.observe]\n", "line 1: unknown setting 'limits.observe'; known here: "),
            (AgentConfig, "[targets.db]\nadress = 'x'\n", "line 2: unknown setting 'targets.db.adress'"),
            (
                AgentConfig,
                '[limits.groups."oidc:ci"]\nstream = 3\n',
                "line 2: unknown setting 'limits.groups.oidc:ci.stream'; did you mean 'limits.groups.oidc:ci.streams'?",
            ),
            (
                AgentConfig,
                "[limits.users.'anna@example.org']\nstreams = 'many'\n",
                "line 2: limits.users.anna@example.org.streams must be a whole number, not 'many'",
            ),
            (ClientConfig, "[zzz]\n", "line 1: unknown setting 'zzz'; known here: "),
            (ClientConfig, "login.zzz = 1\n", "line 1: unknown setting 'login.zzz'"),
            (ClientConfig, "login = { zzz = 1 }\n", ": unknown setting 'login.zzz'"),
            (ClientConfig, "port = 'x'\n", "line 1: port must be a whole number, not 'x'"),
            (ClientConfig, "port = 'hunter2-pw'\n", "line 1: port must be a whole number, not a string"),
            (ClientConfig, "port = 'Tr0ub4dor'\n", "line 1: port must be a whole number, not a string"),
            (ClientConfig, "port = '10 MiB'\n", "line 1: port must be a whole number, not '10 MiB'"),
            (ClientConfig, "port = true\n", "port must be a whole number, not true"),
            (ClientConfig, "trust_first_use = 1\n", "trust_first_use must be true or false, not 1"),
            (ClientConfig, "relay = ['a']\n", "relay must be a string, not a list"),
            (ClientConfig, "login = 3\n", "login must be a table, not 3"),
            (AgentConfig, "relays = 'a'\n", "relays must be a list of strings, not 'a'"),
            (AgentConfig, "relays = [1]\n", "relays must be a list of strings, not a list"),
            (AgentConfig, "targets = []\n", "targets must be a table of tables, not a list"),
            (RelayConfig, "agent_certificate_life = 'soon'\n", 'must be a duration: seconds, or text like "10m"'),
            (RelayConfig, "agent_certificate_life = -1\n", "must be a duration"),
            (RelayConfig, "policy = 3\n", "policy must be the path of a file or directory"),
            (RelayConfig, "listen = \n", "not valid TOML"),
            pytest.param(RelayConfig, "listen = " + "1" * 5000, "not valid TOML", id="digits"),
            pytest.param(RelayConfig, "listen = " + "[" * 5000, "not valid TOML", id="nested"),
        ],
    )
    def test_messages(self, tmp_path: Path, kind: type, text: str, expected: str) -> None:
        file = write(tmp_path, text)
        with pytest.raises(ConfigError) as caught:
            load(kind, file)
        assert expected in caught.value.message
        assert str(file) in caught.value.message

    def test_a_wrong_flag_names_the_flag(self) -> None:
        with pytest.raises(ConfigError, match="flag --port: must be a whole number, not 'many'"):
            load(ClientConfig, None, {"port": Given("many", "flag --port")})

    def test_a_long_text_is_never_quoted(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            load(ClientConfig, write(tmp_path, f"port = '{'s' * 40}'\n"))
        assert "sss" not in caught.value.message

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.toml: cannot read the settings file: No such file"):
            load(ClientConfig, tmp_path / "none.toml")

    def test_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="not UTF-8"):
            load(ClientConfig, tmp_path / "x")
