"""Formats what users and scripts read: tables, findings, JSON, YAML and names on stdout, errors on stderr."""

from __future__ import annotations

import sys
import time

from arcbridge import units
from arcbridge.cli.commands import DIAGNOSIS_OUTPUTS, DOCUMENTS, FOR_PEOPLE, LIST_OUTPUTS
from arcbridge.cli.screen import GAP, LEAST_PROSE, RED, YELLOW, Screen, cells, over_waiting, prose, table, wrap
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.settings.suggest import unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from arcbridge.checks.diagnosis import Finding
    from arcbridge.cli.screen import Column

    Row = Mapping[str, Any]


def plain(text: str) -> str:
    """Return foreign text with its control characters escaped, so that it cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_error(message: str) -> None:
    """`error: …` on standard error; further lines of the message say what to do."""
    _print_labelled("error:", RED, message)


def print_warning(message: str) -> None:
    _print_labelled("warning:", YELLOW, message)


def _print_labelled(label: str, colour: str, message: str) -> None:
    screen = Screen.of(sys.stderr)
    first, *rest = message.splitlines() or [""]
    text = prose("\n".join(map(plain, (f"{label} {first}", *rest))), screen, "  ")
    sys.stderr.write(over_waiting(text.replace(label, screen.paint(label, colour), 1), sys.stderr))


def print_prose(text: str) -> None:
    """Print sentences on standard output; text from outside comes in escaped (`plain`)."""
    sys.stdout.write(as_prose(text))


def print_note(text: str) -> None:
    """Print sentences on standard error, beside what a program may read on standard output."""
    sys.stderr.write(over_waiting(prose(text, Screen.of(sys.stderr), "  "), sys.stderr))


def as_prose(text: str) -> str:
    """Return sentences as standard output shows them."""
    return prose(text, Screen.of(sys.stdout), "  ")


def print_rows(rows: Sequence[Row], columns: Sequence[Column], output: str) -> None:
    """Print a list: `table` or `wide` (the columns), `json` or `yaml` (everything), or `name` (the `name` key)."""
    sys.stdout.write(format_rows(rows, columns, output))


def format_rows(rows: Sequence[Row], columns: Sequence[Column], output: str, *, name: str = "name") -> str:
    """Return a list as it is printed on standard output."""
    if output in DOCUMENTS:
        return format_document(list(rows), output)
    if output == "name":
        return "".join(f"{plain(str(row[name]))}\n" for row in rows)
    if output not in ("", *FOR_PEOPLE):
        raise ConfigError(unknown("flag --output", output, LIST_OUTPUTS))
    cells = [[_cell(row.get(column.key)) for column in columns] for row in rows]
    return table(cells, columns, Screen.of(sys.stdout), wide=output == "wide")


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


DIAGNOSIS_VERSION = 1
"""Of the document of `FindingPrinter`: another one when a field that was there changes or goes."""


class FindingPrinter:
    """Prints findings: as a table whose rows come one by one and that ends with what to do, or as one document.

    On a terminal a mark says the state; elsewhere a word, for programs. `hops`: the names that are wider than usual.
    Raises ConfigError for an unknown format.
    """

    def __init__(self, output: str, hops: Sequence[str] = ()) -> None:
        if output not in ("", *DIAGNOSIS_OUTPUTS):
            raise ConfigError(unknown("flag --output", output, DIAGNOSIS_OUTPUTS))
        self._document = output if output in DOCUMENTS else ""
        self._screen = Screen.of(sys.stdout)
        self._width = max(map(cells, ("relay certificate", *map(plain, hops))))
        self._begun = False
        self._start = time.monotonic()
        self._after: list[int] = []
        self.findings: list[Finding] = []

    def add(self, finding: Finding) -> None:
        """Print a row; a document waits for the others."""
        self.findings.append(finding)
        self._after.append(round((time.monotonic() - self._start) * 1000))
        if not self._document:
            sys.stdout.write(over_waiting(self._row(finding), sys.stdout))
            sys.stdout.flush()

    def _row(self, finding: Finding) -> str:
        screen, state = self._screen, str(finding.state)
        hop = plain(finding.hop)
        hop += " " * (self._width - cells(hop) + GAP)
        if screen.width is None:
            head, self._begun = "" if self._begun else f"{'HOP':{self._width}}   STATE     DETAIL\n", True
            return f"{head}{hop}{screen.state(state)}{' ' * (10 - len(state))}{plain(finding.detail)}".rstrip() + "\n"
        indent = " " * (cells(hop) + 2)
        first, *rest = wrap(plain(finding.detail), max(screen.width - len(indent), LEAST_PROSE)) or [""]
        lines = [f"{screen.mark(state)} {hop}{first}".rstrip(), *(f"{indent}{line}" for line in rest)]
        return "".join(f"{line}\n" for line in lines)

    def end(self) -> None:
        """Print what ends the table, or the whole document."""
        from dataclasses import asdict

        from arcbridge.checks.diagnosis import FindingState, first_failure

        cause = first_failure(self.findings)
        if self._document:
            rows = [
                {**asdict(finding), "state": str(finding.state), "after_ms": after}
                for finding, after in zip(self.findings, self._after, strict=True)
            ]
            document = {
                "version": DIAGNOSIS_VERSION,
                "ok": cause is None,
                "cause": cause.code if cause else "",
                "hops": rows,
            }
            sys.stdout.write(format_document(document, self._document))
            return
        for finding in self.findings:
            if finding.remedy and (finding is cause or finding.state is FindingState.WARNING):
                sys.stdout.write("\n" + prose(plain(f"{finding.hop}: {finding.remedy}"), self._screen, "  "))
