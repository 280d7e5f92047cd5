"""The alerts: every metric they name exists, every runbook exists, and promtool agrees where it can be had."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.processes import require_or_skip

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "config/prometheus/rules.yaml"


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def named_metrics(expression: str) -> set[tuple[str, str]]:
    """(role, name) of each metric, also where the role is written as a set."""
    found: set[tuple[str, str]] = set()
    for roles, name in re.findall(r"arcbridge_\(?([a-z|]+?)\)?_([a-z_]+)", expression):
        found |= {(role, re.sub(r"_(bucket|sum|count)$", "", name)) for role in roles.split("|")}
    return found


def defined_metrics(role: str) -> set[str]:
    """Names that the source of a role, or what all roles share, registers: by a call, or by a row of a table."""
    call, row = (
        r'(?:counter|gauge|histogram)\(\s*"([a-z_]+)"',
        r'^    \(\s*"([a-z_]+)",\s*"|^_FAILURES: Final = "([a-z_]+)"',
    )
    files = [
        *(ROOT / "arcbridge/observe").rglob("*.py"),
        *(ROOT / "arcbridge/checks").rglob("*.py"),
        *(ROOT / "arcbridge/audit").rglob("*.py"),
        *(ROOT / "arcbridge" / role).rglob("*.py"),
    ]
    return {
        found[found.lastindex or 0]
        for file in files
        for pattern in ([call, row] if file.name == "metrics.py" else [call])
        for found in re.finditer(pattern, file.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("alert", alerts(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_is_wrong_and_what_to_do(alert: dict[str, Any]) -> None:
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert alert["labels"]["severity"] in ("warning", "critical")
    page, _, anchor = annotations["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("alert", alerts(), ids=lambda rule: str(rule["alert"]))
def test_every_metric_exists(alert: dict[str, Any]) -> None:
    for role, name in named_metrics(alert["expr"]):
        assert name in defined_metrics(role), f"arcbridge_{role}_{name}"
    assert named_metrics(alert["expr"]) or alert["expr"].startswith("up{")


@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yaml"), ("test", "rules", "rules-test.yaml")])
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        require_or_skip("promtool", "promtool is not on this machine (Debian: package prometheus)")
    command = [promtool, *arguments]
    done = subprocess.run(command, cwd=RULES.parent, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
