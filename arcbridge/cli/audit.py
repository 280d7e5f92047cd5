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


def verify_logs(invocation: Invocation) -> int:
    """Print what is wrong with audit logs, wherever they are: it needs no agent's settings."""
    from arcbridge.agent.audit.verify import Report, read_anchors, verify

    anchors = [head for name in invocation.texts("anchors") for head in read_anchors(Path(name))]
    report: Report = verify([Path(name) for name in invocation.texts("file")], anchors)
    output = invocation.text("output", "text")
    if output in DOCUMENTS:
        print_document(report.document(), output)
    else:
        _print(report.document())
    return ExitCode.DONE if report.ok else ExitCode.FAILURE


def _print(document: dict[str, object]) -> None:
    findings, chains, notes = document["findings"], document["chains"], document["notes"]
    assert isinstance(findings, list)
    assert isinstance(chains, list)
    assert isinstance(notes, list)
    lines = []
    for one in findings:
        record = f" (chain {one['chain']}, record {one['record']})" if one["chain"] else ""
        lines.append(f"{one['file']}:{one['line']}: {one['kind']}{record}: {one['text']}")
    lines += [f"note: {note}" for note in notes]
    for one in chains:
        lines.append(
            f"chain {one['chain']}: records {one['from']} to {one['to']}, {one['end']}; the last is {one['hash']} at "
            f"{one['file']}:{one['line']}"
        )
    faults = f"{len(findings)} found wrong" if findings else "nothing is wrong"
    lines.append(f"{document['records']} records in {len(chains)} chains, {document['files']} files: {faults}")
    sys.stdout.write("".join(f"{plain(line)}\n" for line in lines))
