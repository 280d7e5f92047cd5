"""Who has a port or a file, by real processes, and disks that take nothing more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from arcbridge.settings import surroundings as module
from arcbridge.settings.surroundings import LEAST, holders, is_full, listeners, named, runs_with

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LEFT OUT: reads /proc")

HOLDER = """
import socket, sys
file = open(sys.argv[1])
sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(file: Path, *words: str, **environment: str) -> Iterator[tuple[int, int]]:
    """A process that has a file open and listens: its number, and the port."""
    line = [sys.executable, "-c", HOLDER, str(file), *words]
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=file.parent, env={**os.environ, **environment}
    ) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.communicate()


def test_the_process_that_is_in_the_way_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with holder(file) as (process, port):
        assert listeners(port) == holders(file) == {process}
        assert named(listeners(port)) == f" by {Path(f'/proc/{process}/comm').read_text().strip()} (process {process})"
    assert listeners(port) == holders(file) == frozenset()
    assert named(frozenset()) == ""
    assert holders(tmp_path / "none") == frozenset()


def test_a_name_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "comm").write_bytes(b"a\xff\x1b[31m\n")
    monkeypatch.setattr(module, "_PROC", tmp_path)
    assert named(frozenset({7})) == " by a\ufffd?[31m (process 7)"


def test_other_descriptors_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One on a network disk whose server is gone would never answer."""
    (tmp_path / "lock").write_text("")
    (tmp_path / "link").symlink_to("lock")
    looked_at, stat = [], os.stat

    def asked(path: str, **words: bool) -> os.stat_result:
        if str(path).startswith("/proc/"):
            looked_at.append(os.readlink(path))
        return stat(path, **words)

    with holder(tmp_path / "lock") as (process, _):
        monkeypatch.setattr(os, "stat", asked)
        assert holders(tmp_path / "link") == {process}
    assert {os.path.basename(path) for path in looked_at} == {"lock"}


@pytest.mark.parametrize(
    ("words", "environment", "found"),
    [
        (("--config", "a.toml"), {}, "a.toml"),
        (("--config=/etc/a.toml",), {}, "/etc/a.toml"),
        ((), {"ARCBRIDGE_CONFIG": "b.toml"}, "b.toml"),
        (("arcbridge", "--role", "agent"), {}, "default.toml"),
        (("/opt/bin/arcbridge", "--role=agent"), {}, "default.toml"),
        (("arcbridge",), {"ARCBRIDGE_ROLE": "agent"}, "default.toml"),
        (("arcbridge", "--role", "relay"), {"ARCBRIDGE_ROLE": "agent"}, None),
        (("nginx", "--role", "agent"), {}, None),
        ((), {}, None),
    ],
)
def test_the_settings_of_a_process(
    tmp_path: Path, words: tuple[str, ...], environment: dict[str, str], found: str | None
) -> None:
    """The default file is that of arcbridge in its role, and of no program else that has a port. So are flags alone,
    where there is no such file."""
    (tmp_path / "file").write_text("")
    default = tmp_path / "default.toml"
    with holder(tmp_path / "file", *words, **environment) as (process, _):
        files = ("a.toml", "/etc/a.toml", "b.toml", "default.toml")
        fit = [file for file in files if runs_with(process, "agent", tmp_path / file, default)]
        assert fit == ([] if found is None else [found])
        assert runs_with(process, "agent", None, None) == (found == "default.toml")
        assert not runs_with(process, "agent", None, default)
        assert not runs_with(process, "agent", default, None)


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        ({}, ""),
        ({"f_flag": os.ST_RDONLY}, "is mounted read-only"),
        ({"f_bfree": LEAST // 4096 - 1, "f_bavail": 0}, "is full ("),
        ({"f_ffree": 0, "f_favail": 0}, "takes no more files"),
        ({"f_blocks": 0, "f_bfree": 0, "f_bavail": 0, "f_files": 0, "f_ffree": 0, "f_favail": 0}, ""),
    ],
)
def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: dict[str, int], words: str) -> None:
    """Also of a directory that is still to be made. Some file systems count neither blocks nor files."""
    whole = {"f_flag": 0, "f_frsize": 4096, "f_blocks": 1 << 20, "f_bfree": 1 << 19, "f_bavail": 1 << 19}
    whole |= {"f_files": 1000, "f_ffree": 10, "f_favail": 10}
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(**whole | disk))
    found = is_full(tmp_path / "new" / "below")
    assert words in found
    assert bool(found) == bool(words)
