"""`config check` and `config print`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcbridge.cli.configuration import as_data, as_toml, check, require
from arcbridge.cli.run import run
from arcbridge.config import (
    AgentConfig,
    AgentStateConfig,
    ClientConfig,
    RelayConfig,
    RelayTlsConfig,
    TargetConfig,
    load,
)
from arcbridge.errors import ConfigError

PIN = "sha256:" + "0" * 64


@pytest.mark.parametrize("config", [RelayConfig(), AgentConfig(), ClientConfig()])
def test_the_first_missing_one_is_named_with_its_flag(config: object) -> None:
    with pytest.raises(ConfigError, match="required but not set; give --"):
        require(config)


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


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ClientConfig(relay="http://r"), "https"),
        (ClientConfig(relays=("r", "http://r")), "https"),
        (ClientConfig(relay="r", relays=("r",)), "put every relay into relays"),
        (ClientConfig(relay="r", cluster="BAD"), "not a cluster name"),
        (ClientConfig(relay="r", relay_ca_pin="x"), "relay_ca_pin: not a pin"),
        (ClientConfig(relay="r", cluster_ca_pin="x"), "cluster_ca_pin: not a pin"),
        (ClientConfig(relay="r", pins_file=Path("/none")), "pins_file: /none does not exist"),
        (AgentConfig(relays=("r",)), "exactly one of"),
        (AgentConfig(relays=("r",), state=AgentStateConfig(directory=Path("/x"), secret="a/b")), "exactly one of"),
        (
            AgentConfig(relays=("r",), state=AgentStateConfig(secret="a/b"), denylist_file=Path(__file__)),
            "denylist_file: .* not valid TOML",
        ),
        (RelayConfig(public_address="r:1", authentication=Path("/none"), policy=Path("/none")), "authentication"),
        (
            RelayConfig(
                public_address="r:1",
                authentication=Path(__file__),
                policy=Path(__file__),
                tls=RelayTlsConfig(certificate=Path(__file__)),
            ),
            "certificate and key go together",
        ),
        (
            RelayConfig(
                public_address="r:1",
                authentication=Path(__file__),
                policy=Path(__file__),
                proxy_protocol_from=("balancer",),
            ),
            "proxy_protocol_from: 'balancer' is no address or network",
        ),
    ],
)
def test_check(config: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(config)


def test_good_ones() -> None:
    check(ClientConfig(relay="https://r", cluster="c", relay_ca_pin=PIN))
    check(ClientConfig(relays=("https://r", "https://s:444")))
    check(AgentConfig(relays=("r:1",), state=AgentStateConfig(secret="a/b")))
    check(RelayConfig(public_address="r:1", authentication=Path(__file__), policy=Path(__file__)))


def test_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "client.toml"
    file.write_text('relay = "https://r"\n')
    assert run(["--role", "client", "config", "check", "--config", str(file)]) == 0
    assert "complete and well-formed" in capsys.readouterr().out
    assert run(["--role", "client", "--config", str(file), "config", "print", "-o", "json", "--port", "5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["relay"], printed["port"]) == ("https://r", 5)
    assert run(["--role", "client", "--config", str(file), "config", "print"]) == 0
    assert 'relay = "https://r"' in capsys.readouterr().out
    file.write_text("rely = 1\n")
    assert run(["--role", "client", "config", "check", "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file}, line 1: unknown setting 'rely'; did you mean 'relay'?\n"
