"""`policy explain` and `policy diff` without a relay that runs; tests/e2e/test_policy_changes.py has one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from arcbridge.cli.run import run
from arcbridge.errors import ExitCode
from tests.cli.test_relay import flags

RULES = '[[allow]]\ngroups = ["a"]\nclusters = ["*"]\n'


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--groups", "b,a", "prod"], ExitCode.DONE, 'allow[0] (line 1) allows it, by the group "a"'),
        (["anna", "prod"], ExitCode.FAILURE, "groups: not known here, so the name alone was looked for; give --groups"),
        (["anna", "prod", "--groups", "A"], ExitCode.FAILURE, 'is for the groups "a"; did you mean "a"?'),
    ],
)
def test_explain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: ExitCode, text: str
) -> None:
    assert run([*flags(tmp_path), "policy", "explain", *words]) == code
    out = capsys.readouterr().out
    assert text in out
    assert "of the settings' file, because no relay runs here" in out
    assert not (tmp_path / "data").exists(), "nothing is made"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prod"], "whom? give the name of the user"),
        (["a", "b", "prod"], "which one? give the name of one user"),
        (["anna", "PROD"], "cluster name"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert run([*flags(tmp_path), "policy", "explain", *words]) == ExitCode.USAGE
    assert message in capsys.readouterr().err


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.toml"
    arguments = [*flags(tmp_path), "policy", "diff", str(other)]
    assert run(arguments) == ExitCode.USAGE
    assert "other.toml" in capsys.readouterr().err
    other.write_text(f"# the same\n{RULES}")
    assert run(arguments) == ExitCode.DONE
    assert "0 rules differ" in capsys.readouterr().out
    more = "".join(f'[[allow]]\ngroups = ["g{n}"]\nclusters = ["c{n}"]\n' for n in range(30))
    other.write_text(RULES.replace('["a"]', '["b"]') + more + '[[test]]\ngroups = ["b"]\naccept = ["x"]\n')
    assert run(arguments) == ExitCode.FAILURE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("31 rules differ; 1 tests pass")
    assert [re.split("  +", line) for line in lines[3:5]] == [
        ["changed", "allow[0]", "1", "group b", "group a"],
        ["added", "allow[1]", "4", "cluster c0, group g0", "-"],
    ]
    assert lines[-1] == "and 11 more rules"
    assert run([*arguments, "-o", "json"]) == ExitCode.FAILURE
    assert len(json.loads(capsys.readouterr().out)["rules"]) == 31
    admin = '[[admin]]\nusers = ["eve"]\nclusters = ["*"]\nwhat = ["tokens"]\n'
    other.write_text(RULES + admin)
    assert run(arguments) == ExitCode.FAILURE
    lines = capsys.readouterr().out.splitlines()
    assert "0 rules differ, and what 1 may administer" in lines[0]
    assert re.split("  +", lines[3]) == ["user eve", "tokens of *", "-"]
    other.write_text("[[allow]]\nusers = 1\n")
    assert run(arguments) == ExitCode.USAGE
    assert "allow[0].users: must be a list" in capsys.readouterr().err
