"""`recording list`, `open` and `verify` at the command line: no settings, exit codes for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcbridge.agent.recording.cast import CastWriter, Event
from arcbridge.agent.recording.sealed_file import ENDING, PART, FinishedFile, RecordingFile, sha256_of
from arcbridge.cli import recording
from arcbridge.cli.run import run
from arcbridge.errors import ExitCode
from tests.agent.recording.keys import RECIPIENTS, published
from tests.agent.recording.test_opened import log_of, recorded
from tests.sealing.keys import X25519_IDENTITY


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "auditor.key"
    path.write_text(X25519_IDENTITY)
    return str(path)


def made(directory: Path, name: str, output: bytes, *, ends: bool = True) -> Path:
    path = directory / (name + ENDING)
    file, text = RecordingFile.create(path, RECIPIENTS), CastWriter(0.0)
    file.append(text.header(0, "alice in shop/web", ""))
    file.append(text.lines([Event(900.0, "o", output)]))
    if ends:
        file.append(text.end(901.0, 0, ""))
    published(file)
    return path


HOSTILE = b"a\x1b[31mred\x1b[0m\x1b]52;c;ZXZpbA==\x07\r\n\x9b31mb\n\x1b(Bc\x07"


def test_text_has_nothing_that_steers_a_terminal(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, "a", HOSTILE)
    assert run(["recording", "open", "--identity", key, "--text", str(path)]) == ExitCode.DONE
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "ared"
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "52;c" not in shown


def test_a_player_shows_the_bytes_and_shortens_waits(
    tmp_path: Path, key: str, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(recording.time, "sleep", waits.append)
    path = made(tmp_path, "a", HOSTILE)
    assert run(["recording", "open", "--identity", key, str(path)]) == ExitCode.DONE
    assert capfdbinary.readouterr().out == HOSTILE
    assert waits == [recording.LONGEST_WAIT]


def test_a_cast_is_for_asciinema(tmp_path: Path, key: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    path = made(tmp_path, "a", b"x")
    assert run(["recording", "open", "--identity", key, "--cast", str(path)]) == ExitCode.DONE
    first, *events, last = capfdbinary.readouterr().out.splitlines()
    assert json.loads(first)["version"] == 3
    assert [json.loads(line)[1] for line in events] == ["o", "x"]
    assert last == b"# end"


def test_a_recording_that_broke_off(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, "a", b"x\n", ends=False)
    assert run(["recording", "open", "--identity", key, "--text", str(path)]) == ExitCode.FAILURE
    captured = capsys.readouterr()
    assert captured.out == "x\n"
    assert "broke off" in captured.err


def test_what_the_log_says(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, "a", b"x")
    file = RecordingFile.create(tmp_path / ("b" + ENDING), RECIPIENTS)
    log = str(log_of(tmp_path / "audit.jsonl", recorded(published(file), user="alice", namespace="shop", name="web")))
    assert run(["recording", "list", log]) == ExitCode.DONE
    assert "alice" in capsys.readouterr().out
    assert run(["recording", "list", "-o", "name", log]) == ExitCode.DONE
    assert capsys.readouterr().out == f"b{ENDING}\n"
    assert run(["recording", "verify", "--audit", log, str(tmp_path)]) == ExitCode.FAILURE
    assert f"{path}: unknown: no record" in capsys.readouterr().out
    path.unlink()
    assert run(["recording", "verify", "--audit", log, str(tmp_path), "-o", "json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out) == {"ok": True, "good": 1, "unfinished": [], "differences": []}


def test_names_are_those_of_files_and_what_was_not_finished_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path, "a", b"x")
    digest, size = sha256_of(path)
    stored = recorded(FinishedFile(f"s3://recordings/berlin/{path.name}", digest, size))
    without = {"ts": "2026-11-29T11:00:00Z", "stage": "recorded", "request": "r-2", "recording": {"failure": "SPDY"}}
    log = str(log_of(tmp_path / "audit.jsonl", stored, without))
    assert run(["recording", "list", "-o", "name", log]) == ExitCode.DONE
    assert capsys.readouterr().out == f"{path.name}\n"
    assert run(["recording", "list", "-o", "wide", log]) == ExitCode.DONE
    assert "SPDY" in capsys.readouterr().out
    part = path.with_name(f"b{ENDING}{PART}")
    part.touch()
    assert run(["recording", "verify", "--audit", log, str(tmp_path)]) == ExitCode.DONE
    assert f"{part}: not checked" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, "a", b"x")
    assert run(["recording", "open", str(path)]) == ExitCode.USAGE
    assert "--identity is needed" in capsys.readouterr().err
    assert run(["recording", "open", "--identity", str(tmp_path / "no"), str(path)]) == ExitCode.USAGE
    assert run(["recording", "open", "--identity", key, key]) == ExitCode.FAILURE
    assert run(["recording", "list", str(tmp_path / "no")]) == ExitCode.USAGE


def test_without_a_log_each_command_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    for words, how in ((["list"], "name an agent's log"), (["verify", "a"], "name an agent's with --audit")):
        assert run(["recording", *words]) == ExitCode.USAGE
        assert f'audit.file is "-", so that no audit log can be read: {how}' in capsys.readouterr().err
