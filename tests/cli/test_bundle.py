"""What `bundle` asks, in which words, and what it says; its sources are fakes here (tests/e2e/test_bundle.py)."""

from __future__ import annotations

import json
import os
import signal
import sys
import tarfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from arcbridge.bundle.archive import DIRECTORY
from arcbridge.bundle.sources import FILE, Collector
from arcbridge.cli.commands import find_command
from arcbridge.cli.run import run
from arcbridge.errors import ExitCode

Asked = list[tuple[list[str], Mapping[str, str]]]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The programs that were run, in a new home; each prints the answer of its command."""
    found: Asked = []

    def answer(_: Collector, command: Sequence[str], environment: Mapping[str, str]) -> tuple[bytes, str]:
        found.append((list(command), environment))
        if command[0] == "journalctl":
            return b"", "-- No entries --"
        if "doctor" in command:
            return b'{"ok": false, "cause": "policy", "hops": [{"hop": "policy", "code": "policy"}]}', ""
        if "cluster" in command:
            return b"", "warning: x\nerror: there is no registry in /home/alice: is data_dir right?\n"
        return b"[]", ""

    monkeypatch.setattr(Collector, "run", answer)
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    return found


def files_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {one.name.removeprefix(f"{DIRECTORY}/"): archive.extractfile(one).read() for one in archive}


@pytest.mark.parametrize(
    ("role", "commands"),
    [
        ("client", ["config check", "status", "doctor"]),
        ("relay", ["config check", "ca status", "cluster list", "session list", "policy list", "doctor"]),
        ("agent", ["config check", "ca status", "doctor"]),
    ],
)
def test_each_role_s_own_commands_are_asked(
    role: str, commands: list[str], asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user would type them, with the flags that the bundle was given; a command that a role has not fails here."""
    for words in commands:
        assert "json" in next(
            one.choices for one in find_command(role, tuple(words.split())).flags if one.dest == "output"
        )
    assert run(["--role", role, "bundle", "--log-level", "debug", "--without-names", "x.tar.gz"]) == ExitCode.DONE
    typed = [command[command.index("arcbridge") + 1 :] for command, _ in asked if "arcbridge" in command]
    assert typed == [[*words.split(), "--log-level=debug", "-o", "json"] for words in commands]
    assert all(environment["ARCBRIDGE_ROLE"] == role for command, environment in asked if "arcbridge" in command)
    files = files_of(Path("x.tar.gz"))
    assert json.loads(files["doctor.json"])["cause"] == "policy"
    said = " ".join(capsys.readouterr().out.split())
    assert "x.tar.gz has the bundle (" in said
    assert "Names of users, groups and clusters are numbers in it" in said
    assert "`tar -xzf x.tar.gz`" in said


def test_what_is_missing_is_said_and_why(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--role", "relay", "bundle", "a.tar.gz"]) == ExitCode.DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "cluster-list.json: error: there is no registry in /home/alice" in said
    assert "log.jsonl: it has no line (0 of other programs); --log FILE names its file" in said
    assert "metrics.txt: observe.listen is not set" in said
    assert "--without-names leaves them out" in said
    assert run(["--role", "relay", "bundle", "--without-names", "b.tar.gz"]) == ExitCode.DONE
    missing = json.loads(files_of(Path("b.tar.gz"))["manifest.json"])["missing"]
    assert missing["cluster-list.json"] == "it printed no document"


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ("error: hunter2 is wrong\nerror: the login's program failed\n", "error: the login's program failed"),
        ("error: hunter2 is wrong\nTraceback (most recent call last):\n", "it printed no document"),
        ("error: hunter2 is wrong\nTraceback (most recent call last):\nerror: x", "error: x"),
    ],
)
def test_what_another_program_says_is_no_reason(
    errors: str, reason: str, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of a login writes on the same standard error."""
    monkeypatch.setattr(Collector, "run", lambda *_: (b"", errors))
    assert run(["bundle", "x.tar.gz"]) == ExitCode.DONE
    missing = json.loads(files_of(Path("x.tar.gz"))["manifest.json"])["missing"]
    assert (missing["doctor.json"], missing["status.json"]) == (reason, reason)


def test_nothing_is_replaced_and_nothing_is_asked_before(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.tar.gz").write_text("mine")
    assert run(["bundle", "x.tar.gz"]) == ExitCode.FAILURE
    assert "x.tar.gz is there already, and a bundle replaces nothing" in capsys.readouterr().err
    assert (asked, Path("x.tar.gz").read_text()) == ([], "mine")
    assert run(["bundle"]) == ExitCode.DONE
    (made,) = Path().glob("arcbridge-client-2*.tar.gz")
    assert os.stat(made).st_mode & 0o777 == 0o600


def test_what_cannot_be_written_is_said_before_anything_is_asked(
    asked: Asked, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["bundle", "none/x.tar.gz"]) == ExitCode.FAILURE
    assert "cannot write none/x.tar.gz: No such file or directory" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(["bundle", "-"]) == ExitCode.USAGE
    shown = capsys.readouterr()
    assert "a terminal cannot take a bundle: give a file" in shown.err
    assert (asked, shown.out) == ([], "")


def test_of_a_log_that_is_too_long_the_end_is_there(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "2026-11-29 12:00:00.000Z info    relay: x n={} reason=" + "y" * 1000 + "\n"
    log = "".join(line.format(number) for number in range(5000)).encode()
    monkeypatch.setattr(Collector, "run", lambda *_: (log, ""))
    monkeypatch.setattr("arcbridge.cli.bundle.which", lambda name: name)
    assert run(["--role", "relay", "bundle", "x.tar.gz"]) == ExitCode.DONE
    lines = files_of(Path("x.tar.gz"))["log.jsonl"].splitlines(keepends=True)
    assert json.loads(lines[-1])["n"] == 4999
    assert FILE - 1200 < sum(map(len, lines)) <= FILE


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_ends_what_was_started(
    ignored: bool, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP as SIGINT, which the collector answers; under nohup it stays ignored."""
    before = {one: signal.getsignal(one) for one in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    def close() -> dict[str, object]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGHUP)
        return {}

    monkeypatch.setattr("arcbridge.cli.bundle.versions", close)
    try:
        assert run(["bundle", "x.tar.gz"]) == (ExitCode.DONE if ignored else ExitCode.INTERRUPTED)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert Path("x.tar.gz").exists() == ignored


def test_a_token_has_no_place_on_this_command_line(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bundle", "--token", "hunter2", "x.tar.gz"]) == ExitCode.USAGE
    assert "hunter2" not in capsys.readouterr().err
    assert asked == []


def test_the_client_s_log_is_that_of_the_background_process(asked: Asked) -> None:
    state = Path("arcbridge")
    state.mkdir(mode=0o700)
    line = "2026-11-29 12:00:0{}.000Z info    client: connected cluster=berlin\n"
    (state / "background.log.1").write_text(line.format(1))
    (state / "background.log").write_text(line.format(2) + line.format(3))
    assert run(["bundle", "x.tar.gz"]) == ExitCode.DONE
    files = files_of(Path("x.tar.gz"))
    moments = [json.loads(one)["timestamp"][17:19] for one in files["log.jsonl"].splitlines()]
    assert moments == ["01", "02", "03"]
    assert {one["name"] for one in json.loads(files["state.json"])} >= {"background.log", "background.log.1"}


def test_a_source_that_is_gone_costs_only_itself(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise OSError(5, "Input/output error", "/usr/lib")

    monkeypatch.setattr("arcbridge.cli.bundle.versions", broken)
    assert run(["bundle", "x.tar.gz"]) == ExitCode.DONE
    manifest = json.loads(files_of(Path("x.tar.gz"))["manifest.json"])
    assert manifest["missing"]["versions.json"] == "Input/output error"
    assert "settings.json" in manifest["bytes"]
