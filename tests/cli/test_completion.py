"""The scripts are run, not read: each shell that is there says what it would offer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from arcbridge.cli.completion import script
from tests.support.processes import require_or_skip


def offered(line: str, home: Path) -> set[str]:
    words = line.split(" ")
    program = (
        f"{script('bash')}\n"
        f"COMP_WORDS=({' '.join(repr(word) for word in words)})\nCOMP_CWORD={len(words) - 1}\n_arcbridge\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(
        ["bash", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        cwd=home,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


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
def test_bash(line: str, expected: set[str], unexpected: set[str], tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        require_or_skip("shells", "bash is not on this machine")
    (tmp_path / ".cache/arcbridge").mkdir(parents=True)
    (tmp_path / ".cache/arcbridge/clusters").write_text("one\ntwo\n")
    (tmp_path / "a-file").write_text("")
    found = offered(line, tmp_path)
    assert expected <= found
    assert not unexpected & found


def test_b3_what_is_no_name_is_not_expanded(tmp_path: Path) -> None:
    """The names are a relay's word, kept by a version that did not check them: no shell may run what they say."""
    if shutil.which("bash") is None:
        require_or_skip("shells", "bash is not on this machine")
    (tmp_path / ".cache/arcbridge").mkdir(parents=True)
    lines = ("one", "$(touch${IFS}ran)", "`touch${IFS}ran`", "a;touch ran", "x $(touch ran)", "${HOME}")
    (tmp_path / ".cache/arcbridge/clusters").write_text("\n".join(lines) + "\n")
    assert offered("arcbridge -n ", tmp_path) == {"one"}
    assert not (tmp_path / "ran").exists()


OTHERS = [
    ("arcbridge ", {"proxy", "clusters"}, {"revoke"}),
    ("arcbridge token ", {"create", "list", "delete"}, {"revoke"}),
    ("arcbridge --role ", {"relay", "agent", "client"}, {"proxy"}),
    ("arcbridge completion ", {"bash", "zsh", "fish"}, set()),
    ("arcbridge -n ", {"one", "two"}, {"proxy"}),
]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize(("line", "expected", "unexpected"), OTHERS)
def test_the_others(shell: str, line: str, expected: set[str], unexpected: set[str], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        require_or_skip("shells", f"{shell} is not on this machine")
    (tmp_path / ".cache/arcbridge").mkdir(parents=True)
    (tmp_path / ".cache/arcbridge/clusters").write_text("one\ntwo\n")
    (tmp_path / "script").write_text(script(shell))
    words = line.split(" ")
    if shell == "zsh":
        program = (
            "compdef() { }\ncompadd() { shift; print -l -- $@ }\n"
            f"source {tmp_path}/script\nwords=({' '.join(repr(word) for word in words)})\n"
            f"CURRENT={len(words)}\n_arcbridge\n"
        )
        command = ["zsh", "-f", "-c", program]
    else:
        command = ["fish", "--no-config", "-c", f"source {tmp_path}/script; complete -C {line!r}"]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, env=environment)
    assert done.stderr == ""
    found = {offer.split("\t")[0] for offer in done.stdout.splitlines()}
    assert expected <= found
    assert not unexpected & found


def test_fish_knows_every_role() -> None:
    text = script("fish")
    for word in ("proxy", "enroll", "token", "revoke", "-l trust-first-use"):
        assert word in text


@pytest.mark.parametrize("cache", [".cache", "elsewhere"])
def test_fish_finds_the_cluster_names_where_they_are_kept(cache: str, tmp_path: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("no fish")
    (tmp_path / cache / "arcbridge").mkdir(parents=True)
    (tmp_path / cache / "arcbridge/clusters").write_text("one\n")
    (tmp_path / "script").write_text(script("fish"))
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    if cache != ".cache":
        environment["XDG_CACHE_HOME"] = str(tmp_path / cache)
    command = ["fish", "--no-config", "-c", f"source {tmp_path}/script; complete -C 'arcbridge -n '"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, env=environment)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["one"]
