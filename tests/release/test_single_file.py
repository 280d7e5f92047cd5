"""The single-file client as its user has it: one file, an empty directory, an empty environment, no Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from arcbridge import __version__
from release import single_file
from tests.support.processes import require_or_skip

# The release is built first.
pytestmark = pytest.mark.timeout(600)

TOOLS = ("chmod", "find", "gzip", "id", "ls", "mkdir", "mv", "rm", "tail", "tar")
"""What the script runs besides the shell's own words."""


@pytest.fixture
def client(dist: Path, tmp_path: Path) -> Path:
    """The client, alone in a directory."""
    (tmp_path / "empty").mkdir()
    return Path(shutil.copy(dist / f"arcbridge-{single_file.platform_name()}", tmp_path / "empty" / "arcbridge"))


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory with the tools that the script needs, and no Python."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in TOOLS:
        path = shutil.which(name)
        assert path is not None
        (directory / name).symlink_to(path)
    return directory


def run(client: Path, *arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the client with this environment and nothing else."""
    return subprocess.run(
        [client, *arguments], env=dict(env), cwd=client.parent, capture_output=True, text=True, check=False, timeout=60
    )


def unpacked(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_it_runs_without_anything(client: Path, tools: Path, tmp_path: Path) -> None:
    """The second start needs no tool any more."""
    done = run(client, "--version", env={"HOME": str(tmp_path), "PATH": str(tools)})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"arcbridge {__version__}\n", "")
    place = tmp_path / ".cache" / "arcbridge" / "program"
    assert len(unpacked(place)) == 1
    assert place.stat().st_mode & 0o777 == 0o700
    assert list(place.glob("*/_internal/aiofastnet/ssl_engine.*")), "compiled modules import each other unseen"
    done = run(client, "--version", env={"HOME": str(tmp_path), "PATH": "/nonexistent"})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"arcbridge {__version__}\n", "")


def test_a_directory_of_another_user_is_not_used(client: Path, tmp_path: Path) -> None:
    """What lies there would be run as this user."""
    if os.geteuid():
        require_or_skip("uid", "giving a directory to another user needs root")
    first = run(client, "--version", env={"HOME": str(tmp_path / "own")})
    assert first.returncode == 0
    (name,) = unpacked(tmp_path / "own" / ".cache" / "arcbridge" / "program")
    planted = tmp_path / "planted" / ".cache" / "arcbridge" / "program"
    (planted / name).mkdir(parents=True)
    (planted / name / "arcbridge").write_text("#!/bin/sh\necho planted\n")
    (planted / name / "arcbridge").chmod(0o755)
    os.chown(planted, 1, 1)
    done = run(client, "--version", env={"HOME": str(tmp_path / "planted"), "TMPDIR": str(tmp_path / "own")})
    assert done.stdout == f"arcbridge {__version__}\n", done.stderr
    os.chown(planted, 0, 0)
    link = tmp_path / "linked" / ".cache" / "arcbridge"
    link.mkdir(parents=True)
    (link / "program").symlink_to(planted)
    done = run(client, "--version", env={"HOME": str(tmp_path / "linked"), "TMPDIR": str(tmp_path / "own")})
    assert done.stdout == f"arcbridge {__version__}\n", done.stderr


def test_the_directory_that_is_named_is_the_only_one(client: Path, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "ARCBRIDGE_UNPACK_DIR": str(tmp_path / "named")}
    assert run(client, "--version", env=env).returncode == 0
    assert len(unpacked(tmp_path / "named")) == 1
    assert not (tmp_path / ".cache").exists()
    (tmp_path / "file").touch()
    done = run(client, "--version", env={**env, "ARCBRIDGE_UNPACK_DIR": str(tmp_path / "file")})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot unpack into {tmp_path / 'file'}: set ARCBRIDGE_UNPACK_DIR to a directory")


def test_twenty_first_starts_at_once_are_one_directory(client: Path, tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [client, "--version"],
            env={"HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(20)
    ]
    answers = {process.communicate(timeout=120) for process in started}
    assert answers == {(f"arcbridge {__version__}\n", "")}
    place = tmp_path / ".cache" / "arcbridge" / "program"
    (name,) = unpacked(place)
    assert not [path for path in (place / name).iterdir() if path.name.startswith(".new")]


def test_a_file_that_is_not_whole_says_so(client: Path, tmp_path: Path) -> None:
    with client.open("r+b") as file:
        file.truncate(client.stat().st_size - 1000)
    done = run(client, "--version", env={"HOME": str(tmp_path)})
    assert done.returncode == 1
    assert f"error: {client} is damaged" in done.stderr
    assert unpacked(tmp_path / ".cache" / "arcbridge" / "program") == []


def test_the_version_before_stays_and_older_ones_go(client: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    for age, name in enumerate(("arcbridge-0.0.3-aa", "arcbridge-0.0.2-bb", "arcbridge-0.0.1-cc")):
        (place / name).mkdir(parents=True)
        (place / name / "arcbridge").touch(mode=0o755)
        os.utime(place / name, (1_700_000_000 - age, 1_700_000_000 - age))
    place.chmod(0o700)
    done = run(client, "--version", env={"ARCBRIDGE_UNPACK_DIR": str(place)})
    assert done.returncode == 0, done.stderr
    assert len(unpacked(place)) == 2
    assert "arcbridge-0.0.3-aa" in unpacked(place)


def test_it_is_the_client_alone(client: Path, tmp_path: Path) -> None:
    done = run(client, "--role", "relay", "--config", "relay.toml", env={"HOME": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith("error: this file is the client alone: for --role relay install the package")


def test_a_link_named_kubectl_arcbridge_is_a_plugin(client: Path, tmp_path: Path) -> None:
    plugin = client.with_name("kubectl-arcbridge")
    plugin.symlink_to(client)
    done = run(plugin, "clusters", env={"HOME": str(tmp_path)})
    assert done.returncode == 3
    assert "run `arcbridge login https://RELAY`" in done.stderr


def test_what_it_starts_has_the_environment_of_its_caller(client: Path, tmp_path: Path) -> None:
    """The loader's variables would give another program our libraries."""
    command = tmp_path / "command"
    command.write_text(f'#!/bin/sh\nenv > "{tmp_path}/seen"\n')
    command.chmod(0o755)
    settings = tmp_path / "client.toml"
    settings.write_text(f'relay = "https://127.0.0.1:9"\n[login]\ncommand = ["{command}"]\n')
    env = {"HOME": str(tmp_path), "LD_LIBRARY_PATH": "/of/the/caller", "PATH": os.environ["PATH"]}
    run(client, "--role", "client", "--config", str(settings), "clusters", env=env)
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert seen["LD_LIBRARY_PATH"] == "/of/the/caller"
    assert not [name for name in seen if name.startswith(("_PYI", "_ARCBRIDGE", "LD_LIBRARY_PATH_ORIG"))]
    del env["LD_LIBRARY_PATH"]
    run(client, "--role", "client", "--config", str(settings), "clusters", env=env)
    assert "LD_LIBRARY_PATH" not in (tmp_path / "seen").read_text()


def test_what_is_packed_depends_on_names_and_bytes_alone(tmp_path: Path) -> None:
    head = tmp_path / "head.sh"
    head.write_text("#!/bin/sh\n# @VERSION@ @PLATFORM@ @DIGEST@ @OFFSET@\nexit 0\n")
    made = []
    for mask, names in ((0o077, ("b", "a")), (0o022, ("a", "b"))):
        directory = tmp_path / f"gathered-{mask}"
        before = os.umask(mask)
        try:
            (directory / "sub").mkdir(parents=True)
            for name in names:
                (directory / "sub" / name).write_text(name)
        finally:
            os.umask(before)
        made.append(single_file.pack(directory, head, tmp_path / f"out-{mask}", "1.2.3", 1_700_000_000).read_bytes())
    assert made[0] == made[1]
    assert made[0].startswith(f"#!/bin/sh\n# 1.2.3 {sys.platform}-".encode())
    head.write_text("#" * single_file.HEAD_SIZE)
    with pytest.raises(ValueError, match="raise HEAD_SIZE"):
        single_file.pack(directory, head, tmp_path / "out", "1.2.3", 1_700_000_000)


def test_windows_gets_an_archive_that_any_program_opens(tmp_path: Path) -> None:
    """The same bytes, in whichever order the files were made."""
    made = []
    for names in (("b", "a"), ("a", "b")):
        directory = tmp_path / f"gathered-{names[0]}"
        (directory / "sub").mkdir(parents=True)
        for name in names:
            (directory / "sub" / name).write_text(name)
        made.append(single_file.zip_archive(directory, directory.with_suffix(".zip"), 1_700_000_000))
    assert made[0].read_bytes() == made[1].read_bytes()
    with zipfile.ZipFile(made[0]) as archive:
        assert archive.namelist() == ["arcbridge/sub/a", "arcbridge/sub/b"]
        assert archive.read("arcbridge/sub/a") == b"a"
