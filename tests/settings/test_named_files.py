"""Files that settings name: what is wrong with each, and nothing made."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from arcbridge.pki.authority import Authority
from arcbridge.settings import named_files
from arcbridge.settings.problems import Problems
from tests.support.unprivileged import as_unprivileged_user, closed_directory


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority.load_or_create(tmp_path / "ca", "a CA", clock=lambda: time.time() - 200 * 86400)


def said(problems: Problems) -> list[str]:
    return [str(problem) for problem in problems]


def test_read(tmp_path: Path) -> None:
    problems = Problems()
    (tmp_path / "large").write_bytes(b"x" * (named_files.MOST + 1))
    assert named_files.read(problems, "a", tmp_path / "none") is None
    assert named_files.read(problems, "a", tmp_path) is None
    assert named_files.read(problems, "a", tmp_path / "large") is None
    assert said(problems) == [
        f"a: {tmp_path / 'none'} does not exist",
        f"a: {tmp_path} cannot be read: Is a directory",
        f"a: {tmp_path / 'large'} has more than 1048576 bytes",
    ]


def test_a_secret_that_comes_later(tmp_path: Path) -> None:
    problems, file = Problems(), tmp_path / "key"
    named_files.check_readable(problems, "a", file)
    file.write_text("of any form\nand length\n")
    file.chmod(0o604)
    named_files.check_readable(problems, "b", file)
    file.chmod(0o600)
    named_files.check_readable(problems, "c", file)
    assert problems.errors == []
    assert said(problems) == [
        f"a: {file} does not exist; it must be there when it is used",
        f"b: every user of this machine may read {file}: chmod o= {file}",
    ]


@pytest.mark.parametrize(("text", "good"), [("word\n", True), ("", False), ("two words", False), ("wört", False)])
def test_secrets(tmp_path: Path, text: str, good: bool) -> None:
    problems = Problems()
    file = tmp_path / "secret"
    file.write_text(text)
    file.chmod(0o600)
    assert (named_files.check_secret(problems, "a", file) is not None) == good
    assert bool(said(problems)) != good
    assert not any(text and text in one for one in said(problems))


def test_secrets_that_may_be_absent(tmp_path: Path) -> None:
    problems = Problems()
    named_files.check_secret(problems, "a", tmp_path / "none", missing="fine")
    assert said(problems) == []
    named_files.check_secret(problems, "a", tmp_path / "none", missing="warning")
    assert problems.errors == []
    named_files.check_secret(problems, "a", tmp_path / "none")
    assert len(problems.errors) == 1


@pytest.mark.parametrize(
    ("days", "words"),
    [
        (100, "has expired: peers refuse it"),
        (80, "expires in 10 days"),
        (89.5, "expires in 12.0 h: replace it now"),
        (-1, "is not valid yet"),
    ],
)
def test_certificates_that_end(tmp_path: Path, ca: Authority, days: float, words: str) -> None:
    file, key = tmp_path / "a.crt", tmp_path / "a.key"
    key_pem = (tmp_path / "ca" / "ca.key").read_text()
    issued = Authority.load(ca.certificate_pem, key_pem, clock=lambda: time.time() - days * 86400).issue_server(["r"])
    file.write_text(issued.certificate_pem)
    key.write_text(issued.key_pem)
    key.chmod(0o600)
    problems = Problems()
    named_files.check_pair(problems, ("a", file), ("b", key), host="r")
    assert bool(problems.errors) == (days == 100)
    (found,) = said(problems)
    assert words in found


def test_directories(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory, good in (
        (tmp_path, True),
        (tmp_path / "new" / "below", True),
        (tmp_path / "file", False),
        (tmp_path / "file" / "x", False),
        (Path("/proc/nope"), False),
        (Path("/sys/nope/below"), False),
    ):
        problems = Problems()
        named_files.check_directory(problems, "a", directory)
        assert bool(said(problems)) != good, directory
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_files_to_append_to(tmp_path: Path) -> None:
    for file, good in (
        (tmp_path / "new", True),
        (tmp_path, False),
        (tmp_path / "none" / "new", False),
        (Path("/proc/nope"), False),
    ):
        problems = Problems()
        named_files.check_appendable(problems, "a", file)
        assert bool(said(problems)) != good, file
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "ours"),
    [("relay.example.org", False), ("EXAMPLE.com.", False), ("relay.example", True), ("anexample.org", True)],
)
def test_placeholders(host: str, ours: bool) -> None:
    problems = Problems()
    named_files.check_not_placeholder(problems, "a", host)
    assert bool(said(problems)) != ours


@pytest.mark.parametrize(("text", "good"), [("id.secret", True), ("hidden", False), ("hidden.", False)])
def test_join_tokens(tmp_path: Path, text: str, good: bool) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(0o600)
    problems = Problems()
    named_files.check_join_token(problems, "a", file, missing="error")
    assert bool(said(problems)) != good
    assert not any("hidden" in one.replace(str(tmp_path), "") for one in said(problems))


def test_what_is_in_a_directory_that_may_not_be_searched_is_a_finding_and_no_traceback() -> None:
    """`Path.exists` and `is_dir` raise PermissionError there, until Python 3.14."""
    with closed_directory() as closed:
        file, deep = closed / "file", closed / "directory" / "deeper"
        file.write_text("secret")
        problems = Problems()
        with as_unprivileged_user(closed):
            assert named_files.is_there(file), "whether it is missing cannot be told"
            assert not named_files.is_directory(closed / "directory")
            named_files.check_readable(problems, "a", file)
            named_files.check_secret(problems, "b", file, missing="fine")
            named_files.check_join_token(problems, "c", file, missing="warning")
            named_files.check_ca(problems, "d", file)
            named_files.check_pair(problems, ("e", file), ("f", file))
            named_files.check_directory(problems, "g", deep)
            named_files.check_directory(problems, "h", closed)
            named_files.check_appendable(problems, "i", file)
            named_files.check_appendable(problems, "j", deep / "file")
        found = said(problems)
    assert [one.partition(":")[0] for one in found] == ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    for one in found:
        if not one.startswith("h:"):  # the directory itself can be looked at, and not be written
            assert f"this user may search nothing in {closed}: let it (chmod, chgrp), keep the file elsewhere" in one
    assert problems.warnings == []


def test_a_path_with_a_character_of_value_0_is_a_finding() -> None:
    problems = Problems()
    assert named_files.read(problems, "a", Path("/etc/a\0b")) is None
    assert not named_files.is_there(Path("/etc/a\0b"))
    named_files.check_directory(problems, "b", Path("/etc/a\0b"))
    assert said(problems)[0] == "a: '/etc/a\\x00b' is no path: it holds a character of value 0"
