"""The commands of the background process, as far as they need none; the rest is in tests/e2e/test_background.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.cli import background
from arcbridge.cli.background import kept_settings
from arcbridge.cli.parser import parse
from arcbridge.client.background.caller import NoAnswer
from arcbridge.client.background.connection_settings import read_words
from arcbridge.client.background.connections import Connection, Connections
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.errors import ExitCode
from arcbridge.pki.private_files import try_lock
from arcbridge.settings.config import ClientConfig
from arcbridge.settings.flags import CLIENT
from tests.client.background.test_lock_holder import Holding


def kept(*words: str, environment: dict[str, str] | None = None, relays: tuple[str, ...] = ()) -> tuple[str, ...]:
    environment = {"XDG_CONFIG_HOME": "/nonexistent", **(environment or {})}
    return kept_settings(parse(["connect", *words], CLIENT), environment, ClientConfig(relays=relays)).words()


def test_settings_become_flags() -> None:
    words = ("berlin", "--relay", "https://a", "--relay", "https://b", "--oidc-client-id", "cli", "--no-resumption")
    assert kept(*words) == (
        *("--relay", "https://a", "--relay", "https://b"),
        *("--oidc-client-id", "cli", "--no-resumption"),
    )


def test_those_of_the_environment_too_and_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {
        "ARCBRIDGE_RELAY": "https://a, https://b",
        "ARCBRIDGE_ID_TOKEN_FILE": "id",
        "ARCBRIDGE_CONFIG": "c.toml",
        "ARCBRIDGE_NO_RESUMPTION": "0",
        "ARCBRIDGE_LOG_LEVEL": "debug",
    }
    assert kept("--access-token-file", "access", "--state-dir", "~/s", environment=environment) == (
        *("--config", str(tmp_path / "c.toml"), "--relay", "https://a", "--relay", "https://b"),
        *("--access-token-file", str(tmp_path / "access"), "--id-token-file", str(tmp_path / "id")),
        *("--state-dir", os.path.expanduser("~/s")),
    )


def test_neither_one_command_s_business_nor_a_secret_is_kept() -> None:
    words = ("--file", "kc", "--no-context-switch", "--trust-first-use", "-n", "x", "--observe-listen", "127.0.0.1:1")
    assert kept(*words, environment={"ARCBRIDGE_TOKEN": "secret"}) == ()
    assert kept("--token", "secret") == ()


def test_the_relays_are_always_named() -> None:
    relays = ("https://a", "https://b")
    named = ("--relay", "https://a", "--relay", "https://b")
    assert kept("--no-resumption", relays=relays) == (*named, "--no-resumption")
    assert kept("--relay", "https://c", relays=relays) == ("--relay", "https://c")


def arcbridge(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CONFIG_HOME": str(home / "config"),
        **environment,
    }
    command = [sys.executable, "-m", "arcbridge", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_where_no_process_runs(tmp_path: Path) -> None:
    done = arcbridge(tmp_path, "status")
    said = "No background process runs; kubectl starts it when a context needs it."
    assert done.stdout.splitlines() == [said, "Not logged in"]
    assert json.loads(arcbridge(tmp_path, "status", "-o", "json").stdout) == {
        "process": None,
        "clusters": [],
        "logins": [],
    }
    assert arcbridge(tmp_path, "stop").stdout == "No background process runs.\n"
    assert arcbridge(tmp_path, "logs").stdout == "There is no log: no background process has run.\n"
    done = arcbridge(tmp_path, "disconnect", "berlin")
    assert (done.returncode, done.stderr) == (2, 'error: "berlin" is not connected; connected: none\n')
    assert arcbridge(tmp_path, "disconnect", "--all").stdout == "No cluster is connected.\n"
    assert arcbridge(tmp_path, "disconnect").stdout == "No cluster is connected.\n"


@pytest.mark.parametrize("words", [("status",), ("connect", "berlin", "--relay", "https://127.0.0.1:1")])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, words: tuple[str, ...]) -> None:
    runtime = tmp_path / "runtime"
    for name in ("left", "living"):
        (runtime / f"arcbridge-run-{name}").mkdir(parents=True, mode=0o700)
        for file in ("kubeconfig", "lock"):
            (runtime / f"arcbridge-run-{name}" / file).write_text("")
    runtime.chmod(0o700)
    lock = try_lock(runtime / "arcbridge-run-living" / "lock")
    assert lock is not None
    try:
        arcbridge(tmp_path, *words, XDG_RUNTIME_DIR=str(runtime))
        assert os.listdir(runtime) == ["arcbridge-run-living"]
        assert (runtime / "arcbridge-run-living" / "kubeconfig").exists()
    finally:
        os.close(lock)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a file away")
def test_w11_a_list_of_another_user_is_not_used(tmp_path: Path) -> None:
    """docs/threats.md#W11: its arguments name files that this process would write."""
    connections = tmp_path / "state" / "arcbridge" / "connections.json"
    Connections(connections).add(Connection(read_words(("--cluster", "berlin")), "berlin", "berlin"))
    assert "berlin" in arcbridge(tmp_path, "status").stdout
    os.chown(connections, 12345, 12345)
    assert "berlin" not in arcbridge(tmp_path, "status").stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("connect", "Bad_Name", "--relay", "https://127.0.0.1:1"), "Bad_Name"),
        (("connect", "a", "--token", "x", "--relay", "https://127.0.0.1:1"), "--token-file"),
        (("disconnect", "a", "--all"), "flag --all"),
        (
            ("connect", "a"),
            "you are logged in at no relay, and no setting names one; run `arcbridge login https://RELAY`",
        ),
    ],
    ids=["bad name", "token", "all", "no relay"],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    done = arcbridge(tmp_path, *words)
    assert done.returncode == (ExitCode.LOGIN if "logged in at no relay" in told else ExitCode.USAGE)
    assert told in done.stderr
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "state").exists() or not list((tmp_path / "state").rglob("control"))


def test_one_that_does_not_end_when_it_is_told_to_is_ended_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def hangs(_: object) -> None:
        raise NoAnswer("it has not ended")

    monkeypatch.setattr(background, "stop_process", hangs)
    place = BackgroundPaths.find(os.environ)
    place.make()
    holding = Holding(place)
    try:
        process = holding.start()
        assert background.stop(parse(["stop"], CLIENT)) == ExitCode.DONE
        assert process.wait(10) == -signal.SIGTERM
        shown = capsys.readouterr()
        assert f"(pid {process.pid}) does not answer since" in shown.err
        assert shown.out.startswith("Stopped.")
    finally:
        holding.end()


def test_ctrl_c_at_a_question_is_no_internal_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def asked() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(30)

    monkeypatch.setattr("arcbridge.cli.background.configure_logging", lambda config, **_: None)
    context = ClientContext(ClientConfig(relay="https://r", state_dir=tmp_path), Terminal())
    with pytest.raises(KeyboardInterrupt):
        background._run(context, asked())
