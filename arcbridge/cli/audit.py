"""`audit verify`: checks the chains of audit logs, and says what is wrong and where.

It reads no settings and no network. Exit code 0: nothing is wrong; 1: something is; 2: a file cannot be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from arcbridge.cli.commands import DOCUMENTS
from arcbridge.cli.output import plain, print_document
from arcbridge.cli.parser import Invocation
from arcbridge.errors import ExitCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from arcbridge.audit.verify import Report


def verify_logs(invocation: Invocation) -> int:
    """Print what is wrong with audit logs, wherever they are: it needs no agent's settings."""
    from arcbridge.audit.verify import read_anchors, verify

    anchors = [head for name in invocation.texts("anchors") for head in read_anchors(Path(name))]
    report = verify([Path(name) for name in invocation.texts("file")], anchors)
    output = invocation.text("output", "text")
    if output in DOCUMENTS:
        print_document(report.document(), output)
    else:
        _print(report)
    return ExitCode.DONE if report.ok else ExitCode.FAILURE


def _print(report: Report) -> None:
    lines = []
    for one in report.findings:
        record = f" (chain {one.chain}, record {one.record})" if one.chain else ""
        lines.append(f"{one.file}:{one.line}: {one.kind}{record}: {one.text}")
    lines += [f"note: {note}" for note in report.notes]
    for chain in report.chains:
        lines.append(
            f"chain {chain['chain']}: records {chain['from']} to {chain['to']}, {chain['end']}; the last is "
            f"{chain['hash']} at {chain['file']}:{chain['line']}"
        )
    faults = f"{len(report.findings)} found wrong" if report.findings else "nothing is wrong"
    lines.append(f"{report.records} records in {len(report.chains)} chains, {report.files} files: {faults}")
    sys.stdout.write("".join(f"{plain(line)}\n" for line in lines))
