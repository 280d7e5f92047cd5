"""The pages for operators say what there is, and only that."""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from arcbridge import __version__
from arcbridge.errors import ExitCode
from arcbridge.settings.config import AgentLimitsConfig, RelayLimitsConfig
from tests.support import citations, pages

from .test_prometheus import alerts

ROOT = Path(__file__).resolve().parents[2]
CHANGE = pages.read(ROOT / "docs/change.md")
BROKEN = pages.read(ROOT / "docs/broken.md")
PAGES = [*(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md"]


def test_every_limit_is_explained_with_its_default() -> None:
    for field in fields(RelayLimitsConfig):
        shown = f"{field.default:g} s" if isinstance(field.default, float) else f"{field.default}"
        name = field.name
        if field.default is MISSING:
            name, shown = f"{field.name}.NAME", "none"
        assert f"| `limits.{name}` | {shown} |" in CHANGE


def test_every_limit_of_a_user_is_explained_with_its_default() -> None:
    explained = dict(
        re.findall(r"^\| `limits\.(\w+)` \| (\d+) \|", CHANGE.partition("### Limits of one user")[2], re.MULTILINE)
    )
    limits = [field for field in fields(AgentLimitsConfig) if field.name not in ("groups", "users", "actors")]
    assert explained == {field.name: str(field.default) for field in limits}


def test_each_alert_has_a_row_that_leads_to_what_to_do() -> None:
    """A row names alerts without their prefix, and links the place that the alert itself names."""
    table = BROKEN.partition("## By alert")[2].partition("\n## ")[0]
    rows = re.findall(r"\[(`[^\]]+`)\]\((alerts\.md#[\w-]+)\)", table)
    found = {name: link for names, link in rows for name in re.findall(r"`(\w+)`", names)}
    assert found == {
        rule["alert"].removeprefix("Arcbridge"): "alerts.md#" + rule["annotations"]["runbook_url"].partition("#")[2]
        for rule in alerts()
        if "alert" in rule
    }


def test_every_dependency_and_its_floor_has_a_reason() -> None:
    page = pages.read(ROOT / "docs/decisions/0002-dependencies.md")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for dependency in dependencies:
        name, floor = re.fullmatch(r"([a-z-]+)>=([0-9.]+)(?:;.*)?", dependency.strip()).groups()
        assert re.search(rf"^\| {name} \| {re.escape(floor)}[ ,]", page, re.MULTILINE), dependency


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_what_is_said_to_survive_is_held_by_tests() -> None:
    table = CHANGE.partition("### What survives what")[2].partition("\n\n`session.drain`")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "held by" not in line]
    assert len(rows) == 8
    for row in rows:
        assert citations.missing(row) == []
        assert "`tests/" in row


def test_what_people_meet_is_said_by_the_code_and_held_by_tests() -> None:
    section = BROKEN.partition("## What people meet\n")[2].partition("\n## ")[0]
    assert citations.missing(section) == []
    # Sentences may be spread over several literals of one expression.
    code = "\n".join(file.read_text() for file in sorted((ROOT / "arcbridge").rglob("*.py")))
    code = re.sub(r"""["']\s*\n\s*f?["']""", "", code)
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    for row in rows:
        words, _, held_by = (cell.strip() for cell in row.strip("| ").split(" | "))
        assert citations.tests(held_by), row
        for said in re.findall(r"`([^`]+)`", words):
            assert said in code, f"no message of ours has {said!r}"


def test_exit_codes_are_those_of_the_code() -> None:
    table = BROKEN.partition("| exit code | means | do |\n")[2].partition("\n\n")[0]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(ExitCode)


def test_the_changelog_has_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
