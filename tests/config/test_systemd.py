"""The systemd units: checked by systemd where it is there, and read line by line everywhere."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from arcbridge.cli.flags import CLIENT
from arcbridge.cli.parser import parse
from arcbridge.config import RelayConfig, RelayLimitsConfig
from arcbridge.wire.limits import DEFAULT
from tests.support.processes import require_or_skip

UNIT = Path(__file__).resolve().parents[2] / "config/systemd/arcbridge-relay.service"
OF_A_USER = UNIT.with_name("arcbridge-client.service")


def service(unit: Path = UNIT) -> dict[str, list[str]]:
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text())  # checks the syntax; repeated keys are collected below
    found: dict[str, list[str]] = {}
    for line in unit.read_text().partition("[Service]")[2].partition("[Install]")[0].splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_it_starts_the_relay_and_says_no_more_than_it_does() -> None:
    settings = service()
    assert settings["Type"] == ["notify"]  # shown by tests/cli/test_relay.py
    (command,) = settings["ExecStart"]
    assert command.endswith("/arcbridge --role relay --config /etc/arcbridge/relay.toml")
    assert settings["StateDirectory"] == [RelayConfig().data_dir.name]
    assert RelayConfig().data_dir.parent == Path("/var/lib")


def test_it_may_do_nothing_but_its_job() -> None:
    settings = service()
    assert settings["CapabilityBoundingSet"] == settings["AmbientCapabilities"] == ["CAP_NET_BIND_SERVICE"]
    wanted = ("DynamicUser", "NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictNamespaces",
              "ProtectKernelTunables", "ProtectKernelModules", "RestrictSUIDSGID", "LockPersonality")  # fmt: skip
    assert {name: settings[name] for name in wanted} == {key: ["yes"] for key in wanted}
    assert settings["ProtectSystem"] == ["strict"]


def test_its_bounds_fit_the_relays_own() -> None:
    settings = service()
    limits = RelayLimitsConfig()
    assert int(settings["LimitNOFILE"][0]) > 2 * limits.sessions + limits.unauthenticated + 4096
    assert int(settings["TimeoutStopSec"][0]) > DEFAULT.drain_timeout


def test_the_user_s_unit_starts_the_background_process() -> None:
    settings = service(OF_A_USER)
    assert settings["Type"] == ["notify"]  # shown by tests/e2e/test_background.py
    (command,) = settings["ExecStart"]
    words = command.split()
    assert words[0].endswith("/arcbridge")
    assert parse(words[3:], CLIENT).command == ("background",)
    assert settings["Restart"] == ["on-failure"]  # it ends with 0 after the last `disconnect`


@pytest.mark.parametrize(("unit", "program"), [(UNIT, "/opt/arcbridge/bin/"), (OF_A_USER, "%h/.local/bin/")],
                         ids=["relay", "client"])  # fmt: skip
def test_systemd_itself_finds_nothing_wrong(tmp_path: Path, unit: Path, program: str) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        require_or_skip("systemd", "systemd-analyze is not on this machine (Debian: package systemd)")
    (tmp_path / "arcbridge").write_text("#!/bin/sh\n")
    (tmp_path / "arcbridge").chmod(0o755)
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(program, f"{tmp_path}/"))
    done = subprocess.run([analyze, "verify", str(copy)], capture_output=True, text=True, timeout=60, check=False)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert complaints == []
