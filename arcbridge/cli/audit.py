"""`audit show` prints records of audit logs; `audit verify` checks their chains, and says what is wrong and where.

With files they read no settings, and in any case no network. Exit code 0: nothing is wrong; 1: something is; 2: a file
cannot be read.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from arcbridge.cli.commands import DOCUMENTS
from arcbridge.cli.output import plain, print_document, print_note, print_prose
from arcbridge.cli.parser import Invocation
from arcbridge.cli.screen import Screen, prose
from arcbridge.cli.settings import load_settings
from arcbridge.errors import ConfigError, ExitCode
from arcbridge.settings.config_loader import parse_duration
from arcbridge.settings.flags import RELAY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from arcbridge.audit.verify import Report


def show(invocation: Invocation) -> int:
    """Print records, each as soon as it is read: a log may be longer than the memory."""
    from arcbridge.audit.query import Wanted, find_records

    since = invocation.text("since")
    wanted = Wanted(
        invocation.text("user"), invocation.text("cluster"), parse_since(since, time.time()) if since else ""
    )
    other = "" if invocation.role == RELAY else ", or --role relay for a relay's log"
    files = [Path(name) for name in invocation.texts("file")] or own_files(invocation, f"name the files{other}")
    output, before = invocation.text("output", "text"), "[\n"
    screen = Screen.of(sys.stdout)
    found = False
    for fields in find_records(files, wanted):
        found = True
        if output == "text":
            sys.stdout.write(prose(plain(_line(fields)), screen, "  "))
        elif output == "yaml":
            sys.stdout.write(f"- {json.dumps(fields)}\n")
        else:
            sys.stdout.write(before + json.dumps(fields))
            before = ",\n"
    if output == "json":
        sys.stdout.write("\n]\n" if found else "[]\n")
    elif not found:
        print_note(plain(f"no record matches in {', '.join(map(str, files))}"))
    return ExitCode.DONE


def parse_since(text: str, now: float) -> str:
    """Return a time as records have it, from a time, a day (its beginning, UTC), or how long ago it is. Raises
    ConfigError."""
    try:
        return _rfc3339(now - parse_duration(text))
    except (ValueError, OverflowError, OSError):
        pass
    try:
        when = datetime.fromisoformat(text.strip())
        if len(text.strip()) <= len("2026-11-25"):
            when = when.replace(tzinfo=UTC)
        if when.tzinfo is None:
            raise ValueError
        return _rfc3339(when.timestamp())
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(
            "--since is a time ago, as 2h or 7d, a time with its zone, as 2026-11-25T12:00:00Z, or a day, as 2026-11-25"
        ) from error


def _rfc3339(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def own_files(invocation: Invocation, otherwise: str) -> list[Path]:
    """Return the role's own audit log, and what was rotated of it. Raises ConfigError, with what to do."""
    from arcbridge.audit.query import with_rotated

    config = load_settings(invocation, os.environ)
    if invocation.role == RELAY:
        from arcbridge.relay.audit.log import audit_file

        file = audit_file(config)
    else:
        file = config.audit.file
    if file in ("", "-"):
        raise ConfigError(f'audit.file is "{file}", so that no audit log can be read: {otherwise}')
    return with_rotated(Path(file))


_FIELDS = re.compile(r'^"|\s\S*?=')
"""What reads as a quoted text, or as a further field, where it stands behind `name=`."""
_WORDS = re.compile(r'^"|\s')
"""What reads as a quoted name, or as more than one word, where a name stands alone."""


def _line(fields: Mapping[str, object]) -> str:
    """Return one record for a person: when, who, what, how it ended, and all else by name.

    Of a relay's record the kind stands before the name (`os:root`), because a person's name may be that of a user of
    the machine. A text that a caller may have written to read as further fields is quoted (docs/threats.md#A52).
    """
    by = ("by", "actor") if "act" in fields else ("user",)  # an agent's actor is a program, and stands behind
    first = ("ts", *by, "act", "verb", "event", "stage", "outcome")
    names = [str(fields[one]) for one in by if fields.get(one)]
    who = ":".join(_quoted(name) if _WORDS.search(name) else name for name in names)
    what = fields.get("act") or fields.get("verb") or fields.get("event")
    words = [fields.get("ts"), who or "-", what, fields.get("outcome") or fields.get("stage") or ""]
    rest = {name: value for name, value in fields.items() if name not in (*first, "chain", "seq", "prev")}
    for part in ("arguments", "result"):
        inner = rest.pop(part, None)
        if isinstance(inner, dict):
            rest |= {(name if name not in rest else f"{part}.{name}"): value for name, value in inner.items()}
    words += [
        f"{name}={value if isinstance(value, str) and not _FIELDS.search(value) else _quoted(value)}"
        for name, value in rest.items()
    ]
    return " ".join(str(word) for word in words if word != "")


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def verify_logs(invocation: Invocation) -> int:
    """Print what is wrong with audit logs, wherever they are: it needs no role's settings."""
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
    lines.append(f"records: {report.records}, chains: {len(report.chains)}, files: {report.files}; {faults}")
    print_prose("\n".join(map(plain, lines)))
