"""The scripts are run, not read: each shell that is there says what it would offer."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_powershell

from arcbridge.cli.commands import INTERNAL, SHELLS
from arcbridge.cli.completion import SCRIPTS, complete
from arcbridge.cli.parser import parse
from tests.support.processes import require_or_skip


def need(shell: str) -> None:
    if shutil.which(shell) is None:
        require_or_skip("shells", f"{shell} is not on this machine")


def bash(line: str, home: Path) -> set[str]:
    """What the function of the script leaves, called as the line editor calls it."""
    words = line.split(" ")
    asking = (
        f"COMP_WORDS=({' '.join(repr(word) for word in words)})\nCOMP_CWORD={len(words) - 1}\n_arcbridge\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    return told(["bash", "-c", f"source {home}/script\n{asking}"], home)


def fish(line: str, home: Path) -> set[str]:
    return told(["fish", "--no-config", "-c", f"source {home}/script; complete -C {line!r}"], home)


def told(command: list[str], home: Path) -> set[str]:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin"},
        cwd=home,
    )
    assert done.stderr == ""
    return set(done.stdout.splitlines())


def zsh(line: str, home: Path) -> set[str]:
    """What the real line editor lists below the line, each offer with its text."""
    (home / ".zshrc").write_text(
        "autoload -U compinit && compinit -D\nsource ~/script\nPS1='READY>'\nbindkey '^I' list-choices\nLISTMAX=0\n"
        "zle-line-init() { print -n BEGUN }\nzle -N zle-line-init\n"
    )
    # The first line is what was typed, the last one what is drawn anew behind the list.
    return set(typed(f"{line}\t", home).splitlines()[1:-1])


def typed(keys: str, home: Path, *shell: str) -> str:
    """What a shell (zsh) prints behind its prompt when keys are typed, until it has nothing more to do."""
    environment = {"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin", "TERM": "xterm"}
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 400, 200, 0, 0))
    with os.fdopen(terminal, "r+b", buffering=0) as screen, os.fdopen(end, "wb") as own:
        process = subprocess.Popen(
            shell or ["zsh", "-d", "-i"],
            stdin=own,
            stdout=own,
            stderr=own,
            env=environment,
            cwd=home,
            start_new_session=True,
        )
        try:
            read_until(screen, b"BEGUN")
            screen.write(keys.encode())
            # What is typed behind the TAB is echoed when the list is there.
            screen.write(b"#THE-END")
            text = read_until(screen, b"#THE-END")
        finally:
            process.kill()
            process.wait()
    text = re.sub(rb"\x1b\[\d*A", b"\n", text)  # back from the list to the line
    return re.sub(r"\x1b[=>]|\x1b\[[?0-9;]*[A-Za-z]|\r|READY>|BEGUN", "", text.decode())


def read_until(screen: object, mark: bytes) -> bytes:
    said = b""
    while mark not in said:
        assert select.select([screen], [], [], 60)[0], said
        said += screen.read(4096)
    return said


ASK = {"bash": bash, "zsh": zsh, "fish": fish}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".cache/arcbridge").mkdir(parents=True)
    (tmp_path / ".cache/arcbridge/clusters").write_text("one\ntwo\n")
    (tmp_path / "a-file").write_text("")
    (tmp_path / "bin").mkdir()
    for name, does in (("kubexample", ""), ("arcbridge", f'exec {sys.executable} -m arcbridge "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def offered(shell: str, line: str, home: Path) -> set[str]:
    need(shell)
    (home / "script").write_text(SCRIPTS[shell])
    rows = [re.split(r"\t| +-- ", row)[0] for row in ASK[shell](line, home)]
    # In zsh names of one text share a row.
    return {word for row in rows for word in (row.split() if shell == "zsh" else [row])}


CASES = [
    ("arcbridge --role relay ", {"token", "cluster", "user", "run"}, {"proxy", "--policy"}),
    ("arcbridge --role relay --p", {"--policy", "--public-address"}, {"--kube-context"}),
    ("arcbridge user ", {"revoke", "restore", "list"}, {"create"}),
    ("arcbridge user revoke --", {"--before", "--reason"}, {"--uses"}),
    ("arcbridge --role ", {"relay", "agent", "client"}, {"proxy"}),
    ("arcbridge --role client con", {"connect", "config"}, {"clusters"}),
    ("arcbridge admin token ", {"create", "list", "delete"}, {"revoke", "one"}),
    ("arcbridge completion ", set(SHELLS), {"one"}),
    ("arcbridge clusters -o ", {"table", "wide", "json", "yaml", "name"}, {"--cluster", "toml", "text"}),
    ("arcbridge status --output ", {"table", "wide", "json", "yaml", "name"}, {"toml", "text"}),
    ("arcbridge doctor -o ", {"table", "json", "yaml"}, {"wide", "name", "toml", "one"}),
    ("arcbridge --role relay config print -o ", {"toml", "json", "yaml"}, {"table", "name"}),
    ("arcbridge admin token list -o ", {"table", "name"}, {"toml", "text"}),
    ("arcbridge logs -f ", set(), {"a-file", "proxy"}),
    ("arcbridge logs -f -", {"--follow", "--config"}, {"a-file"}),
    ("arcbridge connect ", {"one", "two"}, {"proxy", "a-file"}),
    ("arcbridge -v disconnect ", {"one", "two"}, {"--all"}),
    ("arcbridge doctor o", {"one"}, {"two"}),
    ("arcbridge connect --", {"--static", "--port"}, {"one", "--all", "--throughput"}),
    ("arcbridge logs -", {"--follow", "-f"}, {"--data-dir", "--output"}),
    ("arcbridge help con", {"connect", "config"}, {"one"}),
    ("arcbridge help ", {"flags", "exit-codes", "connect"}, {"one"}),
    ("arcbridge help token ", {"create", "list"}, {"flags", "one"}),
    ("arcbridge help connect ", set(), {"flags", "exit-codes", "one", "connect"}),
]
SHELL_CASES = [
    ("arcbridge ", {"proxy", "clusters", "connect", "help"}, {"token", "--cluster", "--role", *INTERNAL}),
    ("arcbridge -", {"--cluster", "--role", "-n", "--help"}, {"proxy", "--join-token-file", "--static"}),
    ("arcbridge --role=agent ", {"enroll", "run"}, {"proxy", "--state-dir"}),
    ("arcbridge forward -n ", set(), {"one", "two", "a-file"}),
    ("arcbridge --port ", set(), {"proxy", "one"}),
    ("arcbridge -n ", {"one", "two"}, {"proxy"}),
    ("arcbridge connect one t", {"two"}, {"one"}),
    ("arcbridge --config ", {"a-file"}, {"proxy"}),
    ("arcbridge audit show ", {"a-file"}, {"proxy"}),
    ("arcbridge --role relay doctor -- ", set(), {"kubexample", "while", "a-file"}),
    ("arcbridge run -n one -- kubex", {"kubexample"}, {"--parallel", "proxy"}),
    ("arcbridge run -n one -- kubexample a-f", {"a-file"}, {"proxy"}),
]
"""What depends on how a shell reads the line, and what the shell completes itself."""


@pytest.mark.parametrize(("line", "expected", "unexpected"), CASES)
def test_offers(
    line: str,
    expected: set[str],
    unexpected: set[str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    *words, current = line.split(" ")[1:]
    command_line = ["--role", "client", "complete", "bash", "--", *words, f"={current}"]
    assert complete(parse(command_line, "client")) == 0
    found = {"a-file" if offer == ":files" else offer for offer in capsys.readouterr().out.splitlines()}
    assert expected <= found
    assert not unexpected & found


@pytest.mark.parametrize("shell", ASK)
@pytest.mark.parametrize(("line", "expected", "unexpected"), SHELL_CASES)
def test_offers_of_a_shell(shell: str, line: str, expected: set[str], unexpected: set[str], home: Path) -> None:
    found = offered(shell, line, home)
    assert expected <= found
    assert not unexpected & found


@pytest.mark.parametrize("line", ["arcbridge -n ", "arcbridge disconnect "])
@pytest.mark.parametrize("shell", ASK)
def test_b3_what_is_no_name_is_not_expanded(shell: str, line: str, home: Path) -> None:
    """The names are a relay's word, kept by a version that did not check them: no shell may run what they say."""
    lines = ("one", "$(touch${IFS}ran)", "`touch${IFS}ran`", "a;touch ran", "x $(touch ran)", "${HOME}", "two")
    (home / ".cache/arcbridge/clusters").write_text("\n".join(lines) + "\n")
    assert {offer for offer in offered(shell, line, home) if offer != "cluster"} == {"one", "two"}
    assert not (home / "ran").exists()


@pytest.mark.parametrize("shell", ASK)
@pytest.mark.parametrize(
    ("word", "asked"), [("elsewhere/arcbridge", "other"), ("missing/arcbridge", "of-path"), ("arcbridge", "of-path")]
)
def test_the_program_that_is_typed_is_asked(shell: str, word: str, asked: str, home: Path) -> None:
    (home / "elsewhere").mkdir()
    for path, answer in (("elsewhere/arcbridge", "other"), ("bin/arcbridge", "of-path")):
        (home / path).write_text(f"#!/bin/sh\necho {answer}\n")
        (home / path).chmod(0o755)
    assert offered(shell, f"{word} ", home) == {asked}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_descriptions(shell: str, home: Path) -> None:
    need(shell)
    (home / "script").write_text(SCRIPTS[shell])
    text = "list the clusters you may reach"
    assert any(re.fullmatch(rf"clusters\s+(-- )?{text}", row) for row in ASK[shell]("arcbridge ", home))
    assert any(re.match(r"--config\s+(-- )?settings file", row) for row in ASK[shell]("arcbridge --co", home))


def test_what_powershell_shows(home: Path) -> None:
    """A word and its text on each line; with `=` before the word at the cursor none of its arguments is empty."""
    asking = [f"{home}/bin/arcbridge", "--role", "client", "complete", "powershell", "--"]
    assert told([*asking, "connect", "one", "=t"], home) == {"two\tcluster"}
    assert "clusters\tlist the clusters you may reach" in told([*asking, "="], home)
    assert told([*asking, "clusters", "-o", "=j"], home) == {"json\tjson"}
    assert told([*asking, "--config", "="], home) == {":files"}
    assert told([*asking, "run", "-n", "one", "--", "=k"], home) == {":command 5"}


def test_powershell_s_script_is_powershell() -> None:
    """As a parser of the language says: NuGet's PowerShell, which could run it, needs a .NET that CI has not."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
    assert not parser.parse(SCRIPTS["powershell"].encode()).root_node.has_error
    assert parser.parse(SCRIPTS["powershell"].replace("if (", "if ", 1).encode()).root_node.has_error


def test_the_file_of_cluster_names_is_found_where_the_variable_says(home: Path) -> None:
    need("fish")
    (home / "elsewhere/arcbridge").mkdir(parents=True)
    (home / "elsewhere/arcbridge/clusters").write_text("other\n")
    (home / "script").write_text(f"set -gx XDG_CACHE_HOME {home}/elsewhere\n{SCRIPTS['fish']}")
    assert {offer.split("\t")[0] for offer in fish("arcbridge -n ", home)} == {"other"}


@pytest.mark.parametrize(
    ("typing", "expected"), [("a-f", "a-file"), ("two", "two words/one file"), ("~/a-f", "{home}/a-file")]
)
def test_zsh_completes_files_as_it_does_for_others(typing: str, expected: str, home: Path) -> None:
    """The real line editor gets TABs, and the program that then runs says what they made of the line."""
    need("zsh")
    (home / "two words").mkdir()
    (home / "two words/one file").write_text("")
    (home / "script").write_text(SCRIPTS["zsh"])
    (home / ".zshrc").write_text(
        "autoload -U compinit && compinit -D\nsource ~/script\nPS1='READY>'\n"
        "zle-line-init() { print -n BEGUN }\nzle -N zle-line-init\n"
        'arcbridge() { print -rn -- "$2" > ~/given; print "#THE-""END" }\n'
    )
    typed(f"arcbridge --config {typing}\t\t\r", home)
    assert (home / "given").read_text() == expected.format(home=home)


@pytest.mark.parametrize(
    ("typing", "expected"),
    [
        ("--role=relay tok", "--role=relay token"),
        ("--role=rel", "--role=relay"),
        ("--color=al", "--color=always"),
        ("--role=relay --color=ne", "--role=relay --color=never"),
        ("--cluster=tw", "--cluster=two"),
        ("-v connect tw", "-v connect two"),
        ("--config=a-f", "--config=a-file"),
    ],
)
def test_bash_s_line_editor_makes_three_words_of_a_flag_with_its_value(typing: str, expected: str, home: Path) -> None:
    need("bash")
    (home / "script").write_text(SCRIPTS["bash"])
    (home / ".bashrc").write_text(
        "source ~/script\nPS1='BEGUN'\nbind 'set enable-bracketed-paste off'\n"
        """arcbridge() { printf '%s' "$*" > ~/given; echo "#THE-""END"; }\n"""
    )
    typed(f"arcbridge {typing}\t\r", home, "bash", "--noprofile", "--rcfile", str(home / ".bashrc"), "-i")
    assert (home / "given").read_text() == expected
