"""kubectl's credential plugin on its quick way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.cli import credential
from arcbridge.cli.credential import print_credential
from arcbridge.client.background import caller
from arcbridge.client.background.caller import NotRunning
from arcbridge.client.background_paths import BackgroundPaths


def test_the_answer_is_handed_on_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    asked = []

    def exchange(place: object, line: bytes) -> bytes:
        asked.append(line)
        if len(asked) == 1:
            raise NotRunning
        return b'{"kind":"ExecCredential"}\n'

    started: list[object] = []
    monkeypatch.setattr(credential, "forbid_core_dumps", lambda: None)
    monkeypatch.setattr(caller, "exchange", exchange)
    monkeypatch.setattr(caller, "ensure_started", lambda *_: started.append(1))
    monkeypatch.setenv("KUBERNETES_EXEC_INFO", '{"spec":{"cluster":{"server":"https://127.0.0.1:47011","x":"y"}}}')
    assert print_credential(["--cluster", "berlin"]) == 0
    assert capfdbinary.readouterr().out == b'{"kind":"ExecCredential"}\n'
    assert started == [1]
    assert b'"server":"https://127.0.0.1:47011"' in asked[0]
    assert b'"arguments":["--cluster","berlin"]' in asked[0]


@pytest.mark.parametrize(
    ("answer", "code"),
    [(b'{"error": "no agent", "exit_code": 4}\n', 4), (b'{"error": "log in", "exit_code": 3}\n', None)],
)
def test_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: bytes, code: int | None
) -> None:
    monkeypatch.setattr(credential, "forbid_core_dumps", lambda: None)
    monkeypatch.setattr(caller, "exchange", lambda *_: answer)
    assert print_credential(["--cluster", "berlin"]) == code
    assert capsys.readouterr().err == ("error: no agent\n" if code else "")


def test_ctrl_c_ends_it_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """kubectl and its plugin get it both, and the plugin's errors are on the same terminal."""

    def exchange(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(credential, "forbid_core_dumps", lambda: None)
    monkeypatch.setattr(caller, "exchange", exchange)
    assert print_credential(["--cluster", "berlin"]) == 130


@pytest.mark.parametrize(
    ("info", "server"),
    [
        ('{"spec":{"cluster":{"server":"https://127.0.0.1:1","a":"b"}}}', "https://127.0.0.1:1"),
        ('{"spec": {"cluster": {"server": "https://127.0.0.1:1"}}}', "https://127.0.0.1:1"),
        ('{"spec": {"interactive": true}}', ""),
        ("", ""),
    ],
    ids=["kubectl", "python", "without", "absent"],
)
def test_where_the_caller_is_about_to_connect(info: str, server: str) -> None:
    assert credential._server(info) == server


def test_one_program_is_told_each_reason_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have two clusters, which it cannot reach for two reasons."""
    place = BackgroundPaths(str(tmp_path), str(tmp_path))
    assert credential.is_news(place, "no agent")
    assert credential.is_news(place, "no agent")  # to a person
    monkeypatch.setenv("KUBERNETES_EXEC_INFO", "{}")
    assert credential.is_news(place, "no agent")
    assert not credential.is_news(place, "no agent")
    assert credential.is_news(place, "the relay does not answer")


@pytest.mark.parametrize("flag", ["--help", "-h", "--ended", "--verbose"])
def test_what_is_no_question(flag: str) -> None:
    assert print_credential(["--cluster", "berlin", flag]) is None


def test_a_proxy_that_ended_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "arcbridge", "credential", "--cluster", "berlin", "--ended"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        'error: cluster "berlin" is not served now: its proxy has ended',
        "run `arcbridge connect berlin`, or `arcbridge --role client proxy -n berlin`",
    ]
