"""The systemd units: checked by systemd where it is there, and read line by line everywhere."""

from __future__ import annotations

import configparser
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from arcbridge.cli.parser import parse
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig, SessionConfig
from arcbridge.settings.flags import CLIENT
from arcbridge.wire.limits import DEFAULT
from tests.support.processes import require_or_skip

UNIT = Path(__file__).resolve().parents[2] / "config/systemd/arcbridge-relay.service"
AGENT = UNIT.with_name("arcbridge-agent.service")
OF_A_USER = UNIT.with_name("arcbridge-client.service")


def service(unit: Path = UNIT) -> dict[str, list[str]]:
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str
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


def test_a_reload_is_the_signal_that_the_roles_take() -> None:
    """What the signal does: tests/e2e/test_reload.py. A shell runs the command on a process that waits for it."""
    commands = {service(unit)["ExecReload"][0] for unit in (UNIT, AGENT)}
    assert commands == {"/bin/kill -HUP $MAINPID"}
    waiting = subprocess.Popen(["sleep", "60"])
    try:
        subprocess.run(["sh", "-c", *commands], env={"MAINPID": str(waiting.pid)}, check=True, timeout=30)
        assert waiting.wait(30) == -signal.SIGHUP
    finally:
        waiting.kill()


def test_the_agents_unit_fits_its_settings() -> None:
    settings = service(AGENT)
    assert settings["Type"] == ["notify"]
    (command,) = settings["ExecStart"]
    assert command.endswith("/arcbridge --role agent --config /etc/arcbridge/agent.toml")
    assert int(settings["TimeoutStopSec"][0]) > SessionConfig().drain
    example = (AGENT.parents[1] / "agent.toml").read_text()
    state, recordings = settings["StateDirectory"][0].split()
    assert f'directory = "/var/lib/{state}"' in example
    # ProtectSystem=strict: what is written has to be a directory of the unit.
    assert f'#directory = "/var/lib/{recordings}"' in example
    how = (AGENT.parents[2] / "docs/how-to/recordings.md").read_text()
    assert f'directory = "/var/lib/{recordings}"' in how
    assert settings["CapabilityBoundingSet"] == [""]


def test_logrotate_moves_the_audit_log_and_has_it_opened_anew(tmp_path: Path) -> None:
    """Run by logrotate itself; tests/e2e/test_reload.py renames the file and sends the signal, as this does."""
    text = (AGENT.parents[1] / "logrotate/arcbridge-agent").read_text()
    (path,) = re.findall(r"^(/\S+) \{$", text, re.MULTILINE)
    assert Path(path).parent == Path("/var/log") / service(AGENT)["LogsDirectory"][0]
    reload = f"systemctl reload {AGENT.name}"
    assert text.count(reload) == 1
    logrotate = shutil.which("logrotate", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if logrotate is None:
        require_or_skip("logrotate", "logrotate is not on this machine (Debian: package logrotate)")
    log, config = tmp_path / "audit.jsonl", tmp_path / "config"
    tmp_path.chmod(0o700)
    asked = f"systemctl --quiet is-active {AGENT.name}"
    assert text.count(asked) == 1
    for runs in (False, True):
        log.write_text("record\n")
        answered = text.replace(path, str(log)).replace(asked, str(runs).lower())
        config.write_text(answered.replace(reload, f"touch {tmp_path}/reloaded"))
        config.chmod(0o644)
        command = [logrotate, "--force", "--state", str(tmp_path / "state"), str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "reloaded").exists() is runs
    assert (tmp_path / "audit.jsonl.1").read_text() == "record\n"


def test_it_may_do_nothing_but_its_job() -> None:
    settings = service()
    assert settings["CapabilityBoundingSet"] == settings["AmbientCapabilities"] == ["CAP_NET_BIND_SERVICE"]
    wanted = ("DynamicUser", "NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictNamespaces",
              "ProtectKernelTunables", "ProtectKernelModules", "RestrictSUIDSGID", "LockPersonality")  # fmt: skip
    assert {name: settings[name] for name in wanted} == {key: ["yes"] for key in wanted}
    assert settings["ProtectSystem"] == ["strict"]


def commented(unit: Path) -> str:
    """The unit with every setting in force that it offers in a comment."""
    return re.sub(r"^# (?=[A-Z][A-Za-z]+=)", "", unit.read_text(), flags=re.MULTILINE)


def test_a_renewed_key_is_read_without_a_restart_and_the_unit_says_where_not(tmp_path: Path) -> None:
    """Both ways to hand over the key are settings that systemd knows; an older one ignores what it does not know."""
    (tmp_path / UNIT.name).write_text(commented(UNIT))
    settings = service(tmp_path / UNIT.name)
    assert settings["SupplementaryGroups"] == ["arcbridge-tls"]
    assert settings["LoadCredential"] == ["tls.key:/etc/arcbridge/tls.key"]
    # systemd.service(5): by default a reload refreshes extensions alone.
    assert settings["RefreshOnReload"] == ["credentials"]
    assert "systemctl restart arcbridge-relay" in UNIT.read_text()
    complaints = complaints_of(UNIT.name, commented(UNIT), tmp_path)
    assert [line for line in complaints if "RefreshOnReload" not in line] == []


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


@pytest.mark.parametrize(
    ("unit", "directory"),
    [(UNIT, "/opt/arcbridge/bin/"), (AGENT, "/opt/arcbridge/bin/"), (OF_A_USER, "%h/.local/bin/")],
    ids=["relay", "agent", "client"],
)
def test_systemd_itself_finds_nothing_wrong(tmp_path: Path, unit: Path, directory: str) -> None:
    assert complaints_of(unit.name, unit.read_text().replace(directory, "/opt/arcbridge/bin/"), tmp_path) == []


def complaints_of(name: str, text: str, directory: Path) -> list[str]:
    """What systemd finds wrong with a unit whose program is there."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        require_or_skip("systemd", "systemd-analyze is not on this machine (Debian: package systemd)")
    (directory / "arcbridge").write_text("#!/bin/sh\n")
    (directory / "arcbridge").chmod(0o755)
    unit = directory / name
    unit.write_text(text.replace("/opt/arcbridge/bin/", f"{directory}/"))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    return [line for line in done.stderr.splitlines() if name in line]
