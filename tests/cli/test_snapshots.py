"""All that people read of the commands, at three widths, is in files that people read (`snapshots/`).

`python -m tests.cli.test_snapshots` writes them anew: read the difference before it is committed. Each file has the
scenes of a group; what is the same at a wider terminal stands once, and the help of one command at the least width
alone. Colours are marked ‹31:…›, and differ in nothing else from the text without them.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.cli.commands import INTERNAL, commands_of
from arcbridge.cli.run import run
from arcbridge.cli.screen import cells
from arcbridge.cli.words import spelled
from arcbridge.settings.flags import ROLES
from tests.cli import scenes
from tests.cli.scenes import Scene

FILES = Path(__file__).with_name("snapshots")
WIDTHS = (80, 100, 160)
OVERVIEWS = r"help.*|(--role \w+ )?--help"
"""Titles of help that stands at each width. That of one command is wrapped by the same code."""
HOME = "/home/alice99"
GROUPS: dict[str, list[Scene]] = {**scenes.CLIENT, **scenes.ADMINISTRATORS}


class Stream(io.StringIO):
    """A terminal, for standard output and error alike."""

    encoding = "UTF-8"

    def isatty(self) -> bool:
        return True


def helps() -> Iterator[Scene]:
    """The help of every command, group and role, and of what they have in common."""
    seen = {"arcbridge": Scene("help"), "flags": Scene("help flags"), "codes": Scene("help exit-codes")}
    for role in ROLES:
        seen[f"{role} flags"] = Scene(f"help flags --role {role}")
        for path in [(), *(command.path[:n] for command in commands_of(role) for n in range(1, len(command.path) + 1))]:
            if path[:1] not in [(word,) for word in INTERNAL]:
                words = spelled(role, path).removeprefix("arcbridge")
                seen.setdefault(words, Scene(f"{words} --help".strip()))
    yield from seen.values()


def shown(scene: Scene, width: int, *, colour: bool) -> str:
    """What a command line prints on a terminal, in a new home whose path has the length of `HOME`."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="") as home:
        assert len(home) == len(HOME)
        text, code = printed(scene, width, Path(home), colour=colour)
        # A line that shows a wait may stand where a row is printed.
        return text.replace(home, HOME).replace("\r\x1b[K", "") + (f"[exit code {code}]\n" if code else "")


def printed(scene: Scene, width: int, directory: Path, *, colour: bool) -> tuple[str, int]:
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "NO_COLOR",
            "FORCE_COLOR",
            "CLICOLOR_FORCE",
            *(n for n in os.environ if n.startswith("ARCBRIDGE_")),
        ):
            patch.delenv(name, raising=False)
        for name, value in {"COLUMNS": str(width), "TERM": "xterm", "HOME": str(directory), "TZ": "UTC",
                            "KUBECONFIG": str(directory / "kubeconfig"), "XDG_RUNTIME_DIR": str(directory),
                            **({} if colour else {"NO_COLOR": "1"})}.items():  # fmt: skip
            patch.setenv(name, value)
        patch.chdir(directory)
        time.tzset()
        stream = Stream()
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        patch.setattr(time, "time", lambda: scenes.NOW)
        for one in scene.patches:
            one(patch)
        code = run(scene.words)
    time.tzset()
    return stream.getvalue(), int(code)


def marked(text: str) -> str:
    """Show colours as text."""
    return re.sub(r"\x1b\[(\d+)m(.*?)\x1b\[0m", r"‹\1:\2›", text)


def snapshot(group: list[Scene]) -> str:
    parts: list[str] = []
    for scene in group:
        texts = {}
        wide = "-o wide" in scene.title
        for width in WIDTHS:
            plain, coloured = (shown(scene, width, colour=colour) for colour in (False, True))
            assert re.sub(r"\x1b\[\d*m", "", coloured) == plain, f"{scene.title} at {width}"
            for line in plain.splitlines():
                word = len(line.split()) == 1 or line.startswith("  ")
                assert cells(line) <= width or wide or word, f"{scene.title} at {width}: {line}"
            texts[width] = marked(coloured)
        parts.append(f"=== {scene.title}\n{texts[WIDTHS[0]]}")
        if scene.title.endswith("--help") and not re.fullmatch(OVERVIEWS, scene.title):
            continue
        for width, narrower in zip(WIDTHS[1:], WIDTHS, strict=False):
            if texts[width] != texts[narrower]:
                parts.append(f"--- at {width} columns\n{texts[width]}")
    return "\n".join(parts)


ALL = {**GROUPS, "help": list(helps())}


@pytest.mark.parametrize("name", ALL)
def test_what_people_read_is_what_was_read(name: str) -> None:
    expected = (FILES / f"{name}.txt").read_text(encoding="utf-8")
    assert snapshot(ALL[name]) == expected, "read the difference after: python -m tests.cli.test_snapshots"


NO_SCENE = {
    "proxy": "it tells of a kubeconfig and a port, and ends by a signal (tests/e2e/test_kubectl.py)",
    "gateway": "one line, and it ends by a signal (tests/e2e/test_gateway.py)",
    "enroll": "one line of three words",
    "config print": "a settings file",
    "version": "one line",
    "key": "a table of three rows, as `whoami`",
}
"""Commands whose output is in no snapshot, and why."""


def test_each_command_has_a_scene() -> None:
    typed = {" ".join(scene.words) for group in GROUPS.values() for scene in group}
    commands = {" ".join(command.path) for role in ROLES for command in commands_of(role)}
    commands = {words for words in commands if words not in INTERNAL and not words.startswith("admin ")}
    bare = {line.removeprefix("--role relay ").removeprefix("--role client ").removeprefix("admin ") for line in typed}
    assert {words for words in commands if not any(line.startswith(words) for line in bare)} == set(NO_SCENE)


if __name__ == "__main__":
    FILES.mkdir(exist_ok=True)
    for name, group in ALL.items():
        (FILES / f"{name}.txt").write_text(snapshot(group), encoding="utf-8")
