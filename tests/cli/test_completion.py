"""The scripts are run, not read: each shell that is there says what it would offer."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from arcbridge.cli.completion import script
from tests.support.processes import require_or_skip


def offered(shell: str, line: str, home: Path, **environment: str) -> set[str]:
    if shutil.which(shell) is None:
        require_or_skip("shells", f"{shell} is not on this machine")
    (home / "script").write_text(script(shell))
    words = line.split(" ")
    asking = (
        f"COMP_WORDS=({' '.join(repr(word) for word in words)})\nCOMP_CWORD={len(words) - 1}\n_arcbridge\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    commands = {
        "bash": ["bash", "-c", f"source {home}/script\n{asking}"],
        # As bash's completion is emulated there.
        "zsh": ["zsh", "-f", "-c", f"autoload -U compinit && compinit -D\nsource {home}/script\n"
                f"ask() {{ emulate -L sh; setopt kshglob noshglob braceexpand ksharrays\n{asking}}}\nask"],
        "fish": ["fish", "--no-config", "-c", f"source {home}/script; complete -C {line!r}"],
    }  # fmt: skip
    done = subprocess.run(
        commands[shell],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", **environment},
        cwd=home,
    )
    assert done.stderr == ""
    return {offer.split("\t")[0] for offer in done.stdout.splitlines()}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".cache/arcbridge").mkdir(parents=True)
    (tmp_path / ".cache/arcbridge/clusters").write_text("one\ntwo\n")
    (tmp_path / "a-file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected", "unexpected"),
    [
        ("arcbridge ", {"proxy", "clusters", "--cluster", "--role"}, {"token", "--join-token-file"}),
        ("arcbridge --role relay ", {"token", "cluster", "user", "run", "--policy"}, {"proxy", "--kube-context"}),
        ("arcbridge --role relay user ", {"revoke", "restore", "list"}, {"create"}),
        ("arcbridge user revoke --", {"--before", "--reason"}, {"--uses"}),
        ("arcbridge --role relay token ", {"create", "list", "delete"}, {"revoke"}),
        ("arcbridge token ", {"create", "list", "delete"}, {"revoke"}),
        ("arcbridge token create --", {"--uses", "--ttl", "--rebind"}, {"--trust-first-use"}),
        ("arcbridge --role=agent ", {"enroll", "run", "--state-dir"}, {"proxy"}),
        ("arcbridge --role ", {"relay", "agent", "client"}, {"proxy"}),
        ("arcbridge completion ", {"bash", "zsh", "fish"}, set()),
        ("arcbridge clusters -o ", {"table", "json", "yaml", "name"}, {"--cluster"}),
        ("arcbridge --port ", set(), {"proxy"}),
        ("arcbridge pro", {"proxy"}, {"clusters"}),
        ("arcbridge -n ", {"one", "two"}, {"proxy"}),
        ("arcbridge --config ", {"a-file"}, {"proxy"}),
    ],
)
def test_bash(line: str, expected: set[str], unexpected: set[str], home: Path) -> None:
    found = offered("bash", line, home)
    assert expected <= found
    assert not unexpected & found


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_b3_what_is_no_name_is_not_expanded(shell: str, home: Path) -> None:
    """The names are a relay's word, kept by a version that did not check them: no shell may run what they say."""
    lines = ("one", "$(touch${IFS}ran)", "`touch${IFS}ran`", "a;touch ran", "x $(touch ran)", "${HOME}")
    (home / ".cache/arcbridge/clusters").write_text("\n".join(lines) + "\n")
    assert offered(shell, "arcbridge -n ", home) == {"one"}
    assert not (home / "ran").exists()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "expected", "unexpected"),
    [
        ("arcbridge ", {"proxy", "clusters"}, {"revoke"}),
        ("arcbridge token ", {"create", "list", "delete"}, {"revoke"}),
        ("arcbridge --role ", {"relay", "agent", "client"}, {"proxy"}),
        ("arcbridge completion ", {"bash", "zsh", "fish"}, set()),
        ("arcbridge -n ", {"one", "two"}, {"proxy"}),
    ],
)
def test_the_others(shell: str, line: str, expected: set[str], unexpected: set[str], home: Path) -> None:
    found = offered(shell, line, home)
    assert expected <= found
    assert not unexpected & found


def test_fish_knows_every_role() -> None:
    text = script("fish")
    for word in ("proxy", "enroll", "token", "revoke", "-l trust-first-use"):
        assert word in text


def test_fish_finds_the_cluster_names_where_they_are_kept(home: Path) -> None:
    (home / "elsewhere/arcbridge").mkdir(parents=True)
    (home / "elsewhere/arcbridge/clusters").write_text("other\n")
    assert offered("fish", "arcbridge -n ", home, XDG_CACHE_HOME=str(home / "elsewhere")) == {"other"}


@pytest.mark.parametrize(
    ("typed", "expected"), [("a-f", "a-file"), ("two", "two words/one file"), ("~/a-f", "{home}/a-file")]
)
def test_zsh_completes_files_as_it_does_for_others(typed: str, expected: str, home: Path) -> None:
    """The real line editor gets TABs, and the program that then runs says what they made of the line."""
    if shutil.which("zsh") is None:
        require_or_skip("shells", "zsh is not on this machine")
    (home / "two words").mkdir()
    (home / "two words/one file").write_text("")
    (home / "script").write_text(script("zsh"))
    (home / ".zshrc").write_text(
        "autoload -U compinit && compinit -D\nsource ~/script\nPS1='READY>'\n"
        'arcbridge() { print -rn -- "$2" > ~/given; exit }\n'
    )
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "TERM": "dumb"}
    terminal, end = pty.openpty()
    with os.fdopen(terminal, "r+b", buffering=0) as screen, os.fdopen(end, "wb") as own:
        zsh = subprocess.Popen(["zsh", "-d", "-i"], stdin=own, stdout=own, stderr=own, env=environment, cwd=home)
        try:
            said = b""
            while b"READY>" not in said:
                said += screen.read(1024)
            screen.write(f"arcbridge --config {typed}\t\t\r".encode())
            zsh.wait(60)
        finally:
            zsh.kill()
            zsh.wait()
    assert (home / "given").read_text() == expected.format(home=home)
