"""Exit codes and the form of errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.__main__ import main
from arcbridge.cli import run as run_module
from arcbridge.cli.commands import GONE
from arcbridge.cli.run import run
from arcbridge.errors import (
    EXIT_CODES,
    CommandNotFound,
    ConfigError,
    ExitCode,
    PermissionRefused,
    PinMismatch,
    SessionEnded,
    StateError,
    Unauthenticated,
    Unreachable,
)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such user")
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a container with a user ID of its own."""

    def missing(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", missing)
    assert main(["whoami"]) == ExitCode.LOGIN
    assert capsys.readouterr().err.startswith("error: you are not logged in")


@pytest.mark.parametrize(
    ("line", "error", "code"),
    [
        ("--role client", ConfigError("x"), ExitCode.USAGE),
        ("--role client", StateError("x"), ExitCode.FAILURE),
        ("--role client", PinMismatch("x"), ExitCode.FAILURE),
        ("--role client", Unauthenticated("x"), ExitCode.LOGIN),
        ("--role client", PermissionRefused("x"), ExitCode.DENIED),
        ("--role client", Unreachable("x"), ExitCode.UNREACHABLE),
        ("--role client", SessionEnded(1, "x"), ExitCode.UNREACHABLE),
        ("--role client", KeyboardInterrupt(), ExitCode.INTERRUPTED),
        ("--role client", OSError(28, "No space left on device"), ExitCode.FAILURE),
        # A failure of `run` is not taken for its command's; the relay's `run` runs no other program.
        ("run -n berlin -- true", ConfigError("x"), ExitCode.RUN_FAILED),
        ("run -n berlin -- true", PinMismatch("x"), ExitCode.RUN_FAILED),
        ("run -n berlin -- true", Unauthenticated("x"), ExitCode.RUN_FAILED),
        ("run -n berlin -- true", OSError(28, "No space left on device"), ExitCode.RUN_FAILED),
        ("run -n berlin -- true", CommandNotFound("x"), ExitCode.NOT_FOUND),
        ("run -n berlin -- true", CommandNotFound("x", exists=True), ExitCode.CANNOT_RUN),
        ("--role relay run", PinMismatch("x"), ExitCode.FAILURE),
    ],
)
def test_exit_codes(
    line: str, error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(run_module, "_run", fail)
    assert run(line.split()) == code
    told = capsys.readouterr().err
    assert told == "" if code == ExitCode.INTERRUPTED else told.startswith("error: ")


def test_output_without_a_reader_is_a_failure_of_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(run_module, "_run", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert run(["run", "-n", "a,b", "--", "true"]) == ExitCode.RUN_FAILED
    assert run(["clusters"]) == ExitCode.FAILURE


def test_a_line_that_cannot_be_read_is_a_failure_of_run_too() -> None:
    assert run(["run", "--no-such-flag", "--", "true"]) == ExitCode.RUN_FAILED
    assert run(["clusters", "--no-such-flag"]) == ExitCode.USAGE


def test_the_pages_have_the_table_of_exit_codes() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    text = (docs / "broken.md").read_text().partition("## Exit codes")[2].partition("\n#")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = [tuple(cell.strip() for cell in line) for line in lines[2:]]
    assert rows == [(str(int(code)), *said) for code, said in EXIT_CODES.items()]
    assert set(EXIT_CODES) == set(ExitCode)


def test_an_internal_error_quotes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> int:
        raise ValueError("SECRET")

    monkeypatch.setattr(run_module, "_run", fail)
    assert run(["--role", "client"]) == ExitCode.FAILURE
    assert capsys.readouterr().err == "error: internal error (ValueError); run with --verbose and report what it logs\n"
    with pytest.raises(ValueError, match="SECRET"):
        run(["--role", "client", "-v"])


def test_without_a_role(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "arcbridge login https://" in capsys.readouterr().out
    assert run([]) == ExitCode.USAGE
    assert run(["run"]) == ExitCode.RUN_FAILED
    assert run(["--role", "king"]) == ExitCode.USAGE
    assert "error: --role king: unknown" in capsys.readouterr().err
    assert run(["completion", "bash"]) == 0
    assert "complete -F" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lgoin", "unknown sub-command 'lgoin'; did you mean login?"),
        ("stauts", "unknown sub-command 'stauts'; did you mean status?"),
        ("config check", "`config` is for the settings of one role: give --role relay|agent|client"),
        ("ca status", "`ca` is for the settings of one role: give --role relay|agent"),
        ("--log-level debug", "which role? give --role relay|agent|client"),
        ("imagine", "unknown sub-command 'imagine'"),
        ("credentials", "unknown sub-command 'credentials'"),
        ("exit-codes", "unknown sub-command 'exit-codes'"),
        ("spedtest", f"unknown sub-command 'spedtest'; `speedtest` is gone; {GONE['speedtest']}"),
        ("help exit", "unknown sub-command 'exit'"),
        ("help doctr", "unknown sub-command 'doctr'; did you mean doctor?"),
        ("help connect doctor", "there is no command `connect doctor`"),
        ("help flags king", "there is no command `flags king`"),
        ("help token x", "there is no command `token x`"),
        ("version -o json", "unrecognized arguments: -o json"),
    ],
)
def test_a_line_that_names_no_role(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == ExitCode.USAGE
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: {said}"
    assert re.fullmatch(r"run `arcbridge (version )?--help` for the (commands|flags and examples)", second)


@pytest.mark.parametrize(
    ("line", "usage"),
    [
        ("help help", "usage: arcbridge COMMAND [FLAGS]"),
        ("help flags relay", "All commands of the relay take these flags, before and behind their words. Each"),
        ("help", "usage: arcbridge COMMAND [FLAGS]"),
        ("help login", "usage: arcbridge login [RELAY_URL …] [FLAGS]"),
        ("login --help", "usage: arcbridge login [RELAY_URL …] [FLAGS]"),
        ("help token create", "usage: arcbridge token create [FLAGS]"),
        ("--role agent help", "usage: arcbridge --role agent COMMAND [FLAGS]"),
        ("run --help", "usage: arcbridge run [FLAGS] -- COMMAND …"),
        ("help config check", "usage: arcbridge --role ROLE config check [FLAGS]"),
        ("config check -h", "usage: arcbridge --role ROLE config check [FLAGS]"),
        ("help version", "usage: arcbridge version [FLAGS]"),
        ("help flags", "All commands of the client take these flags, before and behind their words. Each"),
        ("help flags --role agent", "All commands of the agent take these flags, before and behind their words. Each"),
        ("help exit-codes", "All commands end with these exit codes; scripts can rely on them."),
        ("--role client help forward", "usage: arcbridge forward TARGET … [FLAGS]"),
    ],
)
def test_help_is_a_sub_command_too(line: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == ExitCode.DONE
    assert capsys.readouterr().out.splitlines()[0] == usage


def test_a_client_needs_no_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["-n", "berlin"]) == ExitCode.LOGIN
    assert "run `arcbridge login https://RELAY`" in capsys.readouterr().err
    assert run(["clusters", "-o", "wdie"]) == ExitCode.USAGE
    said = "flag --output: 'wdie' is unknown; did you mean wide? Use table, wide, json, yaml, name or clusterprofile"
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("stauts", "error: unknown sub-command 'stauts'; did you mean status?"),
        (
            "--role relay token list -o text",
            "error: flag --output: 'text' is unknown; use table, wide, json, yaml or name",
        ),
        ("-n X", "error: flag --cluster: 'X': not a cluster name: use 1 to 63 lower-case letters"),
        ("--role client login", "error: no relay is known here: run `arcbridge login https://RELAY`"),
        ("--role agent", "error: relays: required but not set; give --relay https://host:port"),
    ],
)
def test_a_line_that_goes_wrong_is_answered_in_a_sentence(line: str, said: str, tmp_path: Path) -> None:
    """The executable itself, in an empty home."""
    command = [sys.executable, "-m", "arcbridge", *line.split()]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert done.stderr.startswith(said), done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("{} completion zsh | true", 0, ""),
        ("{} help flags | true", 0, ""),
        ("{} help >/dev/full", 1, "error: No space left on device\n"),
        ("{} connect --help >/dev/full", 1, "error: No space left on device\n"),
        ("{} completion zsh >/dev/full", 1, "error: No space left on device\n"),
        ("{} help >&-", 0, ""),
        ("{} lgoin 2>&-", 2, ""),
        ("PYTHONIOENCODING=ascii {} help login | grep -q RELAY_URL", 0, ""),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {} help login | grep -q RELAY_URL", 0, ""),
    ],
)
def test_an_output_that_takes_nothing_is_no_traceback(line: str, code: int, said: str) -> None:
    program = line.format(f"{sys.executable} -m arcbridge")
    done = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("line", ["--role king help", "help --role king", "--role king connect --help"])
def test_help_of_a_role_that_is_none(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == ExitCode.USAGE
    assert capsys.readouterr().err.startswith("error: --role king: unknown")


@pytest.mark.parametrize("line", ["help --color always", "connect --help --color=always", "lgoin --color always"])
def test_colour_is_decided_before_anything_is_said(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(line.split())
    assert "\x1b[" in "".join(capsys.readouterr())
    run(line.replace("always", "never").split())
    assert "\x1b[" not in "".join(capsys.readouterr())


def test_a_colour_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["help", "--color", "king"]) == ExitCode.USAGE
    monkeypatch.setenv("ARCBRIDGE_COLOR", "king")
    assert run(["version", "--role", "client"]) == ExitCode.USAGE
    assert capsys.readouterr().err.splitlines() == [
        "error: flag --color: 'king' is unknown; use auto, always or never",
        "error: environment variable ARCBRIDGE_COLOR: 'king' is unknown; use auto, always or never",
    ]
