"""What is installed is named by its sources: `arcbridge version`, and `cluster list` for agents."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import arcbridge
from arcbridge import build as module
from arcbridge.build import build, version_line
from tests.support.processes import require_or_skip, run
from tests.support.world import arcbridge as command

ROOT = Path(arcbridge.__file__).parents[1]


def test_two_builds_of_one_version_differ(tmp_path: Path) -> None:
    said = run(command("--role", "relay", "version")).stdout.decode().strip()
    assert said == f"arcbridge {build()}", "a clone has no commit to name: its files may be of none"
    assert re.fullmatch(rf"{re.escape(arcbridge.__version__)}\+[0-9a-f]{{8}}", build())
    shutil.copytree(Path(arcbridge.__file__).parent, tmp_path / "arcbridge")
    line = ["env", "-C", str(tmp_path), *command("--role", "relay", "version")]
    assert run(line).stdout.decode().strip() == said, "wherever it is installed"
    with (tmp_path / "arcbridge" / "units.py").open("a") as file:
        file.write("# changed\n")
    assert run(line).stdout.decode().strip() not in ("", said)


def test_what_is_built_of_a_commit_names_it(tmp_path: Path) -> None:
    """Whatever builds from `git archive`: `make dist`, the image, the host of the repository."""
    if not (ROOT / ".git").exists():
        require_or_skip("git", "this is no clone")
    archive = subprocess.run(["git", "archive", "HEAD", "arcbridge"], check=True, cwd=ROOT, stdout=subprocess.PIPE)
    subprocess.run(["tar", "--extract", "--directory", tmp_path], check=True, input=archive.stdout)
    commit = run(["git", "-C", str(ROOT), "log", "-1", "--format=%H %cs"]).stdout.decode().split()
    said = run(["env", "-C", str(tmp_path), *command("version")]).stdout.decode().strip()
    assert said == run(["env", "-C", str(tmp_path), *command("--role", "relay", "version")]).stdout.decode().strip()
    assert re.fullmatch(r"arcbridge [0-9.]+\+[0-9a-f]{8} \((.*)\)", said), said
    assert said.endswith(f" (commit {commit[0][:12]}, {commit[1]})")


@pytest.mark.parametrize("text", [None, "", "$Format:%H %cs$\n", "one two three", "\xff\xfe"])
def test_what_names_no_commit_says_none(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "build.py"))
    if text is not None:
        (tmp_path / "commit.txt").write_text(text, encoding="latin-1")
    assert version_line() == f"arcbridge {build()}"
    (tmp_path / "commit.txt").write_text(f"{'0123456789' * 4} 2027-01-15\n")
    assert version_line() == f"arcbridge {build()} (commit 012345678901, 2027-01-15)"
