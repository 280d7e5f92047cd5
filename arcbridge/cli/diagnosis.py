"""Prints what the checks of a `doctor` found: a table with the remedies, or a document for scripts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from arcbridge.checks.diagnosis import FindingState, first_failure
from arcbridge.cli.commands import DIAGNOSIS_OUTPUTS, DOCUMENTS
from arcbridge.cli.output import format_document, format_rows, plain
from arcbridge.errors import ConfigError
from arcbridge.settings.suggest import unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arcbridge.checks.diagnosis import Finding

_COLUMNS = (("hop", "HOP"), ("state", "STATE"), ("detail", "DETAIL"))


def format_findings(findings: Sequence[Finding], output: str) -> str:
    """Return findings as a table that ends with what to do, or as one JSON or YAML document.

    Raises ConfigError for an unknown format.
    """
    failed = first_failure(findings)
    rows = [{**asdict(finding), "state": str(finding.state)} for finding in findings]
    if output in DOCUMENTS:
        return format_document({"ok": failed is None, "cause": failed.code if failed else "", "hops": rows}, output)
    if output not in ("", "table"):
        raise ConfigError(unknown("flag --output", output, DIAGNOSIS_OUTPUTS))
    lines = [format_rows(rows, _COLUMNS, "table")]
    for finding in findings:
        if finding.remedy and (finding is failed or finding.state is FindingState.WARNING):
            lines.append(f"\n{plain(finding.hop)}: {plain(finding.remedy)}\n")
    return "".join(lines)
