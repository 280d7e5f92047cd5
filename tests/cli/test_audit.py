"""`audit verify` at the command line: no role, no settings, exit codes for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcbridge.audit.chain import Chain
from arcbridge.cli.run import run
from arcbridge.errors import ExitCode


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
    assert out.endswith("5 records in 1 chains, 1 files: nothing is wrong\n")
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
