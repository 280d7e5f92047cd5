"""What is installed is named by its sources: `arcbridge version`, and `cluster list` for agents."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import arcbridge
from arcbridge.build import build
from tests.support.processes import run
from tests.support.world import arcbridge as command


def test_two_builds_of_one_version_differ(tmp_path: Path) -> None:
    said = run(command("--role", "relay", "version")).stdout.decode().strip()
    assert said == f"arcbridge {build()}"
    assert re.fullmatch(rf"{re.escape(arcbridge.__version__)}\+[0-9a-f]{{8}}", build())
    shutil.copytree(Path(arcbridge.__file__).parent, tmp_path / "arcbridge")
    line = ["env", "-C", str(tmp_path), *command("--role", "relay", "version")]
    assert run(line).stdout.decode().strip() == said, "wherever it is installed"
    with (tmp_path / "arcbridge" / "units.py").open("a") as file:
        file.write("# changed\n")
    assert run(line).stdout.decode().strip() not in ("", said)
