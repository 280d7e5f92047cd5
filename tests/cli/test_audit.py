"""`audit verify` and `audit show` at the command line: no role, no settings, exit codes for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from arcbridge.audit.chain import Chain
from arcbridge.cli.audit import parse_since
from arcbridge.cli.run import run
from arcbridge.errors import ConfigError, ExitCode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    chain = Chain()
    lines = [chain.begin("started", "agent-1", None), *[chain.seal('{"event":"audit"}') for _ in range(4)]]
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_nothing_is_wrong(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "verify", str(path)]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert out.endswith("records: 5, chains: 1, files: 1; nothing is wrong\n")
    assert f"at {path}:5" in out


def test_what_is_wrong_and_where(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(lines[:2] + lines[3:]))
    assert run(["audit", "verify", str(copy)]) == ExitCode.FAILURE
    assert capsys.readouterr().out.startswith(f"{copy}:3: missing (chain ")
    assert run(["audit", "verify", str(copy), "-o", "json"]) == ExitCode.FAILURE
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert [(one["kind"], one["line"], one["record"]) for one in document["findings"]] == [("missing", 3, 2)]
    assert run(["audit", "verify", str(path), str(copy), "-o", "json"]) == ExitCode.FAILURE
    assert {one["kind"] for one in json.loads(capsys.readouterr().out)["findings"]} == {"duplicate"}


def test_anchors(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = json.loads(path.read_text().splitlines()[0])["chain"]
    agent_log = tmp_path / "agent.log"
    agent_log.write_text(json.dumps({"event": "audit head", "chain": chain, "record": 9, "hash": "0" * 64}) + "\n")
    assert run(["audit", "verify", str(path), "--anchors", str(agent_log)]) == ExitCode.FAILURE
    assert "records 5 to 9 are missing: the chain was cut off" in capsys.readouterr().out


def test_mistakes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "verify", "/nowhere/audit.jsonl"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "error: /nowhere/audit.jsonl: cannot be read: No such file or directory\n"
    assert run(["audit", "verify"]) == ExitCode.USAGE
    assert run(["audit", "verify", str(path), "--anchors", str(path)]) == ExitCode.USAGE


@pytest.fixture
def acts(tmp_path: Path) -> Path:
    chain = Chain()
    records = [
        {"ts": "2026-11-28T00:00:00.000Z", "event": "audit", "stage": "ended", "act": "user revoke", "by": "os",
         "actor": "root", "uid": 0, "arguments": {"user": "bob\x1b[31m"}, "outcome": "done", "result": {"before": "x"}},
        {"ts": "2026-11-28T01:00:00.000Z", "event": "audit", "stage": "begun", "act": "backup", "by": "person",
         "actor": "root"},
        {"ts": "2026-11-28T02:00:00.000Z", "event": "audit", "stage": "complete", "act": "relay stop", "by": "relay"},
        {"ts": "2026-11-29T00:00:00.000Z", "event": "audit", "stage": "complete", "user": "eve", "verb": "get",
         "resource": "pods", "outcome": "answered"},
    ]  # fmt: skip
    lines = [chain.begin("started", "relay-1", None), *(chain.seal(json.dumps(one)) for one in records)]
    path = tmp_path / "acts.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_show(acts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "show", str(acts)]) == ExitCode.DONE
    assert capsys.readouterr().out == (
        "2026-11-28T00:00:00.000Z os:root user revoke done uid=0 user=bob\\x1b[31m before=x\n"
        "2026-11-28T01:00:00.000Z person:root backup begun\n"
        "2026-11-28T02:00:00.000Z relay relay stop complete\n"
        "2026-11-29T00:00:00.000Z eve get answered resource=pods\n"
    )
    for role in ("relay", "agent"):
        assert run(["--role", role, "audit", "show", str(acts), "--user", "eve", "-o", "json"]) == ExitCode.DONE
        (one,) = json.loads(capsys.readouterr().out)
        assert one["verb"] == "get"
    assert run(["audit", "show", str(acts), "--user", "nobody"]) == ExitCode.DONE
    assert capsys.readouterr() == ("", f"no record matches in {acts}\n")
    assert run(["audit", "show", str(acts), "--since", "2026-11-29", "-o", "yaml"]) == ExitCode.DONE
    assert [one["user"] for one in yaml.safe_load(capsys.readouterr().out)] == ["eve"]
    assert run(["audit", "show", str(acts), "--cluster", "none", "-o", "json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out) == []


def test_a52_no_text_of_a_caller_reads_as_another_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"ts": "2026-11-28T00:00:00.000Z", "event": "audit", "user": "eve get refused", "verb": "delete",
              "outcome": "answered", "name": "a status=403 reason=no", "reason": "it was cut", "container": '"a"',
              "selector": "app=web", "status": 200}  # fmt: skip
    path, chain = tmp_path / "audit.jsonl", Chain()
    opened = {"ts": "2026-11-28T00:00:01.000Z", "user": '"eve', "actor": "bot", "verb": "get", "name": 'a"'}
    path.write_bytes(b"".join(chain.seal(json.dumps(one)) + b"\n" for one in (record, opened)))
    assert run(["audit", "show", str(path)]) == ExitCode.DONE
    assert capsys.readouterr().out == (
        '2026-11-28T00:00:00.000Z "eve get refused" delete answered name="a status=403 reason=no" reason=it was cut '
        'container="\\"a\\"" selector=app=web status=200\n'
        '2026-11-28T00:00:01.000Z "\\"eve" get actor=bot name=a"\n'
    )


def test_show_of_the_roles_own_log(acts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    acts.rename(tmp_path / "audit.jsonl-20261129")
    (tmp_path / "audit.jsonl").touch()
    assert run(["--role", "relay", "--data-dir", str(tmp_path), "audit", "show", "--user", "root"]) == ExitCode.DONE
    assert "user revoke" in capsys.readouterr().out
    (tmp_path / "agent.toml").write_text('[audit]\nfile = "audit.jsonl"\n')
    config = str(tmp_path / "agent.toml")
    assert run(["--role", "agent", "--config", config, "audit", "show", "--user", "eve"]) == ExitCode.DONE
    assert "pods" in capsys.readouterr().out
    (tmp_path / "agent.toml").write_text('[audit]\nfile = "-"\n')
    assert run(["--config", config, "audit", "show"]) == ExitCode.USAGE
    assert (
        'audit.file is "-", so that no audit log can be read: name the files, or --role relay'
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2h", "2026-11-28T22:00:00.000Z"),
        ("2026-11-25", "2026-11-25T00:00:00.000Z"),
        ("2026-11-25T13:00:00+01:00", "2026-11-25T12:00:00.000Z"),
        *((text, None) for text in ("yesterday", "2026-11-25T13:00:00", "", "9" * 30)),
    ],
)
def test_since(text: str, expected: str | None) -> None:
    now = 1795910400.0  # 2026-11-29T00:00:00Z
    if expected is None:
        with pytest.raises(ConfigError, match="--since is a time ago"):
            parse_since(text, now)
    else:
        assert parse_since(text, now) == expected


def test_a_terminal_shows_a_record_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who is named with two blanks is not the one who is named with one, however narrow the terminal is."""
    path = tmp_path / "audit.jsonl"
    path.write_bytes(Chain().seal(json.dumps({"event": "audit", "user": "a  b", "path": "/x  y" * 20})) + b"\n")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(["audit", "show", str(path)]) == ExitCode.DONE
    first, *rest = capsys.readouterr().out.splitlines()
    assert all(line.startswith("  ") for line in rest)
    line = " ".join([first, *(line[2:] for line in rest)])
    assert ' "a  b" ' in line
    assert line.endswith("path=" + "/x  y" * 20)
