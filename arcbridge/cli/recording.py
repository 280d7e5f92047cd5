"""`recording list`, `recording open` and `recording verify`: what was recorded, what is in it, and whether it is whole.

They need neither an agent nor its settings, but `list` without files reads the audit log that the settings name.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from arcbridge.cli.audit import own_files, parse_since
from arcbridge.cli.commands import DOCUMENTS
from arcbridge.cli.output import plain, print_document, print_note, print_prose, print_rows
from arcbridge.cli.parser import Invocation
from arcbridge.cli.screen import Column
from arcbridge.errors import ConfigError, ExitCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LONGEST_WAIT = 2.0
"""Seconds that a player waits between two events at most, whatever the recording says."""

_COLUMNS = (
    Column("time"),
    Column("user"),
    Column("pod"),
    Column("container", rank=3, wide=True),
    Column("command", rank=1),
    Column("seconds", rank=2),
    Column("exit", rank=2),
    Column("bytes", wide=True),
    Column("failure", wide=True),
    Column("file"),
)


def list_recordings(invocation: Invocation) -> int:
    """Print the recordings that audit logs name."""
    from arcbridge.agent.recording.opened import find_recordings

    since = invocation.text("since")
    files = [Path(name) for name in invocation.texts("file")] or own_files(invocation, "name an agent's log")
    found = find_recordings(files, invocation.text("user"), parse_since(since, time.time()) if since else "")
    rows = [{**row, "name": str(row["file"]).rpartition("/")[2]} for row in found]
    output = invocation.text("output", "table")
    print_rows([row for row in rows if row["name"] or output != "name"], _COLUMNS, output)
    return ExitCode.DONE


def open_recording(invocation: Invocation) -> int:
    """Play a recording on the terminal, or print it. Exit code 1: it broke off."""
    from arcbridge.agent.recording import opened
    from arcbridge.agent.recording.cast import CastReader

    identity = invocation.text("identity")
    if not identity:
        raise ConfigError("--identity is needed: a file with the private key (AGE-SECRET-KEY-…) of a recipient")
    path = Path(invocation.text("file"))
    portions = opened.open_recording(path, opened.read_identities(Path(identity)))
    reader = CastReader()
    try:
        if invocation.switch("cast"):
            for line in reader.lines(portions):
                sys.stdout.buffer.write(line)
        elif invocation.switch("text"):
            _print_text(reader.events(portions))
        else:
            _play(reader.events(portions))
        sys.stdout.flush()
    except ValueError as error:
        raise ConfigError(f"{path}: it is no recording: {error}") from error
    if not reader.ended:
        print_note(f"{path.name} broke off: what was recorded behind this is not in the file\n")
        return ExitCode.FAILURE
    return ExitCode.DONE


def _play(events: Iterable[tuple[float, str, bytes]]) -> None:
    for wait, code, data in events:
        if code == "o":
            time.sleep(min(wait, LONGEST_WAIT))
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif code == "m":
            print_note(plain(data.decode("utf-8", "replace")) + "\n")


def _print_text(events: Iterable[tuple[float, str, bytes]]) -> None:
    """Print what was shown as text of which nothing steers a terminal."""
    for line in _shown_lines(events):
        sys.stdout.write(plain(line) + "\n")


def _shown_lines(events: Iterable[tuple[float, str, bytes]]) -> Iterator[str]:
    import re

    # Control sequences of ECMA-48: CSI, the strings (OSC and others) with their ends, and what has two characters.
    steering = re.compile(r"\x1b(?:\[[0-?]*+[ -/]*+[@-~]|[\]PX^_][^\x07\x1b]*+(?:\x07|\x1b\\)?|[ -/]*+[0-~])")
    rest = ""
    for _, code, data in events:
        text = data.decode("utf-8", "replace")
        if code not in ("o", "m"):
            continue
        *lines, rest = (rest + (text if code == "o" else f"\n[{text}]\n")).split("\n")
        for line in lines:
            yield steering.sub("", line).rstrip("\r")
        while len(rest) > 65536:  # a line without an end
            yield steering.sub("", rest[:65536])
            rest = rest[65536:]
    if rest:
        yield steering.sub("", rest).rstrip("\r")


def verify_recordings(invocation: Invocation) -> int:
    """Print which files are not what the audit log says of them. Exit code 1: there are some."""
    from arcbridge.agent.recording.opened import compare, find_recordings, unfinished

    logs = [Path(name) for name in invocation.texts("audit")] or own_files(invocation, "name an agent's with --audit")
    paths = [Path(name) for name in invocation.texts("file")]
    good, found = compare(paths, find_recordings(logs))
    parts = unfinished(paths)
    output = invocation.text("output", "text")
    if output in DOCUMENTS:
        differences = [{"file": one.file, "kind": one.kind, "text": one.text} for one in found]
        print_document(
            {"ok": not found, "good": good, "unfinished": [*map(str, parts)], "differences": differences}, output
        )
    else:
        lines = [f"{one.file}: {one.kind}: {one.text}" for one in found]
        lines += [
            f"{part}: not checked: it is still written, or the next start of its agent finishes it" for part in parts
        ]
        lines.append(
            f"{good} as they were finished" + (f", {len(found)} found wrong" if found else ", nothing is wrong")
        )
        print_prose("\n".join(map(plain, lines)))
    return ExitCode.FAILURE if found else ExitCode.DONE
