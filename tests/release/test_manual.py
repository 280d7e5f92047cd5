"""Man pages and reference are those of the tables, and man reads them without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from arcbridge.settings.flags import ROLES
from release import manual
from tests.support.processes import require_or_skip


@pytest.mark.parametrize("path", manual.files(), ids=lambda path: path.name)
def test_each_file_is_what_the_tables_say(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == manual.files()[path], "run: make manual"


@pytest.mark.parametrize("role", ROLES)
def test_man_has_nothing_to_complain_of(role: str) -> None:
    if shutil.which("groff") is None:
        require_or_skip("man", "groff is not on this machine")
    command = ["groff", "-man", "-ww", "-Kutf8", "-Tutf8", "-rLL=80n", str(manual.MAN / manual.NAMES[role])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    shown = re.sub(r".\x08", "", done.stdout)
    assert "EXIT STATUS" in shown
    assert "--config FILE" in shown


@pytest.mark.parametrize("role", ROLES)
def test_each_setting_says_what_it_is(role: str) -> None:
    found = manual.settings(role)
    assert len(found) > 20
    assert [one.key for one in found if not one.about] == []
