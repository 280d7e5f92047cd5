"""A page whose `console` blocks are commands and what they print: played, and written anew with what was seen.

A command begins with `$ `, and a line of it that goes on with `> `. What differs from run to run is masked in both.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.readme.blocks import Block, blocks
from tests.readme.machines import Machines

_MASKS = (
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"sha256:[0-9a-f]{64}"), "sha256:…"),
    (re.compile(r"(?<=\d)\+[0-9a-f]{8}\b"), "+BUILD"),
    (re.compile(r"\(commit [0-9a-f]{12}, \d{4}-\d\d-\d\d\)"), "(commit COMMIT)"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"), "TIME"),
    (re.compile(r"\b\d{4}-\d\d-\d\d \d\d:\d\d\b"), "TIME"),
    (re.compile(r"\b\d+ (s|min|h) ago\b"), "AGE ago"),
    (re.compile(r"(?<= )(\d+[smhd])+$"), "AGE"),
    (re.compile(r"\b(\d+ (?:s|min|minutes?|h|hours?|seconds?))\b"), "DURATION"),
    (re.compile(r"https://127\.[\d.]+:\d+"), "https://ADDRESS"),
    (re.compile(r"\b127\.[\d.]+:\d+"), "ADDRESS"),
    (re.compile(r"\bport \d+"), "port PORT"),
    (re.compile(r"\b[A-Z]{4}-[A-Z]{4}\b"), "CODE"),
    (re.compile(r"\bsale \d+"), "sale NUMBER"),
    (re.compile(r" {2,}"), "  "),
)
_NAMED = re.compile(r"https://(?:login|relay)\.example\.com")
LAST = "A mistake"
"""The section before which a recording ends."""
_LOG_LINE = re.compile(r"^TIME:\d\d\.\d{3}Z |^\{\"timestamp\"")


def masked(line: str, directory: Path) -> str:
    """Return a line of output without what differs from run to run."""
    line = line.rpartition("\x1b[K")[2].replace(str(directory), "~")  # before it stands what a terminal has erased
    for pattern, stands in _MASKS:
        line = pattern.sub(stands, line)
    return line.rstrip()


def play(page: Path, machines: Machines) -> str:
    """Run the commands of a page and return the page with what they printed. Log lines are left out.

    A recording of the machines ends before the section `LAST`.
    """
    text = before = page.read_text(encoding="utf-8")
    recording, section = machines.recording, ""
    for block in blocks(page):
        last, section = section, section_of(before, block)
        if recording is not None and section != last:
            if section == LAST:
                recording = machines.recording = None
            else:
                recording.begin_section(section)
        shown: list[str] = []
        for command in commands(block.text):
            if recording is not None:
                recording.type_command(command, elsewhere=block.stays)
            process = machines.run_command(block, "\n".join(line[2:] for line in command))
            if recording is not None:
                recording.end_command()
            lines = (masked(line, machines.at(block.machine)) for line in process.lines())
            shown += [*command, *(line for line in lines if is_output(line))]
            if process.returncode:
                shown.append(f"(exit status {process.returncode})")
        text = text.replace(f"```console\n{block.text}\n```", "```console\n" + "\n".join(shown) + "\n```", 1)
    return text


def section_of(text: str, block: Block) -> str:
    """Return the heading under which a block stands."""
    return next(line[3:] for line in reversed(text.splitlines()[: block.line]) if line.startswith("## "))


def recorded(page: Path) -> list[str]:
    """Return the lines of a page's commands and output that its recording has, with names in place of addresses."""
    text, lines = page.read_text(encoding="utf-8"), []
    for block in blocks(page):
        if section_of(text, block) == LAST:
            break
        lines += block.text.splitlines()
    return [unnamed(line) for line in lines if not line.startswith("(exit status ")]


def unnamed(line: str) -> str:
    """Return a masked line with names that a recording has in place of addresses masked, too."""
    return _NAMED.sub("https://ADDRESS", line)


def is_output(line: str) -> bool:
    """Return whether a page has a masked line that was seen."""
    return line != "" and not _LOG_LINE.match(line)


def commands(text: str) -> list[list[str]]:
    """Return the commands of a block, each with the lines that go on with it."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append([line])
        elif line.startswith("> ") and found:
            found[-1].append(line)
    return found
