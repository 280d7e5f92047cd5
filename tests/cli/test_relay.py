"""The relay's commands by their command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.cli.run import run
from arcbridge.errors import ExitCode
from tests.support.processes import ManagedProcess


def flags(directory: Path) -> list[str]:
    (directory / "policy.toml").write_text('[[allow]]\ngroups = ["a"]\nclusters = ["*"]\n')
    issuer = {"url": "https://issuer.example", "audiences": ["a"]}
    mappings = {"username": {"claim": "sub", "prefix": ""}, "groups": {"claim": "groups", "prefix": ""}}
    document = {
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "AuthenticationConfiguration",
        "jwt": [{"issuer": issuer, "claimMappings": mappings}],
    }
    (directory / "authentication.json").write_text(json.dumps(document))
    return [
        *("--role", "relay", "--public-address", "127.0.0.1:4443", "--data-dir", str(directory / "data")),
        *("--policy", str(directory / "policy.toml"), "--authentication", str(directory / "authentication.json")),
    ]


def test_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*flags(tmp_path), "token", "create", "--cluster", "prod", "--ttl", "10m", "-o", "json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["cluster"] == "prod"
    assert made["relay_ca_pin"].startswith("sha256:")
    assert run([*flags(tmp_path), "token", "list", "-o", "name"]) == 0
    assert capsys.readouterr().out.strip() == made["id"]
    assert run([*flags(tmp_path), "token", "delete", made["id"]]) == 0
    assert run([*flags(tmp_path), "token", "delete", made["id"]]) == ExitCode.FAILURE
    assert capsys.readouterr().err.startswith("error: ")
    assert run([*flags(tmp_path), "cluster", "list"]) == 0


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (["token", "create"], ExitCode.USAGE),
        (["token", "create", "--cluster", "BAD"], ExitCode.USAGE),
        (["token", "create", "--cluster", "a", "--uses", "many"], ExitCode.USAGE),
        (["cluster", "restore", "none"], ExitCode.FAILURE),
    ],
)
def test_mistakes(tmp_path: Path, line: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    run([*flags(tmp_path), "token", "create", "--cluster", "other"])
    assert run([*flags(tmp_path), *line]) == code
    assert capsys.readouterr().err.startswith("error: ")


def test_run_needs_its_settings() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "arcbridge", "--role", "relay"], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith("error: public_address: required but not set; give --public-address")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    arguments = [
        *(sys.executable, "-m", "arcbridge", *flags(tmp_path), "--listen", "127.0.0.1:0"),
        *("--observe-listen", "127.0.0.1:0"),
    ]
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.settimeout(30)
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    with (
        told,
        ManagedProcess(
            arguments, log_dir=tmp_path / "logs", name="relay", cwd=Path(os.getcwd()), env=environment
        ) as process,
    ):
        assert told.recv(100) == b"READY=1"
        process.signal(number)
        assert told.recv(100) == b"STOPPING=1"
        assert process.wait(timeout=20) == (ExitCode.DONE if number is signal.SIGTERM else ExitCode.INTERRUPTED)
