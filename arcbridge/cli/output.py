"""Formats what users and scripts read: tables, findings, JSON, YAML and names on stdout, errors on stderr."""

from __future__ import annotations

import sys

from arcbridge import units
from arcbridge.cli.commands import DIAGNOSIS_OUTPUTS, DOCUMENTS, LIST_OUTPUTS
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.settings.suggest import unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, TextIO

    from arcbridge.checks.diagnosis import Finding

    Row = Mapping[str, Any]


def wants_colour(when: str, stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Return whether to colour: `always`, `never`, or `auto`: on a terminal, without NO_COLOR (no-color.org) or
    TERM=dumb."""
    if when == "always":
        return True
    if when == "never" or environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return False
    return stream.isatty()


def plain(text: str) -> str:
    """Return foreign text with its control characters escaped, so that it cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_error(message: str, *, colour: bool = False) -> None:
    """`error: …` on standard error; further lines of the message say what to do."""
    first, *rest = message.splitlines() or [""]
    label = "\x1b[31merror:\x1b[0m" if colour else "error:"
    lines = [f"{label} {plain(first)}", *(plain(line) for line in rest)]
    sys.stderr.write("\n".join(lines) + "\n")


def print_warning(message: str) -> None:
    sys.stderr.write(f"warning: {plain(message)}\n")


def print_rows(rows: Sequence[Row], columns: Sequence[tuple[str, str]], output: str) -> None:
    """Print a list: `table` (the columns: key, head), `json` or `yaml` (everything), or `name` (the `name` key)."""
    sys.stdout.write(format_rows(rows, columns, output))


def format_rows(rows: Sequence[Row], columns: Sequence[tuple[str, str]], output: str, *, name: str = "name") -> str:
    if output in DOCUMENTS:
        return format_document(list(rows), output)
    if output == "name":
        return "".join(f"{plain(str(row[name]))}\n" for row in rows)
    if output not in ("", "table"):
        raise ConfigError(unknown("flag --output", output, LIST_OUTPUTS))
    cells = [[head for _, head in columns]]
    cells += [[_cell(row.get(key)) for key, _ in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in cells
    )


def rfc3339(seconds: float) -> str | None:
    """Return a time of documents, in UTC (RFC 3339); None for 0, which stands for never, and for what is no date."""
    return units.rfc3339(seconds) if 0 < seconds < 1e11 else None


def print_document(document: Any, output: str) -> None:
    """Print one object as JSON or YAML."""
    sys.stdout.write(format_document(document, output))


def format_document(document: Any, output: str) -> str:
    """Return one object as text: JSON or YAML."""
    # ASCII alone: no character of a relay's answer can steer a terminal (docs/threats.md#B48).
    if output == "yaml":
        import yaml

        text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=False, width=4096)
        return text
    import json

    return json.dumps(document, indent=2, ensure_ascii=True) + "\n"


def _cell(value: object) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(plain(str(item)) for item in value)
    return plain(str(value))


def describe(error: BaseException) -> str:
    """Return an error as a user should read it: the message of ours, the type of any other."""
    if isinstance(error, ArcbridgeError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"internal error ({type(error).__name__}); run with --verbose and report what it logs"


_FINDING_COLUMNS = (("hop", "HOP"), ("state", "STATE"), ("detail", "DETAIL"))


def format_findings(findings: Sequence[Finding], output: str) -> str:
    """Return findings as a table that ends with what to do, or as one JSON or YAML document.

    Raises ConfigError for an unknown format.
    """
    from dataclasses import asdict

    from arcbridge.checks.diagnosis import FindingState, first_failure

    failed = first_failure(findings)
    rows = [{**asdict(finding), "state": str(finding.state)} for finding in findings]
    if output in DOCUMENTS:
        return format_document({"ok": failed is None, "cause": failed.code if failed else "", "hops": rows}, output)
    if output not in ("", "table"):
        raise ConfigError(unknown("flag --output", output, DIAGNOSIS_OUTPUTS))
    lines = [format_rows(rows, _FINDING_COLUMNS, "table")]
    for finding in findings:
        if finding.remedy and (finding is failed or finding.state is FindingState.WARNING):
            lines.append(f"\n{plain(finding.hop)}: {plain(finding.remedy)}\n")
    return "".join(lines)
